"""Reading a recording, a folder of images or a video file, frame by frame."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from backdrop.processing.patch_groups_backdrop import looks_like_group

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Recording:
    """A folder of images or a video file: `path`, the images' names in order (None: a video), frames if known."""

    path: Path
    names: tuple[str, ...] | None
    num_frames: int | None

    @property
    def name(self) -> str:
        """File name without the path."""
        return self.path.resolve().name

    def frames(self) -> Iterator[Image.Image]:
        """The frames in order, one at a time.

        Raises:
            ValueError: a frame that cannot be read, or a patch group in place of an ordinary image.
        """
        return _video_frames(self.path) if self.names is None else _folder_frames(self.path, self.names)


def open_recording(source: str | Path) -> Recording:
    """The recording at a path.

    Raises:
        ValueError: nothing there, a folder without images, or a file that OpenCV cannot read as a video.
    """
    path = Path(source)
    if path.is_dir():
        names = [
            entry.name
            for entry in os.scandir(path)
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
        ]
        if not names:
            raise ValueError(f"The folder {path} holds no images; wanted {', '.join(IMAGE_SUFFIXES)} files.")
        return Recording(path, tuple(sorted(names, key=_natural)), len(names))
    if not path.exists():
        raise ValueError(f"The recording {path} does not exist; wanted a video file or a folder of images.")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        # OpenCV would take it, and every file numbered like it, for a video.
        raise ValueError(f"The recording {path} is one image; wanted a video file or a folder of images.")
    with _capture(path) as (cv2, capture):
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return Recording(path, None, count if count > 0 else None)


def _natural(name: str) -> tuple:
    """Sort key that puts frame2 before frame10."""
    parts = re.split(r"([0-9]+)", name.lower())
    return (*(int(part) if i % 2 else part for i, part in enumerate(parts)), name)


def _folder_frames(folder: Path, names: tuple[str, ...]) -> Iterator[Image.Image]:
    for name in names:
        try:
            with Image.open(folder / name) as image:
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"The frame {folder / name} cannot be read: {error}") from error
        if image.mode == "RGBA" and looks_like_group(np.asarray(image)):
            raise ValueError(f"The frame {folder / name} is a patch group; wanted an ordinary image.")
        yield image


def _video_frames(path: Path) -> Iterator[Image.Image]:
    with _capture(path) as (cv2, capture):
        count = 0
        while True:
            read, frame = capture.read()
            if not read:
                break
            count += 1
            yield Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        if count == 0:
            raise ValueError(f"The video {path} holds no frames that OpenCV can decode; wanted one or more.")


@contextlib.contextmanager
def _capture(path: Path) -> Iterator[tuple]:
    """(cv2, an open `cv2.VideoCapture`), released at the end."""
    # FFmpeg's own remarks about a broken file; ours says it in one line.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            f"Reading the video {path} needs OpenCV, which is not installed: `pip install opencv-python`, or give a "
            "folder of images."
        ) from error
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise ValueError(f"The file {path} cannot be read as a video; wanted one that OpenCV decodes.")
        yield cv2, capture
    finally:
        capture.release()
