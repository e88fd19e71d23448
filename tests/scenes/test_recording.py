"""Made recordings of a fixed camera, and characters planted into their frames."""

import os

import numpy as np
import pytest

from backdrop.benchmarks.camera import default_processor, run_camera
from backdrop.scenes import recording


def test_the_made_recording_is_deterministic_and_mostly_still(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        recording.write_recording(tmp_path / name, 12, seed, size=(160, 120))
    files = sorted(os.listdir(tmp_path / "a"))
    a, b, c = ([(tmp_path / name / file).read_bytes() for file in files] for name in "abc")
    assert len(files) == 12 and a == b and a != c and len(set(a)) == 12
    processor = default_processor(112, 14)
    figures = run_camera(tmp_path / "a", processor=processor, tolerance=10)
    assert 0.5 < figures["static_share"] < 1.0


def test_a_planted_character_changes_its_strokes_only():
    image = np.full((40, 40, 3), 100, dtype=np.uint8)
    planted = recording.plant_character(image, (10, 20), "8", 60)
    rows, columns = np.nonzero((planted != image).any(axis=-1))
    assert (rows.min(), rows.max(), columns.min()) == (10, 17, 20) and columns.max() < 28
    assert (planted[rows, columns] == 160).all() and (image == 100).all()
    bright = recording.plant_character(np.full_like(image, 250), (0, 0), "A", 60)
    assert bright.min() == 190
    assert not np.array_equal(planted, recording.plant_character(image, (10, 20), "3", 60))
    with pytest.raises(ValueError, match="wanted one inside 40 x 40"):
        recording.plant_character(image, (36, 20), "8", 60)
    with pytest.raises(ValueError, match="wanted one character that leaves ink"):
        recording.plant_character(image, (0, 0), " ", 60)
