"""Detectors that several of the files beside this one share."""

import pytest
from optional import require_ultralytics
from tiny_yolo import HEADS, tiny_yaml

from backdrop.processing.detector_backdrop import ObjectDetector


@pytest.fixture(scope="session")
def tiny_detectors(tmp_path_factory) -> dict[str, ObjectDetector]:
    """A detection and a segmentation model by task, with random weights."""
    require_ultralytics()
    folder = tmp_path_factory.mktemp("tiny")
    return {task: ObjectDetector.from_name_or_path(str(tiny_yaml(folder, task))) for task in HEADS}
