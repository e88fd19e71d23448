"""The picture of `backdrop split --out`."""

import re

import numpy as np
import pytest
from PIL import Image

from backdrop.panels import COLUMNS, PanelRow, split_panels
from backdrop.processing.detections_backdrop import Detections


def row(size: int = 168, patch_size: int = 14, found: int = 2, **changes) -> PanelRow:
    grid = size // patch_size
    generator = np.random.default_rng(0)
    mask = np.zeros((size, size), dtype=bool)
    mask[size // 4 : size // 2, size // 4 : size // 2] = True
    owned = np.zeros((grid, grid), dtype=bool)
    owned[grid // 4 : grid // 2, grid // 4 : grid // 2] = True
    box = [size / 4, size / 4, size / 2, size / 2]
    fields = {
        "name": "a.png",
        "original": Image.new("RGB", (300, 200), (120, 130, 140)),
        "detections": Detections(
            xyxy=np.array([box] * found, dtype=np.float32).reshape(found, 4),
            confidence=np.linspace(0.9, 0.5, found, dtype=np.float32),
            class_id=np.arange(found),
            names={i: f"class {i}" for i in range(5)},
        ),
        "model_image": generator.integers(0, 256, (size, size, 3), dtype=np.uint8),
        "pixel_mask": mask,
        "groups": [("background", ~owned.ravel()), ("object", owned.ravel())],
        "patch_size": patch_size,
    }
    return PanelRow(**fields | changes)


def test_one_row():
    sheet = split_panels([row()])
    assert sheet.mode == "RGB"
    assert sheet.width > len(COLUMNS) * 336  # 168 px are drawn at twice their size
    pixels = np.asarray(sheet)
    assert (pixels[:20] == 255).all() and (pixels[:, :20] == 255).all() and (pixels[:, -20:] == 255).all()


def test_rows_of_different_sizes_and_nothing_found():
    one = split_panels([row(336)])
    sheet = split_panels([row(336), row(168, found=0), row(56, 7)])
    assert sheet.width == one.width and sheet.height > 2 * one.height
    np.testing.assert_array_equal(
        np.asarray(sheet), np.asarray(split_panels([row(336), row(168, found=0), row(56, 7)]))
    )


def test_groups_change_the_patch_panel():
    """Background, object, both and neither look different."""
    patches = (168 // 14) ** 2
    nothing, everything = np.zeros(patches, dtype=bool), np.ones(patches, dtype=bool)
    gray = np.full((168, 168, 3), 128, dtype=np.uint8)
    choices = (
        [],
        [("background", everything)],
        [("object", everything)],
        [("background", everything), ("object", everything)],
    )
    sheets = [np.asarray(split_panels([row(model_image=gray, groups=list(groups))])) for groups in choices]
    for i, first in enumerate(sheets):
        for second in sheets[:i]:
            assert (first != second).any(axis=2).sum() > 10_000
    with_empty = split_panels(
        [row(model_image=gray, groups=[("object", everything), ("background", nothing)])]
    )
    np.testing.assert_array_equal(np.asarray(with_empty), sheets[2])


def test_the_remainder_is_in_no_patch():
    sheet = split_panels([row(100, 14)])  # 7 x 7 patches, two rows and columns of pixels left over
    assert sheet.height > 400


def test_many_overlapping_labels_and_a_long_name():
    split_panels([row(found=5, name="a very long name " * 40)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_image": np.zeros((168, 160, 3), np.uint8)}, "model_image has shape (168, 160, 3)"),
        ({"model_image": np.zeros((168, 168, 3), np.float32)}, "dtype float32"),
        ({"pixel_mask": np.zeros((12, 12), bool)}, "pixel_mask has shape (12, 12)"),
        ({"groups": [("fresh", np.zeros(144, bool))]}, "kind is 'fresh'"),
        ({"groups": [("object", np.zeros(576, bool))]}, "shape (576,); wanted (144,)"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        split_panels([row(**changes)])


def test_no_rows():
    with pytest.raises(ValueError, match="rows is empty"):
        split_panels([])
