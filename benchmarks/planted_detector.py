"""A detector that takes its real time and answers what a benchmark drew: random weights find nothing of use."""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backdrop.processing.detections_backdrop import Detections
from backdrop.processing.detector_backdrop import ObjectDetector

from .frames import Frame


class Detector(Protocol):
    """What a processor asks of a detector to split images."""

    names: dict[int, str]

    @property
    def detect(self) -> Callable[..., list[Detections]]:
        """See `ObjectDetector.detect`."""


class PlantedDetector:
    """Runs a detector for its time, and answers with planted boxes in place of what random weights find."""

    def __init__(self, detector: Detector):
        self._detector = detector
        self._boxes: dict[bytes, tuple[float, float, float, float] | None] = {}

    @property
    def names(self) -> dict[int, str]:
        """Of the classes, by id: those of the detector that runs."""
        return self._detector.names

    def plant(self, frames: Sequence[Frame], images: Sequence[np.ndarray]) -> None:
        """The images that it may be asked about, in any order and as often as the processor likes.

        Args:
            images: the frames at the model's geometry, uint8 `[S, S, 3]`.
        """
        self._boxes = {image.tobytes(): frame.box for frame, image in zip(frames, images, strict=True)}

    def detect(self, images: Sequence[np.ndarray], **options: Any) -> list[Detections]:
        """As `ObjectDetector.detect`."""
        self._detector.detect(images, **options)
        asked = [image.tobytes() for image in images]
        unknown = sum(image not in self._boxes for image in asked)
        if unknown:
            raise RuntimeError(f"The detector got {unknown} images that were not planted; wanted none.")
        return [
            Detections(
                xyxy=np.array([] if box is None else [box], dtype=np.float32).reshape(-1, 4),
                confidence=np.full(int(box is not None), 0.9, dtype=np.float32),
                class_id=np.zeros(int(box is not None), dtype=np.int64),
                names=self._detector.names,
            )
            for box in (self._boxes[image] for image in asked)
        ]


def build_yolo(device: str) -> ObjectDetector:
    """YOLOv8n with random weights, from the description that ultralytics ships; nothing is downloaded."""
    found = importlib.util.find_spec("ultralytics")
    if found is None or found.origin is None:
        raise ImportError(
            "The benchmark runs a detector, but ultralytics is not installed: pip install ultralytics"
        )
    description = Path(found.origin).parent / "cfg" / "models" / "v8" / "yolov8.yaml"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "yolov8n.yaml")  # the scale, n, is read from the file's name
        shutil.copyfile(description, path)
        return ObjectDetector.from_name_or_path(str(path), device=device)


def build_detector(device: str) -> PlantedDetector:
    """The network of `build_yolo`, and planted answers."""
    return PlantedDetector(build_yolo(device))
