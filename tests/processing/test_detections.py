"""Detections as values."""

import numpy as np
import pytest

from backdrop.processing.detections_backdrop import Detections


class TestDetections:
    def test_boxes_cover_every_pixel_they_touch(self):
        found = Detections(
            xyxy=np.array([[1.2, 0.0, 3.0, 2.5], [6.0, 6.0, 8.0, 8.0]], dtype=np.float32),
            confidence=np.array([0.5, 0.9], dtype=np.float32),
            class_id=np.array([1, 0]),
            names={0: "a", 1: "b"},
        )
        wanted = np.zeros((8, 8), dtype=bool)
        wanted[0:3, 1:3] = True
        wanted[6:8, 6:8] = True
        np.testing.assert_array_equal(found.combined_mask(8), wanted)
        best = found.most_confident()
        assert best.class_id.tolist() == [0] and best.xyxy.shape == (1, 4)

    def test_masks_are_preferred_to_boxes(self):
        masks = np.zeros((2, 8, 8), dtype=bool)
        masks[0, 1, 1] = masks[1, 2, 2] = True
        found = Detections(
            xyxy=np.array([[0, 0, 8, 8]] * 2, dtype=np.float32),
            confidence=np.array([0.9, 0.5], dtype=np.float32),
            class_id=np.array([0, 0]),
            names={0: "a"},
            masks=masks,
        )
        assert found.combined_mask(8).sum() == 2
        assert found.most_confident().masks.shape == (1, 8, 8)
        with pytest.raises(ValueError, match="size is 9"):
            found.combined_mask(9)

    def test_nothing_found(self):
        nothing = Detections(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), {0: "a"}
        )
        assert not nothing.combined_mask(8).any()
        assert nothing.most_confident() is nothing
