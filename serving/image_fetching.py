"""Images by URL: fetched from public addresses of allowed hosts only, and bounded in bytes and time."""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

import httpx

from .problems import ApiError

MAX_REDIRECTS = 3
Resolver = Callable[[str, int], Awaitable[list[str]]]  # host name and port -> IP addresses

GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all IPv6 addresses that are assigned to anybody
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # holds an IPv4 address in its last 32 bits


@dataclass
class Budget:
    """Bytes that the images of one request may still have, together.

    Attributes:
        left: how many.
    """

    left: int

    def spend(self, size: int) -> None:
        """Takes bytes off.

        Raises:
            ApiError: 413, there are not as many left.
        """
        self.left -= size
        if self.left < 0:
            raise ApiError(413, "the request's images are too large together", "image_too_large")


class ImageFetcher:
    """Fetches images over HTTP(S) from allowed hosts; a host name that leads to a private address is refused.

    Every hop of a redirect is checked, and the connection goes to the very address that was checked, so that a second
    answer of the DNS cannot lead elsewhere.

    Args:
        hosts: "example.org" or "*.example.org"; empty: every URL is refused.
        seconds: longest time for one image, redirects included.
        max_bytes: of one image.
        resolver: replaces the system's; for tests.
        transport: of httpx, replaces the network; for tests.
    """

    def __init__(
        self,
        hosts: list[str],
        seconds: float,
        max_bytes: int,
        resolver: Resolver | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self.hosts, self.seconds, self.max_bytes = [host.lower() for host in hosts], seconds, max_bytes
        self._resolve = resolver or _system_addresses
        # Connections are not kept alive: httpx would reuse one for another host name at the same address, for which TLS
        # was never checked.
        self._client = httpx.AsyncClient(
            follow_redirects=False,
            trust_env=False,
            transport=transport,
            timeout=None,  # `fetch` bounds the time of everything together
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def fetch(self, url: str, budget: Budget | None = None) -> bytes:
        """The encoded image at a URL.

        Args:
            url: http: or https:.
            budget: shared by the images of a request; None: `max_bytes`.

        Raises:
            ApiError: 400, the URL may not be fetched, or nothing is there; 413, too many bytes; 504, too slow.
        """
        try:
            return await asyncio.wait_for(self._fetch(url, budget or Budget(self.max_bytes)), self.seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                504, f"the image's host did not answer within {self.seconds:g} s", "image_timeout"
            ) from None

    async def _fetch(self, url: str, budget: Budget) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            host, port, address = await self._checked(url)
            try:
                found = await self._get(self._request(url, host, port, address), host, budget)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise ApiError(
                    400,
                    f"the image at host {host!r} cannot be fetched: {type(error).__name__}",
                    "image_not_fetched",
                ) from None
            if isinstance(found, bytes):
                return found
            url = _joined(url, found)
        raise ApiError(400, f"an image's URL redirects more than {MAX_REDIRECTS} times", "image_not_fetched")

    async def _get(self, request: httpx.Request, host: str, budget: Budget) -> bytes | str:
        """The body, or the location that a redirect names."""
        response = await self._client.send(request, stream=True)
        try:
            if response.has_redirect_location:
                return response.headers["location"]
            if response.status_code != 200:
                raise ApiError(
                    400, f"host {host!r} answered {response.status_code} for an image", "image_not_fetched"
                )
            return await self._bounded(response, budget)
        finally:
            await response.aclose()

    async def _bounded(self, response: httpx.Response, budget: Budget) -> bytes:
        parts, size = [], 0
        async for part in response.aiter_raw():  # not decompressed: a few bytes of gzip unpack to any size
            size += len(part)
            if size > self.max_bytes:
                raise ApiError(413, f"an image has more than {self.max_bytes:,} bytes", "image_too_large")
            budget.spend(len(part))
            parts.append(part)
        return b"".join(parts)

    async def _checked(self, url: str) -> tuple[str, int, str]:
        """(host, port, address) of a URL that may be fetched."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower().rstrip("."), parts.port
            url.encode()
        except ValueError:
            raise _unreadable(url) from None
        if parts.scheme not in ("http", "https") or not host:
            raise ApiError(
                400,
                f"an image's URL has the scheme {parts.scheme!r}; wanted data:, http: or https:",
                "url_refused",
            )
        if parts.username is not None or parts.password is not None:
            raise ApiError(400, "an image's URL carries a user name; wanted none", "url_refused")
        # International names must be given in their ASCII form, here and in the settings.
        if not host.isascii() or not any(
            host == known or (known.startswith("*.") and host.endswith(known[1:])) for known in self.hosts
        ):
            allowed = ", ".join(self.hosts) or "none: send images as data: URLs"
            raise ApiError(
                400, f"images are not fetched from host {host!r}; allowed: {allowed}", "url_refused"
            )
        default = 443 if parts.scheme == "https" else 80
        if port not in (None, default):
            raise ApiError(400, f"an image's URL names port {port}; wanted {default}", "url_refused")
        try:
            addresses = await self._resolve(host, default)
        except (OSError, UnicodeError):  # UnicodeError: a label that is too long for any DNS
            raise ApiError(400, f"the image's host {host!r} has no address", "image_not_fetched") from None
        if not addresses or not all(map(is_public, addresses)):
            raise ApiError(
                400, f"the image's host {host!r} leads to an address that is not public", "url_refused"
            )
        return host, default, addresses[0]

    def _request(self, url: str, host: str, port: int, address: str) -> httpx.Request:
        parts = urlsplit(url)
        target = httpx.URL(
            scheme=parts.scheme,
            host=address,
            port=port,
            raw_path=_quoted(parts.path or "/") + (b"?" + _quoted(parts.query) if parts.query else b""),
        )
        return self._client.build_request(
            "GET",
            target,
            headers={"Host": host, "Accept": "image/*", "Accept-Encoding": "identity"},
            # The server's certificate is checked against the name, not the address.
            extensions={"sni_hostname": host},
        )

    async def aclose(self) -> None:
        """Closes the client; nothing can be fetched afterwards."""
        await self._client.aclose()


def is_public(address: str) -> bool:
    """Whether an IP address, as text, belongs to the public Internet; False for what is no IP address.

    An IPv6 address that carries an IPv4 address (6to4, Teredo, NAT64) is public where both are.
    """
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    embedded = [ip]
    if ip.version == 6:
        # IPv4-mapped and site-local addresses, for example: Python does not call all of them private.
        if ip not in GLOBAL_UNICAST and ip not in NAT64:
            return False
        embedded += [part for part in (ip.sixtofour, *(ip.teredo or ())) if part is not None]
        if ip in NAT64:
            embedded.append(ipaddress.ip_address(int(ip) & 0xFFFFFFFF))
    return all(part.is_global and not part.is_multicast for part in embedded)


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise _unreadable(location) from None


def _unreadable(url: str) -> ApiError:
    return ApiError(400, f"an image's URL {url[:80]!r} cannot be read", "url_refused")


def _quoted(text: str) -> bytes:
    return quote(text, safe="/%:@!$&'()*+,;=?~").encode()


async def _system_addresses(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]
