"""A detector for the fast tests."""

import numpy as np

from backdrop.processing.detections_backdrop import Detections


class RedDetector:
    """Stands in for a trained detector: one box around whatever is strongly red."""

    names = {0: "red"}
    source = "red pixels"

    def __init__(self):
        self.calls = 0

    def detect(self, images, *, confidence=0.25, classes=None, **kwargs):

        self.calls += len(images)
        found = []
        for image in images:
            red = (image[..., 0] > 200) & (image[..., 1] < 60) & (image[..., 2] < 60)
            rows, columns = np.nonzero(red)
            boxes = (
                [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
                if len(rows)
                else np.zeros((0, 4))
            )
            count = len(boxes)
            found.append(
                Detections(
                    xyxy=np.array(boxes, dtype=np.float32).reshape(count, 4),
                    confidence=np.full(count, 0.9, dtype=np.float32),
                    class_id=np.zeros(count, dtype=np.int64),
                    names=self.names,
                    masks=None,
                )
            )
        return found

    def save(self, folder):
        return []
