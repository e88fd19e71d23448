"""Tiny YOLO models with random weights, made through ultralytics."""

import json
from pathlib import Path

import numpy as np

from backdrop.processing.detections_backdrop import Detections

BACKBONE = [
    [-1, 1, "Conv", [64, 3, 2]],
    [-1, 1, "Conv", [128, 3, 2]],
    [-1, 1, "C2f", [128, True]],
    [-1, 1, "Conv", [256, 3, 2]],
    [-1, 1, "C2f", [256, True]],
    [-1, 1, "Conv", [512, 3, 2]],
    [-1, 1, "C2f", [512, True]],
    [-1, 1, "Conv", [1024, 3, 2]],
    [-1, 1, "SPPF", [1024, 5]],
]

NECK = [
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
    [[-1, 6], 1, "Concat", [1]],
    [-1, 1, "C2f", [512]],
    [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
    [[-1, 4], 1, "Concat", [1]],
    [-1, 1, "C2f", [256]],
    [-1, 1, "Conv", [256, 3, 2]],
    [[-1, 11], 1, "Concat", [1]],
    [-1, 1, "C2f", [512]],
    [-1, 1, "Conv", [512, 3, 2]],
    [[-1, 8], 1, "Concat", [1]],
    [-1, 1, "C2f", [1024]],
]

HEADS = {
    "detect": ["Detect", ["nc"]],
    "segment": ["Segment", ["nc", 8, 64]],
    "rtdetr": ["RTDETRDecoder", ["nc", 32, 20, 2, 2, 1]],  # width, queries, points, heads, layers
}

EVERYTHING = 0.0  # random weights are confident of nothing


def tiny_yaml(folder: Path, task: str, **more) -> Path:
    """A model description of four classes; a task of `HEADS`."""
    head = NECK + [[[14, 17, 20], 1, *HEADS[task]]]
    fields = {
        "nc": 4,
        "depth_multiple": 0.33,
        "width_multiple": 0.0625,
        "backbone": BACKBONE,
        "head": head,
        **more,
    }
    path = folder / f"tiny-{task}.yaml"
    path.write_text(json.dumps(fields))  # JSON is YAML
    return path


def random_images(count: int, size: int) -> list[np.ndarray]:
    """uint8 `[size, size, 3]` each."""
    generator = np.random.default_rng(size)
    return [generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]


def assert_equal_detections(first: list[Detections], second: list[Detections]) -> None:
    """Equal to the last bit."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for field in ("xyxy", "confidence", "class_id"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        assert (a.masks is None) == (b.masks is None)
        if a.masks is not None:
            np.testing.assert_array_equal(a.masks, b.masks)
