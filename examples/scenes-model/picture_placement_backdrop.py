"""Where a picture lies in the model's square: what of it is cut off, which patches are padding, what a detector sees.

Pure functions of sizes and arrays. `S` is the side of the image as the model sees it, `P` the number of patches of its grid.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from PIL import Image

from .detections_backdrop import Detections

# A detector's view of a picture has at least this share of `S` on its shorter side: of a picture of one line of pixels
# there would be nothing to look at.
SHORTEST_VIEW = 1 / 16
# Sides are rounded to whole pixels, which changes the ratio of the two scales a little.
EQUAL_SCALES = 0.02


@dataclass(frozen=True)
class PicturePlacement:
    """The rectangle that a whole picture takes in the model's square, in exact numbers.

    Attributes:
        width, height: of the picture as it came, pixels.
        side: `S`.
        left, top, right, bottom: of the whole picture in pixels of the square. They lie beyond 0 to `S` where the picture
            is cropped, and inside where it is padded.
    """

    width: int
    height: int
    side: int
    left: Fraction
    top: Fraction
    right: Fraction
    bottom: Fraction

    @property
    def lost(self) -> tuple[float, float]:
        """The shares of the picture's width and height that are cut off, 0-1 each."""
        left, top, right, bottom = self._visible
        return (
            float(1 - (right - left) / (self.right - self.left)),
            float(1 - (bottom - top) / (self.bottom - self.top)),
        )

    @property
    def padded(self) -> float:
        """The share of the square that is padding, 0-1."""
        left, top, right, bottom = self._visible
        return float(1 - (right - left) * (bottom - top) / self.side**2)

    @property
    def kept_box(self) -> tuple[float, float, float, float]:
        """The part of the picture that the model sees: left, top, right, bottom in pixels of the picture."""
        left, top, right, bottom = self._visible
        across, down = self._scales
        return (
            float((left - self.left) / across),
            float((top - self.top) / down),
            float((right - self.left) / across),
            float((bottom - self.top) / down),
        )

    def picture_patches(self, patch_size: int) -> np.ndarray:
        """The patches that show some of the picture, bool `[P]`, at least one; the others are padding as a whole.

        Args:
            patch_size: pixels.
        """
        grid = self.side // patch_size
        left, top, right, bottom = (value / patch_size for value in self._visible)
        patches: np.ndarray = np.zeros((grid, grid), dtype=bool)
        patches[math.floor(top) : math.ceil(bottom), math.floor(left) : math.ceil(right)] = True
        return patches.reshape(-1)

    # ---- what a detector sees

    def view(self, pixels: np.ndarray) -> np.ndarray:
        """The picture alone, without bars and at its own ratio of sides, for a detector.

        Args:
            pixels: uint8 `[S, S, 3]`, the model's square.

        Returns:
            uint8 `[h, w, 3]`, h and w at most `S`; the given array where the picture fills it undistorted.
        """
        left, top, right, bottom = self._view_box
        width, height = self._view_size
        part = pixels[top:bottom, left:right]
        if (width, height) != (right - left, bottom - top):
            return np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.BICUBIC))
        return pixels if part.shape == pixels.shape else np.ascontiguousarray(part)

    def to_square(self, found: Detections) -> Detections:
        """Detections of a `view`, in the geometry of the model's square.

        Args:
            found: boxes in pixels of the view, instance masks `[N, h, w]` of its size.

        Returns:
            Boxes in pixels of the square, and masks `[N, S, S]`.
        """
        left, top, right, bottom = self._view_box
        width, height = self._view_size
        if (width, height) == (self.side, self.side):
            return found
        scale = np.array([(right - left) / width, (bottom - top) / height] * 2, dtype=np.float32)
        masks: np.ndarray | None = None
        if found.masks is not None:
            masks = np.zeros((len(found.masks), self.side, self.side), dtype=bool)
            rows: np.ndarray = (np.arange(bottom - top) * height) // (bottom - top)
            columns: np.ndarray = (np.arange(right - left) * width) // (right - left)
            masks[:, top:bottom, left:right] = found.masks[:, rows[:, None], columns]
        xyxy = found.xyxy * scale + np.array([left, top] * 2, dtype=np.float32)
        return Detections(xyxy.astype(np.float32), found.confidence, found.class_id, found.names, masks)

    @property
    def _visible(self) -> tuple[Fraction, Fraction, Fraction, Fraction]:
        """The part of the rectangle that lies in the square."""
        side = Fraction(self.side)
        return (
            max(self.left, Fraction(0)),
            max(self.top, Fraction(0)),
            min(self.right, side),
            min(self.bottom, side),
        )

    @property
    def _scales(self) -> tuple[Fraction, Fraction]:
        """Pixels of the square for each pixel of the picture, across and down."""
        return (self.right - self.left) / self.width, (self.bottom - self.top) / self.height

    @property
    def _view_box(self) -> tuple[int, int, int, int]:
        """The whole pixels of the square that a detector sees."""
        left, top, right, bottom = self._visible
        (first_column, last_column), (first_row, last_row) = self._span(left, right), self._span(top, bottom)
        return first_column, first_row, last_column, last_row

    def _span(self, start: Fraction, end: Fraction) -> tuple[int, int]:
        """Whole pixels from `start` to `end`, some more where they are too few."""
        first, last = math.floor(start), math.ceil(end)
        length = max(last - first, math.ceil(self.side * SHORTEST_VIEW))
        first = min(max(0, first - (length - (last - first)) // 2), self.side - length)
        return first, first + length

    @property
    def _view_size(self) -> tuple[int, int]:
        """Width and height of a view: one of the two is shrunk where the picture is stretched."""
        left, top, right, bottom = self._view_box
        width, height = right - left, bottom - top
        across, down = self._scales
        ratio = across / down
        shortest = math.ceil(self.side * SHORTEST_VIEW)
        if ratio < 1 - EQUAL_SCALES:
            height = min(height, max(shortest, round(height * ratio)))
        elif ratio > 1 + EQUAL_SCALES:
            width = min(width, max(shortest, round(width / ratio)))
        return width, height
