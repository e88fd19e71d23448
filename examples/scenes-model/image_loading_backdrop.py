"""Images from anywhere: a URL, path or base64 to a PIL image, and PIL images, arrays and tensors to RGB pixels."""

import base64
import binascii
import contextlib
import os
from io import BytesIO
from urllib.request import Request, urlopen

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension, ImageType, get_image_type

from .patch_groups_backdrop import METADATA_KEY, looks_like_group


def load_image(source: str) -> Image.Image:
    """The PIL image of a URL, a path or base64 text, its mode and alpha kept.

    Args:
        source: `http://` or `https://`, the path of an image file, base64, or a `data:image/` URL of base64.

    Raises:
        ValueError: it is none of these, cannot be fetched, or is no image that PIL reads.
    """
    if source.startswith(("http://", "https://")):
        image = _open_url(source)
    elif os.path.isfile(source):
        image = source
    else:
        text = source.split(",", 1)[1] if source.startswith("data:image/") and "," in source else source
        try:
            image = BytesIO(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            shown = source if len(source) <= 80 else "..." + source[-77:]
            raise ValueError(
                f"Incorrect image source {shown!r}; wanted a URL (http://, https://), the path of an image file, or base64."
            ) from None
    try:
        opened = Image.open(image)
        opened.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        shown = source if len(source) <= 80 else "..." + source[-77:]
        raise ValueError(f"The image {shown!r} cannot be read: {error}") from error
    return opened


def _open_url(url: str) -> BytesIO:
    try:
        with contextlib.closing(
            urlopen(Request(url, headers={"User-Agent": "backdrop"}), timeout=30)
        ) as answer:
            return BytesIO(answer.read())
    except OSError as error:
        raise ValueError(f"The image {url!r} cannot be fetched: {error}") from error


def upright(image):
    """A PIL image turned as its EXIF orientation says; anything else, and what is upright, as it is, without a copy."""
    if not isinstance(image, Image.Image):
        return image
    image.load()  # a PNG's orientation may stand behind its pixels
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def rgba_array(image) -> np.ndarray | None:
    """An image with four 8-bit channels as uint8 `[H, W, 4]`; None for any other.

    Args:
        image: PIL image, numpy array or torch tensor, channels first or last.
    """
    if isinstance(image, Image.Image):
        return np.asarray(image) if image.mode == "RGBA" else None
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3:
        return None
    if array.shape[-1] == 4:
        return array
    return np.moveaxis(array, 0, -1) if array.shape[0] == 4 else None


def is_group(image, side: int | None = None) -> bool:
    """Whether an image is a patch group, by its alpha, and where that is the same everywhere by its text.

    An ordinary picture may have one alpha, 253 or 254, all over. Only what was made in memory, and so has no file and no
    text, is taken at its alpha then.

    Args:
        image: PIL image, numpy array or torch tensor.
        side: of the images as the model sees them; None: it does not matter.
    """
    rgba = rgba_array(image)
    if rgba is None or not looks_like_group(rgba):
        return False
    if (rgba[..., 3] != rgba[0, 0, 3]).any():
        return True
    if isinstance(image, Image.Image):
        if METADATA_KEY in image.info:
            return True
        if image.format is not None:
            return False
    return side is None or rgba.shape[:2] == (side, side)


def rgb_array(image, input_data_format=None) -> np.ndarray:
    """Any image as uint8 `[H, W, 3]`; see `rgb_picture`."""
    return np.asarray(rgb_picture(image, input_data_format))


def rgb_picture(image, input_data_format=None) -> Image.Image:
    """Any image as a PIL image in mode RGB, which may be the given one.

    Transparency is composited on white, 16-bit grey is scaled to 8 bits, and float values are rounded.

    Args:
        image: PIL image, or an array as `array_to_image` takes it.
        input_data_format: where an array's channels are, "channels_first" or "channels_last"; None: found by its shape.

    Raises:
        ValueError: an array has another shape, or values that are no grey levels.
    """
    if not isinstance(image, Image.Image):
        image = array_to_image(image, input_data_format)
    if not image.width or not image.height:
        raise ValueError(f"An image has {image.width} x {image.height} pixels; wanted at least one.")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    elif image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max(initial=0)))
        image = Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def array_to_image(image, input_data_format=None) -> Image.Image:
    """A PIL image of a numpy array or torch tensor.

    Args:
        image: `[H, W]`, `[H, W, C]` or `[C, H, W]` with 1, 3 or 4 channels; bool, integers 0-255, or floats 0-1 or 0-255.
        input_data_format: "channels_first" or "channels_last"; None: the first axis where it can be channels.

    Raises:
        ValueError: another shape, values outside the range, or values that are not finite.
    """
    if get_image_type(image) == ImageType.TORCH:
        image = image.detach().cpu().numpy()
    array = np.asarray(image)
    if not array.size:
        raise ValueError(f"An image array has shape {array.shape}; wanted at least one pixel.")
    if array.ndim not in (2, 3):
        raise ValueError(f"An image array has shape {array.shape}; wanted [H, W], [H, W, C] or [C, H, W].")
    if array.ndim == 3 and not {array.shape[0], array.shape[-1]} & {1, 3, 4}:
        raise ValueError(f"An image array has shape {array.shape}; wanted 1, 3 or 4 channels, first or last.")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype != np.uint8:
        if not np.isfinite(array).all():
            raise ValueError("An image array has values that are not finite; wanted 0 to 1, or 0 to 255.")
        low, high = array.min(), array.max()
        if low < 0 or high > 255:
            raise ValueError(
                f"An image array has values from {low:g} to {high:g}; wanted 0 to 1, or 0 to 255."
            )
        unit = np.issubdtype(array.dtype, np.floating) and high <= 1
        array = np.round(array * (255 if unit else 1)).astype(np.uint8)
    if array.ndim == 2:
        return Image.fromarray(array)
    # As transformers does: where both the first and the last axis could be channels, the first is taken.
    first = (
        array.shape[0] in (1, 3, 4)
        if input_data_format is None
        else input_data_format == ChannelDimension.FIRST
    )
    array = np.moveaxis(array, 0, -1) if first else array
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))
