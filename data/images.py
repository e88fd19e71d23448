"""Images of datasets: where their files lie, and whether they can be decoded.

An image is `{"path": str | None, "bytes": bytes | None}`, as `datasets.Image` stores it: a path where a local file
exists, else bytes. It is never decoded and encoded again, so that an RGBA patch group keeps its alpha.
"""

import os
import warnings
from collections.abc import Iterable
from functools import lru_cache
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageFile

from .rows import BadRowError

# PIL warns of a decompression bomb from about as many pixels (RGB in 256 MiB).
MAX_PIXELS = 89_478_485
# Resizing is by the shorter side: at 336 px the longer one of such an image has 33,600.
MAX_ASPECT = 100


def file_image(row_id: str, candidates: Iterable[Path]) -> dict:
    """The first of `candidates` that is a file."""
    candidates = list(candidates)
    for path in candidates:
        if path.is_file():
            return {"path": str(path.absolute()), "bytes": None}
    others = f" (nor {len(candidates) - 1} other places)" if len(candidates) > 1 else ""
    raise BadRowError(row_id, f"image file {candidates[0]} does not exist{others}")


def stored_image(row_id: str, value: object, folder: Path | None = None) -> dict:
    """An image column's value; a path that is not absolute lies in `folder`."""
    path, content = value, None
    if isinstance(value, dict):
        path, content = value.get("path"), value.get("bytes")
    if isinstance(content, bytes):
        # Without its path: `datasets` prefers a file of that name in the working directory to the bytes.
        return {"path": None, "bytes": content}
    if isinstance(path, str) and path:
        return file_image(row_id, [(folder or Path()) / path])
    raise BadRowError(
        row_id, "no image" if value is None else f"image is {type(value).__name__} without data"
    )


def check_image(row_id: str, image: dict) -> None:
    """Decodes all of the image.

    Raises:
        BadRowError: it cannot be decoded, ends early, has no pixels, or far too many or far too long ones.
    """
    if image["bytes"] is not None:
        problem = _problem(BytesIO(image["bytes"]))
    else:
        try:
            status = os.stat(image["path"])
        except OSError as error:
            raise BadRowError(row_id, f"image file {image['path']}: {error.strerror}") from None
        problem = _file_problem(image["path"], status.st_mtime_ns, status.st_size)
    if problem:
        raise BadRowError(row_id, f"image {problem}")


# Several rows ask about one image; the time and size stand for the file's content.
@lru_cache(maxsize=1 << 18)
def _file_problem(path: str, mtime_ns: int, size: int) -> str:
    problem = _problem(path)
    return f"file {path} {problem}" if problem else ""


def _problem(file: str | BytesIO) -> str:
    """What is wrong with an image file, "" if nothing is."""
    # Some library of the process may have asked PIL to fill in what a truncated file lacks.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            opened = Image.open(file)
        with opened as image:
            width, height = image.size
            if width < 1 or height < 1:
                return f"has {width} x {height} pixels"
            if width * height > MAX_PIXELS:
                return f"has {width} x {height} pixels; wanted at most {MAX_PIXELS:,}"
            if max(width, height) > MAX_ASPECT * min(width, height):
                return f"has {width} x {height} pixels; wanted sides within 1:{MAX_ASPECT}"
            image.load()
    # Decoders raise anything on broken files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        return f"cannot be decoded: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ""
