"""Images by URL: nothing is fetched from where it may not be, and no more than is allowed."""

import asyncio
import gzip

import httpx
import pytest

from backdrop.serving.image_fetching import MAX_REDIRECTS, ImageFetcher, is_public
from backdrop.serving.problems import ApiError

PUBLIC = "93.184.216.34"


def refused(status: int, message: str, function, *arguments) -> ApiError:
    with pytest.raises(ApiError, match=message) as caught:
        function(*arguments)
    assert caught.value.status == status and "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.255.254",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.1",
        "192.0.2.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::2",
        "::10.0.0.1",
        "::8.8.8.8",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::10.0.0.1",
        "64:ff9b::127.0.0.1",
        "64:ff9b:1::10.0.0.1",
        "100::1",
        "2001::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",  # Teredo of a private one
        "2001:db8::1",
        "2002:7f00:1::",  # 6to4 of 127.0.0.1
        "2002:a00:1::1",
        "2002:c0a8:101::1",
        "fc00::1",
        "fd12:3456::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "::1%lo",
        "ff02::1",
        "ff0e::1",
        "4000::1",
        "localhost",
        "",
        "1.2.3",
        "0x7f000001",
        "2130706433",
    ],
)
def test_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        PUBLIC,
        "8.8.8.8",
        "100.63.255.255",
        "100.128.0.1",
        "172.32.0.1",
        "169.253.0.1",
        "2606:4700::1111",
        "2002:808:808::1",
        "64:ff9b::8.8.8.8",
    ],
)
def test_public(address):
    assert is_public(address)


class Web:
    """What is on the web, and who asked for it: `pages` by host and path, `addresses` by host."""

    def __init__(self, pages: dict, addresses: dict | None = None):
        self.pages, self.addresses = pages, addresses or {}
        self.requests: list[httpx.Request] = []
        self.looked_up: list[tuple[str, int]] = []

    async def resolve(self, host: str, port: int) -> list[str]:
        self.looked_up.append((host, port))
        found = self.addresses.get(host, [PUBLIC])
        if isinstance(found, Exception):
            raise found
        return found.pop(0) if found and isinstance(found[0], list) else found

    async def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        page = self.pages[request.headers["host"] + request.url.raw_path.decode()]
        page = await page(request) if callable(page) else page
        return page if isinstance(page, httpx.Response) else httpx.Response(200, content=parts(page))

    def fetcher(self, hosts=("example.org", "*.images.org"), seconds=5.0, max_bytes=1000) -> ImageFetcher:
        return ImageFetcher(list(hosts), seconds, max_bytes, self.resolve, httpx.MockTransport(self.answer))

    def fetch(self, url: str, **options) -> bytes:
        async def main():
            fetcher = self.fetcher(**options)
            try:
                return await fetcher.fetch(url)
            finally:
                await fetcher.aclose()

        return asyncio.run(main())


async def parts(*pieces: bytes):
    for piece in pieces:
        yield piece


def redirect(location: str, status: int = 302) -> httpx.Response:
    return httpx.Response(status, headers={"Location": location})


def test_an_image_of_an_allowed_host_is_fetched_from_the_address_that_was_checked():
    web = Web({"example.org/a/b.png?size=1&x=%2F": b"pixels"})
    assert web.fetch("https://Example.ORG./a/b.png?size=1&x=%2F#part") == b"pixels"
    (request,) = web.requests
    assert str(request.url) == f"https://{PUBLIC}/a/b.png?size=1&x=%2F"
    assert request.headers["host"] == request.extensions["sni_hostname"] == "example.org"
    assert request.headers["accept-encoding"] == "identity" and "authorization" not in request.headers
    assert web.looked_up == [("example.org", 443)]


def test_hosts_match_whole_names():
    web = Web({f"{host}/": b"1" for host in ("a.images.org", "b.a.images.org", "example.org")})
    for url in ("http://a.images.org", "http://b.a.images.org/", "http://example.org:80/"):
        assert web.fetch(url) == b"1"
    for host in ("images.org", "evilimages.org", "example.org.evil.net", "www.example.org", "evil.net"):
        refused(400, f"not fetched from host '{host}'; allowed: example.org", web.fetch, f"http://{host}/")
    assert len(web.requests) == 3 and web.looked_up[0] == ("a.images.org", 80)


def test_without_hosts_nothing_is_fetched():
    web = Web({})
    with pytest.raises(ApiError, match="allowed: none: send images as data: URLs"):
        web.fetch("http://example.org/", hosts=())
    assert web.looked_up == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "scheme 'file'"),
        ("ftp://example.org/a.png", "scheme 'ftp'"),
        ("gopher://example.org/", "scheme 'gopher'"),
        ("/etc/passwd", "scheme ''"),
        ("//example.org/a.png", "scheme ''"),
        ("http:///a.png", "scheme 'http'"),
        ("http://user:password@example.org/", "carries a user name"),
        ("http://@example.org/", "carries a user name"),
        ("http://example.org@evil.net/", "carries a user name"),
        ("http://example.org:8080/", "names port 8080; wanted 80"),
        ("https://example.org:80/", "names port 80; wanted 443"),
        ("http://example.org:0/", "names port 0"),
        ("http://example.org:99999/", "cannot be read"),
        ("http://example.org:a/", "cannot be read"),
        ("http://[::1/", "cannot be read"),
        ("http://example.org\\@evil.net/", "carries a user name|not fetched from host"),
        ("http://\u00e4.images.org/", "not fetched from host"),
        ("http://example\u3002org/", "not fetched from host"),
        ("http://example.org/\ud800", "cannot be read"),
        ("http://127.0.0.1/", "not fetched from host"),
        ("http://[::1]/", "not fetched from host"),
    ],
)
def test_urls_that_may_not_be_fetched(url, message):
    web = Web({})
    refused(400, message, web.fetch, url)
    assert web.looked_up == [] and web.requests == []


@pytest.mark.parametrize(
    "addresses", [["10.0.0.1"], [PUBLIC, "127.0.0.1"], ["::ffff:169.254.169.254"], ["fe80::1%eth0"], []]
)
def test_an_allowed_name_that_leads_inside_is_refused(addresses):
    web = Web({"example.org/": b"secret"}, {"example.org": addresses})
    refused(400, "leads to an address that is not public", web.fetch, "http://example.org/")
    assert web.requests == []


def test_an_address_can_be_allowed_only_if_it_is_public():
    web = Web({"127.0.0.1/": b"secret"}, {"127.0.0.1": ["127.0.0.1"]})
    with pytest.raises(ApiError, match="not public"):
        web.fetch("http://127.0.0.1/", hosts=("127.0.0.1",))


@pytest.mark.parametrize("error", [OSError("no such name"), UnicodeError("label too long")])
def test_a_name_without_an_address_is_named(error):
    web = Web({}, {"example.org": error})
    refused(400, "the image's host 'example.org' has no address", web.fetch, "http://example.org/")


def test_a_name_that_no_resolver_takes_is_a_400():
    async def main():
        fetcher = ImageFetcher(["*.example.org"], 5.0, 10)
        with pytest.raises(ApiError, match="has no address") as caught:
            await fetcher.fetch(f"http://{'a' * 70}.example.org/")
        assert caught.value.status == 400
        await fetcher.aclose()

    asyncio.run(main())


def test_a_rebound_name_is_not_asked_again():
    """The second answer of the DNS leads inside: it is never used for the first hop, and refused at the second."""
    web = Web({"example.org/": b"pixels"}, {"example.org": [[PUBLIC], ["127.0.0.1"]]})
    assert web.fetch("http://example.org/") == b"pixels"
    assert web.looked_up == [("example.org", 80)] and web.requests[0].url.host == PUBLIC
    web = Web({"example.org/": redirect("/again")}, {"example.org": [[PUBLIC], ["127.0.0.1"]]})
    refused(400, "not public", web.fetch, "http://example.org/")
    assert len(web.requests) == 1


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://evil.net/", "not fetched from host 'evil.net'"),
        ("http://169.254.169.254/latest/meta-data", "not fetched from host '169.254.169.254'"),
        ("https://inside.images.org/", "leads to an address that is not public"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("http://example.org:6379/", "names port 6379"),
        ("http://[", "cannot be read"),
        ("//evil.net/a", "not fetched from host 'evil.net'"),
        ("http://user@example.org/", "user name"),
    ],
)
def test_every_hop_of_a_redirect_is_checked(location, message):
    web = Web({"example.org/": redirect(location)}, {"inside.images.org": ["10.0.0.1"]})
    refused(400, message, web.fetch, "http://example.org/")
    assert len(web.requests) == 1


def test_redirects_are_followed_and_counted():
    pages = {f"example.org/{i}": redirect(f"/{i + 1}", (301, 302, 303, 307, 308)[i]) for i in range(5)}
    web = Web(pages | {f"a.images.org/{MAX_REDIRECTS}": b"there"})
    web.pages[f"example.org/{MAX_REDIRECTS - 1}"] = redirect(f"https://a.images.org/{MAX_REDIRECTS}")
    assert web.fetch("http://example.org/0") == b"there"
    assert (
        web.requests[-1].extensions["sni_hostname"] == "a.images.org"
        and len(web.requests) == MAX_REDIRECTS + 1
    )
    web = Web(pages)
    refused(400, f"redirects more than {MAX_REDIRECTS} times", web.fetch, "http://example.org/0")
    assert len(web.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize("status", [204, 206, 304, 300, 401, 404, 500])
def test_no_image_there(status):
    web = Web({"example.org/": httpx.Response(status)})
    refused(400, f"host 'example.org' answered {status} for an image", web.fetch, "http://example.org/")


def test_a_body_is_read_up_to_the_limit():
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 1
            yield bytes(300)

    web = Web({"example.org/just": bytes(1000), "example.org/more": httpx.Response(200, content=endless())})
    assert len(web.fetch("http://example.org/just")) == 1000
    refused(413, "more than 1,000 bytes", web.fetch, "http://example.org/more")
    assert sent == 4


def test_a_compressed_body_is_not_unpacked():
    packed = gzip.compress(bytes(10**7), 9)
    web = Web(
        {"example.org/": httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=parts(packed))}
    )
    assert web.fetch("http://example.org/", max_bytes=20_000) == packed


@pytest.mark.parametrize(
    "error", [httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.RemoteProtocolError]
)
def test_a_connection_that_fails_is_named_before_and_within_the_body(error):
    async def fails(request):
        raise error("failed")

    async def breaks():
        yield b"half"
        raise error("failed")

    web = Web({"example.org/a": fails, "example.org/b": httpx.Response(200, content=breaks())})
    for path in "ab":
        message = f"the image at host 'example.org' cannot be fetched: {error.__name__}"
        refused(400, message, web.fetch, f"http://example.org/{path}")


def test_a_slow_host_is_a_504():
    async def slow_name(host, port):
        await asyncio.sleep(9)

    async def slow(request):
        await asyncio.sleep(9)

    async def dripping():
        while True:
            yield b"."
            await asyncio.sleep(0.005)

    web = Web({"example.org/a": slow, "example.org/b": httpx.Response(200, content=dripping())})
    message = "the image's host did not answer within 0.03 s"
    for path in "ab":
        with pytest.raises(ApiError, match=message) as caught:
            web.fetch(f"http://example.org/{path}", seconds=0.03)
        assert caught.value.status == 504
    web.resolve = slow_name
    with pytest.raises(ApiError, match=message):
        web.fetch("http://example.org/a", seconds=0.03)


def test_odd_paths_are_asked_for_as_a_browser_does():
    web = Web({"example.org/%C3%A4%20b.png?q=%C3%A4": b"1", "example.org/?q": b"2"})
    assert web.fetch("http://example.org/\u00e4 b.png?q=\u00e4") == b"1"
    assert web.fetch("http://example.org?q") == b"2"
    refused(400, "cannot be fetched: InvalidURL", web.fetch, "http://example.org/" + "a" * 70_000)


def test_many_at_once_on_one_fetcher():
    async def main():
        pages = {f"example.org/{i}": str(i).encode() for i in range(20)}
        fetcher = Web(pages).fetcher()
        found = await asyncio.gather(*(fetcher.fetch(f"http://example.org/{i}") for i in range(20)))
        await fetcher.aclose()
        return found

    assert asyncio.run(main()) == [str(i).encode() for i in range(20)]
