"""How a reference improves: a running mean of the frames that matched it, and when it pays to replace the reference.

A reference begins as one frame, with that frame's noise, and without the patches where an object stood. Each frame that
matches it updates a running mean of every patch; where a patch changed, its mean starts again. A patch that has stayed
the same for some frames is *settled*: a reference with those pixels would have been reused there.

A better reference costs one encoding of the background. It pays once settled patches have been encoded freshly, since
they last changed, as many times as the background has patches. This is the break-even rule of the ski-rental problem,
which never costs more than twice the optimum (Karlin, Manasse, Rudolph and Sleator, "Competitive snoopy caching", 1988).
Each change resets a patch's counter, so moving objects never trigger an update.

A parked object is still an object, so the patches of detected objects never settle; without this the running mean would
absorb it, and a model trained on backgrounds without objects answers worse about what hides in one.
"""

import numpy as np

from .patch_groups_backdrop import pixel_mask
from .staleness_backdrop import reusable_patches

WINDOW = 16  # frames in the running mean: the noise falls to a quarter, and slow drift is still followed
SETTLED = 4  # frames without a change after which a patch is settled
# The same for a patch that the reference owns, where what it showed before may well come back.
SETTLED_OVER_KNOWN = 8


class BackgroundTracker:
    """Running mean of the frames that matched one background. Not thread-safe.

    Args:
        image: uint8 `[S, S, 3]`, the first frame.
        patch_size: pixels.
        tolerance: the matcher's, grey levels: within it a patch counts as unchanged.
    """

    def __init__(self, image: np.ndarray, patch_size: int, tolerance: float):
        self.patch_size = patch_size
        self.tolerance = tolerance
        self.estimate = image.copy()  # uint8 [S, S, 3]
        grid = image.shape[0] // patch_size
        # With tolerance 0 an unchanged patch has equal pixels, so there is nothing to average.
        self.mean = self._cells(image).astype(np.float32) if tolerance > 0 else None  # [g, p, g, 3 p]
        self.frames = np.ones(grid * grid, dtype=np.int32)  # since the last change
        self.wasted = np.zeros(grid * grid, dtype=np.int32)  # fresh encodings since the last change
        self.objects = np.zeros(
            grid * grid, dtype=bool
        )  # where the last detection found objects, if unchanged since

    @property
    def num_bytes(self) -> int:
        """Bytes of memory."""
        kept = self.estimate.nbytes + self.frames.nbytes + self.wasted.nbytes + self.objects.nbytes
        return kept + (self.mean.nbytes if self.mean is not None else 0)

    def update(self, image: np.ndarray, fresh: np.ndarray) -> None:
        """Takes in a matched frame.

        Args:
            image: uint8 `[S, S, 3]`.
            fresh: bool `[P]`, the patches of it that were encoded freshly.
        """
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
        """The patches that have stayed the same for some frames and show no detected object, bool `[P]`.

        Args:
            owned: bool `[P]`, the patches that the reference owns.
        """
        return (self.frames >= np.where(owned, SETTLED_OVER_KNOWN, SETTLED)) & ~self.objects

    def note_objects(self, objects: np.ndarray) -> None:
        """Keeps patches from settling as long as they do not change.

        Args:
            objects: bool `[P]`, where a detector found objects in the latest frame.
        """
        self.objects = objects.copy()
        self.wasted[objects] = 0

    def reset_waste(self) -> None:
        """Counts from zero again, once what was wasted has been acted on."""
        self.wasted[:] = 0

    def pays(self, owned: np.ndarray) -> bool:
        """Whether a better reference would by now have saved what it costs, given the patches `owned [P]` bool."""
        settled = self.settled(owned)
        return bool(self.wasted[settled].sum() >= (owned | settled).sum())

    def proposal(self, pixels: np.ndarray, owned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A better reference: the running mean of settled patches, and the current reference elsewhere.

        Args:
            pixels: uint8 `[S, S, 3]`, the current reference's.
            owned: bool `[P]`, its patches.

        Returns:
            uint8 `[S, S, 3]` and the patches it owns, bool `[P]`.
        """
        settled = self.settled(owned)
        # Patches that still show what the reference shows are replaced by their mean too, which has less noise.
        same, _ = reusable_patches(pixels, self.estimate, self.patch_size, self.tolerance)
        adopted = settled | (owned & same & (self.frames >= SETTLED) & ~self.objects)
        mask = pixel_mask(adopted, pixels.shape[0], self.patch_size)
        return np.where(mask[..., None], self.estimate, pixels), settled | owned
