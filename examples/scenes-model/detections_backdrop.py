"""What a detector found in one image, as a value."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found in one image of `S x S` pixels, in descending order of confidence.

    Attributes:
        xyxy: Boxes, float32 `[N, 4]`: left, top, right, bottom in pixels of the image.
        confidence: float32 `[N]` in 0 to 1.
        class_id: int64 `[N]`, keys of `names`.
        names: The detector's class names by class id.
        masks: Instance masks, bool `[N, S, S]`, of a segmentation model; None for a detection model.
    """

    xyxy: np.ndarray
    confidence: np.ndarray
    class_id: np.ndarray
    names: dict[int, str]
    masks: np.ndarray | None = None

    def combined_mask(self, size: int) -> np.ndarray:
        """The pixels that belong to any object.

        Args:
            size: `S`, the side of the image in pixels.

        Returns:
            bool `[S, S]`: the union of the instance masks, or of the boxes (every pixel that a box touches)
            where the detector has no masks.

        Raises:
            ValueError: If the instance masks have another size.
        """
        if self.masks is not None:
            if self.masks.shape[1:] != (size, size):
                raise ValueError(f"size is {size}, but the instance masks are {self.masks.shape[1:]}")
            return self.masks.any(axis=0)
        mask = np.zeros((size, size), dtype=bool)
        for left, top, right, bottom in self.xyxy:
            vertical = slice(max(0, int(np.floor(top))), max(0, int(np.ceil(bottom))))
            horizontal = slice(max(0, int(np.floor(left))), max(0, int(np.ceil(right))))
            mask[vertical, horizontal] = True
        return mask

    def most_confident(self) -> "Detections":
        """The most confident detection alone; unchanged where nothing was found."""
        if len(self.confidence) == 0:
            return self
        best = int(np.argmax(self.confidence))
        return self.select(slice(best, best + 1))

    def select(self, which: slice | np.ndarray) -> "Detections":
        """The detections that a slice, a bool `[N]` or an array of indices picks."""
        return Detections(
            xyxy=self.xyxy[which],
            confidence=self.confidence[which],
            class_id=self.class_id[which],
            names=self.names,
            masks=None if self.masks is None else self.masks[which],
        )
