"""Any detector: what one must be able to do, and which class reads a name, a checkpoint or a saved one."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .detections_backdrop import Detections
from .detector_backdrop import ObjectDetector
from .detector_files_backdrop import DESCRIPTION_NAME, DETECTOR_FILES, TRANSFORMERS
from .transformers_detector_backdrop import TransformersDetector

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Detector(Protocol):
    """Tells objects from background. An object of one's own with these three methods and values will do.

    Attributes:
        names: class names by class id.
        source: what it was made from, for display.
    """

    names: dict[int, str]
    source: str

    def detect(
        self,
        images: Sequence[np.ndarray],
        *,
        confidence: float = 0.25,
        classes: Sequence[int | str] | None = None,
    ) -> list[Detections]:
        """Boxes, masks (or None), classes and confidences of each image, uint8 `[h, w, 3]` RGB."""

    def save(self, folder: str | os.PathLike) -> list[str]:
        """Writes what `load_saved_detector` reads; the files' names, [] where a folder cannot hold this detector."""


def load_detector(name: str, device: str = "cpu") -> Detector:
    """The detector of a name or path.

    Args:
        name: an ultralytics checkpoint (`"yolov8n.pt"`, `"rtdetr-l.pt"`, a `.pt` or `.yaml` file); a folder or Hub id of an
            object detector of transformers (`"PekingU/rtdetr_v2_r18vd"`); or a folder that holds a saved detector.
        device: where it runs.

    Raises:
        ValueError: it is none of these, or cannot be used.
        OSError: it cannot be read or downloaded.
        ImportError: a package that it needs is not installed.
    """
    if all(Path(name, file).is_file() for file in DETECTOR_FILES):
        return load_saved_detector(name, device)
    if Path(name).is_dir() or is_hub_id(name):
        return TransformersDetector.from_name_or_path(name, device=device)
    return ObjectDetector.from_name_or_path(name, device=device)


def load_saved_detector(folder: str | os.PathLike, device: str = "cpu") -> Detector:
    """The detector that `save` wrote into a folder. Reads no pickle; errors as of the class that wrote it."""
    path = Path(folder, DESCRIPTION_NAME)
    kind = None
    if path.is_file():
        try:
            kind = json.loads(path.read_text(encoding="utf-8")).get("kind")
        except (ValueError, AttributeError):
            kind = None  # the class below says what is wrong with it
    cls = TransformersDetector if kind == TRANSFORMERS else ObjectDetector
    return cls.from_folder(folder, device=device)


def is_hub_id(name: str) -> bool:
    """Whether a detector's name is that of a repository on the Hub: no path of this machine, no checkpoint's file."""
    return (
        bool(_HUB_ID.fullmatch(name))
        and Path(name).suffix not in (".pt", ".yaml")
        and not Path(name).exists()
    )
