"""What each patch of a scene shows: the dense labels that the vision tower learns.

While a scene is drawn, its parts are marked on maps of one class per design pixel (`ClassMaps`), one map for each *head*:
the character, the colour and the thing. `ClassMaps.patches` turns the maps into one class per patch and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .drawing import COLOUR_NAMES, DESIGN_SIZE, Box

GLYPHS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A patch that holds a part of an object is labelled with the object even where more of it is background.
_OBJECT_WEIGHT = 3


@dataclass(frozen=True)
class SceneObject:
    """One object: its detector class name and its tight box in pixels, half-open ``(x0, y0, x1, y1)``."""

    name: str
    xyxy: Box


@dataclass(frozen=True)
class Things:
    """Names of the classes of the head "thing": what backgrounds show, then what frames add to them."""

    background: tuple[str, ...]
    objects: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All names; class 0 is "none", class i + 1 is the i-th of them."""
        return self.background + self.objects

    def dense_labels(self) -> dict[str, int]:
        """Number of classes of each head. Class 0 of every head is "none"."""
        return {
            "glyph": len(GLYPHS) + 1,
            "colour": len(COLOUR_NAMES) + 1,
            "thing": len(self.names) + 1,
            "anchor": 2,  # whether an object's centre lies in the patch
            # Where a patch is, 1 to 12: a tower that does not keep it leaves the language model without left and right.
            "column": 13,
            "row": 13,
        }


class ClassMaps:
    """One class per design pixel and head; later marks cover earlier ones."""

    def __init__(self, things: Things, maps: dict[str, np.ndarray] | None = None) -> None:
        self._things = things
        self._classes = things.dense_labels()
        if maps is None:
            maps = {head: np.zeros((DESIGN_SIZE, DESIGN_SIZE), np.int64) for head in self._classes}
        self._maps = maps

    def copy(self) -> ClassMaps:
        """Maps of their own with the same marks."""
        return ClassMaps(self._things, {head: array.copy() for head, array in self._maps.items()})

    def mark(self, xyxy: Box, thing: str | None = None, colour: str | None = None) -> None:
        """Marks a box (design pixels, half-open) as a thing and as a colour; a thing without one has no colour."""
        x0, y0, x1, y1 = xyxy
        if thing is not None:
            self._maps["thing"][y0:y1, x0:x1] = self._things.names.index(thing) + 1
            self._maps["colour"][y0:y1, x0:x1] = 0
        if colour is not None:
            self._maps["colour"][y0:y1, x0:x1] = COLOUR_NAMES.index(colour) + 1

    def mark_text(self, x: int, y: int, text: str, cell: tuple[int, int]) -> None:
        """Marks a character a cell (width, height), from design pixel (x, y) to the right."""
        for i, character in enumerate(text):
            if character in GLYPHS:
                left = x + i * cell[0]
                self._maps["glyph"][y : y + cell[1], left : left + cell[0]] = GLYPHS.index(character) + 1

    def patches(self, objects: Sequence[SceneObject], size: int, patch_size: int) -> dict[str, np.ndarray]:
        """The commonest class but "none" of each patch where it fills a quarter of it, else "none".

        For the head "thing" an object counts `_OBJECT_WEIGHT` times its area.

        Args:
            objects: those of the scene; their boxes are in pixels of an image of `size`.
            size: side of the image, pixels.
            patch_size: side of a patch, pixels.

        Returns:
            int64 `[P]` for each head, patches in row-major order.
        """
        step = patch_size * DESIGN_SIZE // size
        side = DESIGN_SIZE // step
        labels = {}
        for head, classes in self._classes.items():
            pixels = self._maps[head].reshape(side, step, side, step).swapaxes(1, 2).reshape(side * side, -1)
            offsets: np.ndarray = np.arange(side * side)[:, None] * classes
            counts = np.bincount((pixels + offsets).ravel(), minlength=side * side * classes)
            counts = counts.reshape(side * side, classes)
            if head == "thing":
                counts[:, len(self._things.background) + 1 :] *= _OBJECT_WEIGHT
            best = counts[:, 1:].argmax(axis=1) + 1
            enough = np.take_along_axis(counts, best[:, None], axis=1)[:, 0] * 4 >= step * step
            labels[head] = np.where(enough, best, 0)
        labels["row"], labels["column"] = (
            place.ravel() * 12 // side + 1 for place in np.indices((side, side))
        )
        for item in objects:
            x0, y0, x1, y1 = item.xyxy
            labels["anchor"][(y0 + y1) // 2 // patch_size * side + (x0 + x1) // 2 // patch_size] = 1
        return labels


def box_patches(
    boxes_xyxy: Sequence[Sequence[float]], size: int = 168, patch_size: int = 14, grow: int = 0
) -> np.ndarray:
    """Which patches the boxes touch: bool ``[P]``, row-major.

    `boxes_xyxy` are half-open boxes in pixels; `grow` widens every box by that many whole patches on each side.
    """
    side = size // patch_size
    mask: np.ndarray = np.zeros((side, side), dtype=bool)
    for x0, y0, x1, y1 in boxes_xyxy:
        left, top = (max(0, int(v // patch_size) - grow) for v in (x0, y0))
        right, bottom = (max(0, int(-(-v // patch_size)) + grow) for v in (x1, y1))
        mask[top:bottom, left:right] = True
    return mask.ravel()
