"""Made recordings of a fixed camera that are as awkward as real ones, for checks of background matching.

    backdrop scenes recording OUT --seed 0

A still photo, slow drift of the light, sensor noise, textured things that move, foliage that flickers, and JPEG. Unlike
the scenes of `world`, nothing in it is labelled and no question is asked.
"""

import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont, ImageOps

_DRIFT, _DRIFT_PERIOD = 3.0, 400  # grey levels either way, frames
_MOVING_SHARE, _FOLIAGE_SHARE = 0.10, 0.02  # of the image
_SHAKE = 3  # pixels by which foliage shifts, at most


@dataclass(frozen=True, eq=False)
class _MovingThing:
    """A textured ellipse that bounces inside the middle square: float32 `[H, W, 3]`, soft mask `[H, W, 1]`, pixels."""

    texture: np.ndarray
    mask: np.ndarray
    start: np.ndarray
    speed: np.ndarray

    def corner(self, frame: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Its top left corner (row, column), integers."""
        room = np.maximum(high - low - np.array(self.mask.shape[:2]), 1)
        way = (self.start * room + self.speed * frame) % (2 * room)
        return (low + np.where(way > room, 2 * room - way, way)).astype(int)


def write_recording(
    path: str | Path,
    frames: int,
    seed: int,
    size: tuple[int, int] = (640, 480),
    noise: float = 2.5,
    jpeg_quality: int = 85,
) -> None:
    """Writes a recording, the same for the same seed (and the same photo at hand).

    Args:
        path: a `.mp4` or `.avi` file (OpenCV), else a folder of JPEG files, made if need be.
        size: width and height, pixels.
        noise: standard deviation of the sensor's noise, grey levels.
        jpeg_quality: every frame goes through JPEG, in a video too.

    Raises:
        ValueError: OpenCV cannot write the video.
    """
    path = Path(path)
    coded = (_as_jpeg(pixels, jpeg_quality) for pixels in recording_frames(frames, seed, size, noise))
    if path.suffix.lower() not in (".mp4", ".avi"):
        path.mkdir(parents=True, exist_ok=True)
        for i, data in enumerate(coded):
            (path / f"frame{i:05d}.jpg").write_bytes(data)
        return
    import cv2

    codec = "mp4v" if path.suffix.lower() == ".mp4" else "MJPG"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 25, size)
    if not video.isOpened():
        raise ValueError(f"OpenCV cannot write {path} with codec {codec}; wanted a build that has it.")
    for data in coded:
        video.write(cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR))
    video.release()


def recording_frames(
    frames: int, seed: int, size: tuple[int, int] = (640, 480), noise: float = 2.5
) -> Iterator[np.ndarray]:
    """The frames before JPEG, uint8 `[H, W, 3]`, one at a time.

    Args:
        size: width and height, pixels.
        noise: standard deviation of the sensor's noise, grey levels.
    """
    rng = np.random.default_rng(seed)
    width, height = size
    background = _background(size, seed)
    middle = min(size)  # a centre crop keeps the middle square: what moves stays inside
    low = np.array([(height - middle) // 2, (width - middle) // 2])
    things = _moving_things(rng, middle)
    row, column, side = _leafiest(background, middle, low)
    for frame in range(frames):
        picture = background.copy()
        shift = rng.integers(-_SHAKE, _SHAKE + 1, 2)
        picture[row : row + side, column : column + side] = background[
            row + shift[0] : row + shift[0] + side, column + shift[1] : column + shift[1] + side
        ]
        for thing in things:
            top, left = thing.corner(frame, low, low + middle)
            part = picture[top : top + thing.mask.shape[0], left : left + thing.mask.shape[1]]
            part += (thing.texture - part) * thing.mask
        picture += _DRIFT * np.sin(2 * np.pi * frame / _DRIFT_PERIOD)
        picture += noise * rng.standard_normal(picture.shape, dtype=np.float32)
        yield np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def plant_character(
    image: np.ndarray, top_left: tuple[int, int], character: str, contrast: float, height: int = 8
) -> np.ndarray:
    """A copy of uint8 `[H, W, 3]` with one character drawn into it.

    Args:
        top_left: row and column of its upper left pixel.
        character: one character that leaves ink.
        contrast: grey levels added to what lies under the strokes; the sign turns where that would be clipped.
        height: pixels.

    Raises:
        ValueError: no single character with ink, or one that does not fit in.
    """
    glyph = _glyph(character, height)
    row, column = top_left
    planted = image.copy()
    part = planted[row : row + glyph.shape[0], column : column + glyph.shape[1]]
    if min(top_left) < 0 or part.shape[:2] != glyph.shape:
        raise ValueError(
            f"The character {character!r} at row {row}, column {column} is {glyph.shape[1]} x {glyph.shape[0]} pixels; "
            f"wanted one inside {image.shape[1]} x {image.shape[0]}."
        )
    under = part[glyph].astype(np.float64)
    if not 0 <= under.mean() + contrast <= 255:
        contrast = -contrast
    part[glyph] = np.clip(under + contrast + 0.5, 0, 255).astype(np.uint8)
    return planted


def _glyph(character: str, height: int) -> np.ndarray:
    """Ink of a character of PIL's 6 x 11 bitmap font, scaled to a height: bool `[height, W]`."""
    # The bitmap font, not `load_default()`: that one depends on FreeType and is grey at the edges.
    mask = ImageFont.load_default_imagefont().getmask(character)
    box = mask.getbbox()
    if len(character) != 1 or box is None:
        raise ValueError(f"character is {character!r}; wanted one character that leaves ink.")
    ink = np.array(mask, dtype=np.uint8).reshape(mask.size[::-1])[box[1] : box[3], box[0] : box[2]]
    width = max(1, round(ink.shape[1] * height / ink.shape[0]))
    return np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.NEAREST)) > 0


def _background(size: tuple[int, int], seed: int) -> np.ndarray:
    """float32 `[H, W, 3]`: a photo that ultralytics ships, or clouds of noise."""
    # Found, not imported: the import takes seconds.
    spec = importlib.util.find_spec("ultralytics")
    if spec is not None and spec.origin is not None:
        photo = Path(spec.origin).parent / "assets" / ("zidane.jpg", "bus.jpg")[seed % 2]
        if photo.is_file():
            with Image.open(photo) as image:
                return np.asarray(ImageOps.fit(image.convert("RGB"), size), dtype=np.float32)
    return _clouds(np.random.default_rng(seed), size)


def _clouds(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Noise of several scales around mid grey, float32 `[H, W, 3]`."""
    width, height = size
    sum_of_scales: np.ndarray = np.full((height, width, 3), 128, dtype=np.float32)
    for cells in (3, 8, 24, 64):
        coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        fine = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        sum_of_scales += (np.asarray(fine, dtype=np.float32) - 128) * (0.8 / cells**0.3)
    return np.clip(sum_of_scales, 0, 255)


def _moving_things(rng: np.random.Generator, middle: int) -> list[_MovingThing]:
    """One to three ellipses of different sizes that cover `_MOVING_SHARE` of the middle square together."""
    weights = rng.uniform(0.3, 1.0, rng.integers(1, 4))
    areas = weights / weights.sum() * _MOVING_SHARE * middle**2
    things = []
    for area in areas:
        aspect = rng.uniform(0.6, 1.7)
        height, width = (max(8, int(round((area * 4 / np.pi * a) ** 0.5))) for a in (aspect, 1 / aspect))
        rows, columns = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
        inside = np.clip((1 - np.hypot(rows, columns)) * min(height, width) / 4, 0, 1)
        angle, pace = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 3.0)
        things.append(
            _MovingThing(
                texture=_clouds(rng, (width, height)),
                mask=inside[..., None].astype(np.float32),
                start=rng.uniform(0, 1, 2),
                speed=pace * np.array([np.sin(angle), np.cos(angle)]),
            )
        )
    return things


def _leafiest(background: np.ndarray, middle: int, low: np.ndarray) -> tuple[int, int, int]:
    """(row, column, side) of the square with the most texture, away from the border: only there a shake is seen."""
    side = max(4, int(round((_FOLIAGE_SHARE * middle**2) ** 0.5)))
    grey = background.mean(axis=2)
    busy = np.abs(np.diff(grey, axis=0))[:, :-1] + np.abs(np.diff(grey, axis=1))[:-1]
    best = (-1.0, 0, 0)
    for row in range(low[0] + _SHAKE, low[0] + middle - side - _SHAKE, side // 2):
        for column in range(low[1] + _SHAKE, low[1] + middle - side - _SHAKE, side // 2):
            best = max(best, (float(busy[row : row + side, column : column + side].mean()), row, column))
    return best[1], best[2], side


def _as_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
