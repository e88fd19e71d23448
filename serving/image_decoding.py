"""Encoded images from strangers: bounded in bytes, pixels and scans before they are decoded."""

import base64
import re
from io import BytesIO
from urllib.parse import unquote

from PIL import Image, ImageOps

from .problems import ApiError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "TIFF")
# Scans of a progressive JPEG. Encoders write some ten. Each costs a pass over the whole image, and an attacker needs
# twelve bytes for one.
MAX_SCANS = 64
START_OF_SCAN = (
    b"\xff\xda"  # JPEG's marker; it cannot occur inside a scan, where 0xff is always followed by 0x00
)
JPEG_MARK = b"\xff\xd8"
# Of a TIFF's pixels. Those of its other kinds are files of other formats, JPEGs with any number of scans among them.
TIFF_COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate")
REDUCTIONS = (2, 4, 8)  # of its sides, which a JPEG's decoder can make while it decodes
_URLSAFE = str.maketrans("-_", "+/")
_BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")


def decode_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a data: URL of base64, or of base64 without the URL's head.

    As clients write it: with line breaks or spaces, in the URL-safe alphabet, percent-encoded, without its padding.

    Raises:
        ApiError: 400, no such URL or no base64; 413, more than `max_bytes`.
    """
    text = url.strip()
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().rstrip().endswith(";base64"):
            raise ApiError(
                400,
                f"an image's data: URL begins {head[:40]!r}; wanted data:image/...;base64,",
                "invalid_image",
            )
    text = "".join(unquote(text).split()).translate(_URLSAFE)
    digits = text.rstrip("=")
    size = len(digits) * 3 // 4
    if size > max_bytes:
        raise ApiError(413, f"an image has {size:,} bytes; wanted at most {max_bytes:,}", "image_too_large")
    # The decoder itself would pass over characters, or stop at a "=" in the middle.
    if _BASE64.fullmatch(text) is None or len(digits) % 4 == 1:
        raise ApiError(400, f"an image is no base64: it begins {text[:20]!r}", "invalid_image")
    return base64.b64decode(digits + "=" * (-len(digits) % 4))


def open_image(data: bytes, max_pixels: int, max_photo_pixels: int = 0) -> Image.Image:
    """A decoded image, upright, its alpha kept.

    Args:
        data: a file of one of `FORMATS`.
        max_pixels: width x height of what is decoded, known from the header.
        max_photo_pixels: width x height of a JPEG that is not progressive: it is decoded at a half, a quarter or an eighth
            of its sides, so that it keeps `max_pixels`, and the memory that they take.

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
    except Exception:  # readers of headers, too, raise exceptions of any kind
        raise ApiError(
            400, f"an image of {len(data):,} bytes is none of {', '.join(FORMATS)}", "invalid_image"
        ) from None
    width, height = image.size
    is_jpeg = data.startswith(JPEG_MARK)  # whatever PIL calls it: a JPEG of several pictures is an MPO
    if width * height > max_pixels:
        photo = is_jpeg and width * height <= max_photo_pixels and _is_streamed(image, data)
        if not photo or not _reduce(image, max_pixels):
            raise ApiError(
                413,
                f"an image has {width} x {height} pixels; wanted at most {max_pixels:,}",
                "image_too_large",
            )
    if is_jpeg and data.count(START_OF_SCAN) > MAX_SCANS:
        raise ApiError(
            413,
            f"an image has {data.count(START_OF_SCAN):,} scans; wanted at most {MAX_SCANS}",
            "image_too_large",
        )
    if image.format == "TIFF" and image.info.get("compression") not in TIFF_COMPRESSIONS:
        raise ApiError(
            400,
            f"a TIFF image is compressed by {image.info.get('compression')!r:.40}; wanted {', '.join(TIFF_COMPRESSIONS)}",
            "invalid_image",
        )
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # decoders, and readers of EXIF, raise exceptions of any kind
        raise ApiError(
            400, f"a {image.format} image of {len(data):,} bytes is damaged: {error}", "invalid_image"
        ) from None
    return image


def _is_streamed(image: Image.Image, data: bytes) -> bool:
    """Whether a JPEG has one scan of all its components: any other is kept whole, as coefficients, while it is decoded."""
    if image.info.get("progressive"):
        return False
    position = 2
    while data[position : position + 1] == b"\xff":
        if data[position : position + 2] == START_OF_SCAN:
            return data[position + 4 : position + 5] == bytes([image.layers])
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False


def _reduce(image: Image.Image, max_pixels: int) -> bool:
    """Has a JPEG decoded at a part of its sides; whether it keeps `max_pixels` then."""
    width, height = image.size
    for reduction in REDUCTIONS:
        if -(-width // reduction) * -(-height // reduction) <= max_pixels:
            image.draft(None, (width // reduction, height // reduction))
            return image.size[0] * image.size[1] <= max_pixels
    return False
