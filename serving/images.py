"""Images from strangers: bounded before they are decoded, and fetched from public addresses of allowed hosts only."""

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from io import BytesIO
from urllib.parse import quote, urljoin, urlsplit

import httpx
from PIL import Image, ImageOps, UnidentifiedImageError

from .problems import ApiError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_REDIRECTS = 3
# Of a JPEG; encoders write some ten. Each costs a pass over the whole image, and twelve bytes are enough for one.
MAX_SCANS = 64
START_OF_SCAN = b"\xff\xda"  # inside a scan's data an 0xff is followed by 0x00
Resolver = Callable[[str, int], Awaitable[list[str]]]

GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all that is given out of IPv6
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a base64 data: URL.

    Raises:
        ApiError: 400, 413.
    """
    head, comma, text = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ApiError(
            400, f"an image's data: URL begins {head[:40]!r}; wanted data:image/...;base64,", "invalid_image"
        )
    size = len(text) // 4 * 3 - text[-2:].count("=")
    if size > max_bytes:
        raise ApiError(413, f"an image has {size:,} bytes; wanted at most {max_bytes:,}", "image_too_large")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"an image's data: URL is no base64: {error}", "invalid_image") from None


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """A decoded image, upright, its alpha kept.

    Raises:
        ApiError: 400 for what is no image or a damaged one, 413 for too many pixels.
    """
    if not data:
        raise ApiError(400, "an image has 0 bytes", "invalid_image")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ApiError(
            413, f"an image has too many pixels; wanted at most {max_pixels:,}", "image_too_large"
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise ApiError(
            400, f"an image of {len(data):,} bytes is none of {', '.join(FORMATS)}", "invalid_image"
        ) from None
    width, height = image.size
    if width * height > max_pixels:
        raise ApiError(
            413, f"an image has {width} x {height} pixels; wanted at most {max_pixels:,}", "image_too_large"
        )
    if image.format == "JPEG" and data.count(START_OF_SCAN) > MAX_SCANS:
        raise ApiError(
            413,
            f"an image has {data.count(START_OF_SCAN):,} scans; wanted at most {MAX_SCANS}",
            "image_too_large",
        )
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # decoders, and readers of EXIF, raise of everything
        raise ApiError(
            400, f"a {image.format} image of {len(data):,} bytes is damaged: {error}", "invalid_image"
        ) from None
    return image


@dataclass
class Budget:
    """Bytes that may still come."""

    left: int

    def take(self, size: int) -> None:
        """Raises `ApiError` 413."""
        self.left -= size
        if self.left < 0:
            raise ApiError(413, "the request's images are too large together", "image_too_large")


class ImageFetcher:
    """Fetches images over HTTP from allowed hosts; a name that leads to a private address is refused.

    Every hop of a redirect is checked, and the connection goes to the very address that was checked.

    Args:
        hosts: "example.org" or "*.example.org"; none: every URL is refused.
        resolver: name and port -> addresses; None: the system's.
        transport: of httpx, for tests.
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
        # No connection is kept: it would be found again by its address, where TLS was checked for another name.
        self._client = httpx.AsyncClient(
            follow_redirects=False,
            trust_env=False,
            transport=transport,
            timeout=None,  # `fetch` has one for everything
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def fetch(self, url: str, budget: Budget | None = None) -> bytes:
        """The body of a URL; `budget` is shared with others.

        Raises:
            ApiError: 400 for what may not be fetched or is not there, 413, 504.
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
        """The body, or where a redirect leads."""
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
        async for part in response.aiter_raw():  # as it came: a few bytes of gzip unpack to anything
            size += len(part)
            if size > self.max_bytes:
                raise ApiError(413, f"an image has more than {self.max_bytes:,} bytes", "image_too_large")
            budget.take(len(part))
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
        # An international name's ASCII form is allowed, and asked for, instead.
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
        except (OSError, UnicodeError):  # a name that no DNS can have, too
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
            # TLS is checked against the name, not the address.
            extensions={"sni_hostname": host},
        )

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._client.aclose()


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet's."""
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    embedded = [ip]
    if ip.version == 6:
        if (
            ip not in GLOBAL_UNICAST and ip not in NAT64
        ):  # mapped and site-local ones; not all are known to Python
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
    return [entry[4][0] for entry in found]
