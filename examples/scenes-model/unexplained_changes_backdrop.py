"""What a patch that no longer shows its reference is doing: passing by, drifting, or standing there as something else.

Something that moves in front of a background comes and goes: its patches change again while it is there, and what it uncovers is the
background. Slow light changes a patch little by little. What is neither, a change at once that stays as it is, speaks of another
background: another sign on the same wall. Only a detector can tell it from a person who sits down between two frames.
"""

import numpy as np

from .patch_groups_backdrop import grid_side, grow_patches
from .staleness_backdrop import reusable_patches

SHOWS, JUMPED, MOVES, DRIFTED = range(4)
REMEMBERED = 3  # frames with unexplained changes that are kept, to see whether a change stays
RESTLESS = 0.3  # a patch that changes in this share of frames comes and goes
MOTION_MEMORY = 60  # frames for which a patch in which something moved explains changes around it
MANY_JUMPS = (
    3  # so often may a patch turn into something else; one that does it more often comes and goes (a clock)
)
NEARBY = 3  # patches: what moves explains changes so far around it


class ChangeWatch:
    """Watches the patches of one background. Not thread-safe.

    Args:
        patches: `P`.
        patch_size: pixels.
    """

    def __init__(self, patches: int, patch_size: int):
        self._patch_size = patch_size
        self._state: np.ndarray = np.full(patches, SHOWS, dtype=np.uint8)
        self._since_motion: np.ndarray = np.full(patches, MOTION_MEMORY + 1, dtype=np.int32)  # frames
        self._jumps: np.ndarray = np.zeros(patches, dtype=np.int32)
        self._was_stale: np.ndarray = np.zeros(patches, dtype=bool)
        self._seen: list[tuple[np.ndarray, np.ndarray]] = []  # frame [S, S, 3], its unexplained patches [P]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory."""
        return (
            self._state.nbytes
            + self._since_motion.nbytes
            + sum(image.nbytes + mask.nbytes for image, mask in self._seen)
        )

    def branch(self) -> "ChangeWatch":
        """A watch of another background of the same place: it knows where things move."""
        other = ChangeWatch(len(self._state), self._patch_size)
        other._since_motion, other._jumps = self._since_motion.copy(), self._jumps.copy()
        return other

    def unexplained(
        self, stale: np.ndarray, unchanged: np.ndarray, restless: np.ndarray, objects: np.ndarray
    ) -> np.ndarray:
        """Takes in one frame; the patches of it whose change nothing explains, bool `[P]`.

        Args:
            stale: bool `[P]`, patches that the reference owns and does not show.
            unchanged: bool `[P]`, patches that show what they showed in the frame before.
            restless: float32 `[P]`, the share of frames in which each patch changed, of late.
            objects: bool `[P]`, where a detector found objects that have not changed since.
        """
        begins = self._state == SHOWS
        # What moves enters some patches and leaves others; what is replaced (a third sign) fills the same ones.
        border = grow_patches(stale ^ self._was_stale, 1) if stale.any() else stale
        again = np.where(unchanged, self._state, np.where(border, MOVES, JUMPED))
        first = np.where(unchanged, DRIFTED, JUMPED)
        self._state = np.where(stale, np.where(begins, first, again), SHOWS).astype(np.uint8)
        self._jumps += stale & ~unchanged & (self._state == JUMPED)
        self._was_stale = stale
        self._since_motion += 1
        self._since_motion[self._state == MOVES] = 0
        moving = self._since_motion <= MOTION_MEMORY
        if moving.any():
            moving = grow_patches(moving, NEARBY)
        moving |= objects  # at rest: it explains itself and nothing beside it
        settles = (self._jumps <= MANY_JUMPS) & (restless < RESTLESS)
        return (self._state == JUMPED) & ~moving & settles

    def stays(self, image: np.ndarray, unexplained: np.ndarray, tolerance: float) -> np.ndarray:
        """Those of the unexplained patches whose change was seen before and is the same still, bool `[P]`.

        Patches that touch are one change: all of it must be the same, else it is something that moves.

        Args:
            image: uint8 `[S, S, 3]`.
            unexplained: bool `[P]`.
            tolerance: grey levels, within which a patch is the same.
        """
        staying = np.zeros_like(unexplained)
        if not (self._seen and unexplained.any()):
            return staying
        change = connected(unexplained)
        for earlier, known in self._seen:
            both = unexplained & known
            if not both.any():
                continue
            same, _ = reusable_patches(earlier, image, self._patch_size, tolerance)
            moved = np.unique(change[unexplained & ~same])
            staying |= unexplained & ~np.isin(change, moved) & np.isin(change, np.unique(change[both]))
        return staying

    def remember(self, image: np.ndarray, unexplained: np.ndarray) -> None:
        """Keeps a frame whose unexplained changes may stay; `[S, S, 3]` and bool `[P]`."""
        if unexplained.any():
            self._seen = [*self._seen[-REMEMBERED + 1 :], (image.copy(), unexplained)]

    def forget(self, patches: np.ndarray) -> None:
        """Takes what bool `[P]` shows as explained, in the frames kept too."""
        self._seen = [(image, mask & ~patches) for image, mask in self._seen]


def connected(patch_mask: np.ndarray) -> np.ndarray:
    """A number for every patch of bool `[P]`, int `[P]`: the same for patches that touch, diagonally too; 0 elsewhere."""
    grid = grid_side(patch_mask)
    numbers = np.where(patch_mask, np.arange(1, len(patch_mask) + 1), 0).reshape(grid, grid)
    mask = patch_mask.reshape(grid, grid)
    while True:
        padded = np.pad(numbers, 1)
        largest = numbers
        for row in range(3):
            for column in range(3):
                largest = np.maximum(largest, padded[row : row + grid, column : column + grid])
        largest = np.where(mask, largest, 0)
        if np.array_equal(largest, numbers):
            return numbers.reshape(-1)
        numbers = largest
