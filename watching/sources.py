"""Where frames come from: a folder, a video file, a still that a camera serves over HTTP, or a live stream.

A live source never falls behind: a thread keeps only its newest frame, and what was not asked for in time is dropped and
counted. It also never ends by itself: where the stream breaks off it is opened again, at growing intervals.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OPEN_SECONDS = READ_SECONDS = 10.0  # of a live stream, before it counts as lost
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two attempts to open it again
MAX_STILL_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class TimedFrame:
    """One frame.

    Attributes:
        image: uint8 `[H, W, 3]`, RGB.
        seconds: since the recording's start, or since a live source was opened; of a folder, the frame's number.
        number: counts the frames that the source has yielded, from 0.
        name: the file, or `number` as text.
    """

    image: np.ndarray
    seconds: float
    number: int
    name: str


class FrameSource(Protocol):
    """What `watch` asks of a source.

    Attributes:
        live: whether frames come in real time; those that are not asked for in time are lost.
        dropped: frames of a live source that nobody asked for.
        reconnects: how often a live source was opened again.
    """

    live: bool
    dropped: int
    reconnects: int

    def frames(self, every: float) -> Iterator[TimedFrame]:
        """Frames at least `every` seconds apart: of the recording's time, or of the clock's for a live source."""

    def close(self) -> None:
        """Ends the source, from any thread; `frames` then ends too."""


def open_source(address: str, tell: Callable[[str], None] = lambda line: None) -> FrameSource:
    """The source at an address.

    Args:
        address: a folder of images, a video file or an image, a URL (rtsp://, rtmp://, http://, https://, udp://), or a
            webcam's number or device (`0`, `/dev/video0`).
        tell: is given a line when a live source is lost and when it is back.

    Raises:
        ValueError: there is no such file, or it holds no image.
    """
    if address.isdigit():
        return LiveStream(int(address), tell)
    if "://" in address:
        scheme = address.split("://", 1)[0].lower()
        if scheme in ("http", "https") and serves_stills(address):
            return HttpStills(address, tell)
        return LiveStream(address, tell)
    path = Path(address).expanduser()
    if path.is_char_device():
        return LiveStream(str(path), tell)
    if path.is_dir():
        return ImageFiles(sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), path)
    if path.is_file():
        return ImageFiles([path], path) if path.suffix.lower() in IMAGE_SUFFIXES else VideoFile(path)
    raise ValueError(
        f"{address} is no source: wanted a folder of images, a video file, a URL such as rtsp://camera/stream, or a "
        "webcam's number."
    )


class ImageFiles:
    """Images in the order of their names; every one is yielded, whatever the interval."""

    live, dropped, reconnects = False, 0, 0

    def __init__(self, paths: list[Path], source: Path) -> None:
        if not paths:
            raise ValueError(
                f"{source} holds no image; wanted files that end in {', '.join(IMAGE_SUFFIXES)}."
            )
        self._paths = paths
        self._closed = False

    def frames(self, every: float) -> Iterator[TimedFrame]:
        """See `FrameSource.frames`; the interval has no meaning here.

        Raises:
            ValueError: a file is no image.
        """
        for number, path in enumerate(self._paths):
            if self._closed:
                return
            yield TimedFrame(_decode(path.read_bytes(), str(path)), float(number), number, path.name)

    def close(self) -> None:
        """See `FrameSource.close`."""
        self._closed = True


class VideoFile:
    """A recording, as fast as its frames are asked for; frames between two that are due are skipped undecoded."""

    live, dropped, reconnects = False, 0, 0

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closed = False

    def frames(self, every: float) -> Iterator[TimedFrame]:
        """See `FrameSource.frames`. Times are those that the file gives, so that a variable frame rate is kept.

        Raises:
            ValueError: the file holds no frame that can be decoded.
        """
        import cv2

        capture = cv2.VideoCapture(str(self._path))
        try:
            number, due, position = 0, 0.0, -1
            rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
            while not self._closed and capture.grab():
                position += 1
                # Some containers give no times: then the frame rate does.
                seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if seconds <= 0 and position:
                    seconds = position / rate
                if seconds + 1e-6 < due:
                    continue
                found, image = capture.retrieve()
                if not found:
                    continue
                yield TimedFrame(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), seconds, number, str(number))
                number, due = number + 1, seconds + every
            if position < 0 and not self._closed:
                raise ValueError(f"{self._path} holds no frame that OpenCV can decode; wanted a video file.")
        finally:
            capture.release()

    def close(self) -> None:
        """See `FrameSource.close`."""
        self._closed = True


class LiveStream:
    """A network camera or a webcam, read by a thread that keeps its newest frame."""

    live = True

    def __init__(self, address: str | int, tell: Callable[[str], None]) -> None:
        self.dropped = self.reconnects = 0
        self._address, self._tell = address, tell
        self._newest: tuple[np.ndarray, float] | None = None
        self._changed = threading.Condition()
        self._closed = threading.Event()

    def frames(self, every: float) -> Iterator[TimedFrame]:
        """See `FrameSource.frames`; waits while the stream is lost."""
        started, number = time.monotonic(), 0
        reader = threading.Thread(target=self._read, name="live stream", daemon=True)
        reader.start()
        try:
            while not self._closed.is_set():
                due = time.monotonic() + every
                with self._changed:
                    self._changed.wait_for(lambda: self._newest is not None or self._closed.is_set())
                    newest, self._newest = self._newest, None
                if newest is None:
                    return
                image, taken = newest
                yield TimedFrame(image, taken - started, number, str(number))
                number += 1
                self._closed.wait(max(0.0, due - time.monotonic()))
        finally:
            self.close()
            reader.join(2 * READ_SECONDS)

    def close(self) -> None:
        """See `FrameSource.close`."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def _read(self) -> None:
        pause = FIRST_PAUSE
        ever, lost = False, False
        while not self._closed.is_set():
            capture = self._open()
            try:
                while not self._closed.is_set():
                    found, image = capture.read() if capture.isOpened() else (False, None)
                    if not found or image is None:
                        break
                    if lost:
                        self._tell(f"{self._address} is back")
                        self.reconnects += ever
                    ever, lost, pause = True, False, FIRST_PAUSE
                    with self._changed:
                        self.dropped += self._newest is not None
                        # Converted here, so that the reader's pace is the thread's and not the model's.
                        self._newest = np.ascontiguousarray(image[..., ::-1]), time.monotonic()
                        self._changed.notify_all()
            finally:
                with contextlib.suppress(Exception):
                    capture.release()
            if not self._closed.is_set():
                if not lost:
                    self._tell(f"{self._address} {'is lost' if ever else 'does not answer'}; trying again")
                lost = True
                self._closed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _open(self) -> Any:
        import cv2

        if isinstance(self._address, int) or "://" not in self._address:
            return cv2.VideoCapture(self._address)
        limits = [
            cv2.CAP_PROP_OPEN_TIMEOUT_MSEC,
            int(1000 * OPEN_SECONDS),
            cv2.CAP_PROP_READ_TIMEOUT_MSEC,
            int(1000 * READ_SECONDS),
        ]
        return cv2.VideoCapture(self._address, cv2.CAP_FFMPEG, limits)


class HttpStills:
    """A camera that serves its newest picture at a URL; it is fetched whenever a frame is due."""

    live, dropped = True, 0

    def __init__(self, url: str, tell: Callable[[str], None]) -> None:
        self.reconnects = 0
        self._url, self._tell = url, tell
        self._closed = threading.Event()

    def frames(self, every: float) -> Iterator[TimedFrame]:
        """See `FrameSource.frames`; a fetch that fails is tried again, at growing intervals."""
        started, number, pause, lost = time.monotonic(), 0, FIRST_PAUSE, False
        with httpx.Client(timeout=READ_SECONDS, follow_redirects=True) as client:
            while not self._closed.is_set():
                due = time.monotonic() + every
                try:
                    image = _decode(_fetch(client, self._url), self._url)
                except (httpx.HTTPError, ValueError) as error:
                    if not lost:
                        self._tell(f"{self._url} is lost ({error or type(error).__name__}); trying again")
                    lost = True
                    self._closed.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
                    continue
                if lost:
                    self._tell(f"{self._url} is back")
                    self.reconnects += 1
                pause, lost = FIRST_PAUSE, False
                yield TimedFrame(image, time.monotonic() - started, number, str(number))
                number += 1
                self._closed.wait(max(0.0, due - time.monotonic()))

    def close(self) -> None:
        """See `FrameSource.close`."""
        self._closed.set()


def serves_stills(url: str) -> bool:
    """Whether a URL gives a picture, and not a stream; False where it does not answer."""
    with (
        contextlib.suppress(httpx.HTTPError),
        httpx.stream("GET", url, timeout=OPEN_SECONDS, follow_redirects=True) as answer,
    ):
        return answer.headers.get("content-type", "").startswith("image/")
    return False


def _fetch(client: httpx.Client, url: str) -> bytes:
    with client.stream("GET", url) as answer:
        answer.raise_for_status()
        data = bytearray()
        for part in answer.iter_bytes():
            data += part
            if len(data) > MAX_STILL_BYTES:
                raise ValueError(f"the picture has more than {MAX_STILL_BYTES} bytes")
        return bytes(data)


def _decode(data: bytes, name: str) -> np.ndarray:
    try:
        with Image.open(BytesIO(data)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ValueError(f"{name} is no image that Pillow can read: {error}") from None
