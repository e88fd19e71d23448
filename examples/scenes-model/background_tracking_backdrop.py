"""How a reference improves: what the frames that matched it show, averaged, and when adopting that pays.

A reference begins as one frame: noisy, and blind where an object stood. Each frame that matches it updates a running
mean of every patch, begun anew where the patch changed. A patch that stayed the same for a while is *settled*: a
reference with those pixels would have been reused there. Adopting it costs one encoding of the background, so it pays
once the times that settled patches were encoded freshly, since they last changed, add up to as many as that (the
break-even rule of the ski-rental problem). What merely passes by, however slowly, starts at zero with each change. What a detector calls an
object never settles: models are trained on backgrounds without objects, and answer worse about one that hides there.
"""

import numpy as np

from .patch_groups_backdrop import pixel_mask, reusable_patches

WINDOW = 16  # frames in the running mean: noise falls to a quarter, slow drift is still followed
SETTLED = 4  # frames without a change
# The same for a patch that the reference owns: what it had there before may well come back.
SETTLED_OVER_KNOWN = 8


class BackgroundTracker:
    """Running mean of one background.

    Args:
        image: uint8 `[S, S, 3]`, the first frame.
        patch_size: pixels.
        tolerance: as the matcher's.
    """

    def __init__(self, image: np.ndarray, patch_size: int, tolerance: float):
        self.patch_size = patch_size
        self.tolerance = tolerance
        self.estimate = image.copy()  # uint8 [S, S, 3]
        grid = image.shape[0] // patch_size
        # With tolerance 0 a patch is the same pixels or another patch: nothing to average.
        self.mean = self._cells(image).astype(np.float32) if tolerance > 0 else None  # [g, p, g, 3 p]
        self.frames = np.ones(grid * grid, dtype=np.int32)  # since the last change
        self.wasted = np.zeros(grid * grid, dtype=np.int32)  # fresh encodings since the last change
        self.objects = np.zeros(grid * grid, dtype=bool)  # detected when last looked, and unchanged since

    @property
    def num_bytes(self) -> int:
        """Bytes kept."""
        kept = self.estimate.nbytes + self.frames.nbytes + self.wasted.nbytes + self.objects.nbytes
        return kept + (self.mean.nbytes if self.mean is not None else 0)

    def update(self, image: np.ndarray, fresh: np.ndarray) -> None:
        """Takes in a matched frame uint8 `[S, S, 3]` whose `fresh [P]` patches were encoded."""
        unchanged, _ = reusable_patches(self.estimate, image, self.patch_size, self.tolerance)
        self.objects &= unchanged
        self.wasted = np.where(unchanged & ~self.objects, self.wasted + fresh, 0)
        self.frames = np.where(unchanged, self.frames + 1, 1)
        cells, estimate = self._cells(image), self._cells(self.estimate)
        if self.mean is None:
            changed = ~unchanged.reshape(cells.shape[0], -1)
            estimate.swapaxes(1, 2)[changed] = cells.swapaxes(1, 2)[changed]
            return
        weights = (1 / np.minimum(self.frames, WINDOW)).astype(np.float32)
        step = cells - self.mean
        step *= weights.reshape(cells.shape[0], 1, -1, 1)
        self.mean += step
        np.add(self.mean, 0.5, out=step)
        np.copyto(estimate, step, casting="unsafe")  # rounds: a mean of uint8 is never negative

    def _cells(self, image: np.ndarray) -> np.ndarray:
        """A view `[g, p, g, 3 p]` of `[S, S, 3]` without the remainder."""
        grid = image.shape[0] // self.patch_size
        inner = image[: grid * self.patch_size].reshape(grid, self.patch_size, -1)
        inner = inner[..., : grid * self.patch_size * 3]
        return np.lib.stride_tricks.as_strided(
            inner,
            (grid, self.patch_size, grid, self.patch_size * 3),
            (*inner.strides[:2], self.patch_size * 3 * inner.strides[2], inner.strides[2]),
        )

    def settled(self, owned: np.ndarray) -> np.ndarray:
        """Bool `[P]`, given the patches `owned [P]` by the reference. An object that rests is still an object."""
        return (self.frames >= np.where(owned, SETTLED_OVER_KNOWN, SETTLED)) & ~self.objects

    def note_objects(self, objects: np.ndarray) -> None:
        """Patches `[P]` bool that a detector found objects in, in the latest frame: no background while they stay."""
        self.objects = objects.copy()
        self.wasted[objects] = 0

    def pays(self, owned: np.ndarray) -> bool:
        """Whether a better reference would by now have saved what it costs."""
        settled = self.settled(owned)
        return bool(self.wasted[settled].sum() >= (owned | settled).sum())

    def proposal(self, pixels: np.ndarray, owned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A better reference: settled patches as averaged, others as the current reference has them.

        Args:
            pixels: uint8 `[S, S, 3]`, the current reference's.
            owned: bool `[P]`, its patches.

        Returns:
            uint8 `[S, S, 3]` and the patches it owns, bool `[P]`.
        """
        settled = self.settled(owned)
        # Where the reference shows the same still, its mean is the better picture of it.
        same, _ = reusable_patches(pixels, self.estimate, self.patch_size, self.tolerance)
        adopted = settled | (owned & same & (self.frames >= SETTLED) & ~self.objects)
        mask = pixel_mask(adopted, pixels.shape[0], self.patch_size)
        return np.where(mask[..., None], self.estimate, pixels), settled | owned
