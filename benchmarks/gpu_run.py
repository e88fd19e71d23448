"""What the parts of `backdrop bench gpu` share: the run, the bench, a stand-in for a detector that is not installed."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backdrop.data.atomic import write_atomically

from . import contenders
from .contenders import (
    Bench,
)
from .gpu_report import render_markdown
from .planted_detector import PlantedDetector, build_detector
from .report import write_json_atomically


@dataclass
class GpuRun:
    """What one run knows: where it runs, what it has found, and when it has to end."""

    device: str
    shape: str
    out: Path
    deadline: float
    results: dict = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        """Until the deadline; negative behind it."""
        return self.deadline - time.monotonic()

    @property
    def dtype(self) -> str:
        """What the parts that time something run in."""
        return "bfloat16" if torch.device(self.device).type == "cuda" else "float32"

    def write(self) -> None:
        """Writes what is known so far, as JSON and as a page."""
        write_json_atomically(self.out / "gpu.json", self.results)
        write_atomically(self.out / "gpu.md", render_markdown(self.results))


def free() -> None:
    """Gives memory back between parts."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class NoDetector:
    """Stands in for a detector where ultralytics is not installed: planted boxes, no network."""

    names = {0: "object"}

    def detect(self, images: Sequence[np.ndarray], **options: Any) -> list:
        """Nothing is looked at; `PlantedDetector` puts the planted boxes in place."""
        return [None] * len(images)


def build_bench(shape: str, device: str, dtype: str) -> Bench:
    """As `contenders.build_bench`, on machines without ultralytics too."""
    try:
        detector = build_detector(device)
    except ImportError:
        detector = PlantedDetector(NoDetector())
    return contenders.build_bench(shape, device, dtype, detector)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest absolute difference."""
    return float((a.float() - b.float()).abs().max())
