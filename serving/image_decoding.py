"""Encoded images from strangers: bounded in bytes, pixels and scans before they are decoded."""

import base64
import binascii
from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

from .problems import ApiError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Scans of a progressive JPEG. Encoders write some ten. Each costs a pass over the whole image, and an attacker needs
# twelve bytes for one.
MAX_SCANS = 64
START_OF_SCAN = (
    b"\xff\xda"  # JPEG's marker; it cannot occur inside a scan, where 0xff is always followed by 0x00
)


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a base64 data: URL.

    Raises:
        ApiError: 400, no such URL or no base64; 413, more than `max_bytes`.
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

    Args:
        data: a file of one of `FORMATS`.
        max_pixels: width x height, read from the header.

    Raises:
        ApiError: 400, no image or a damaged one; 413, too many pixels or scans.
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
    except Exception as error:  # decoders, and readers of EXIF, raise exceptions of any kind
        raise ApiError(
            400, f"a {image.format} image of {len(data):,} bytes is damaged: {error}", "invalid_image"
        ) from None
    return image
