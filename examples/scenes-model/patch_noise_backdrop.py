"""The noise of a background, patch by patch: how far `patch_structure` moves while nothing happens.

The tolerance of matching is a ceiling. A dark or quiet scene shows things that change by less, and leaves in the wind show
edges that mean nothing. So the matcher learns what each patch does when it is at rest, and calls fresh what stands out of that.
"""

import numpy as np

# A patch at rest stays below so many times the most that it did of late, plus so many grey levels (rounding, compression). A figure of
# three times the noise lies above: it fills what a measure averages over.
FACTOR, FACTOR_UNSURE = (
    1.2,
    1.5,
)  # the second is divided by the number of observations, of which few show the most
FLOORS = np.array([0.7, 0.4, 0.5, 0.7], dtype=np.float32)
TRUSTED = 3  # observations of a patch after which its noise is known
SURE = 20  # observations after which the most that was seen is believed
FORGETS = 0.01  # share by which that falls from frame to frame
# An observation raises it by no more than this share and so many grey levels: one figure does not become noise.
LARGEST_STEP, LARGEST_RISE = 0.15, 0.15
QUANTUM, OFFSET = 24.0, 8.0  # of the logarithm in which levels are kept in a byte


class PatchNoise:
    """The most that each of the four measures of every patch at rest was of late. Not thread-safe.

    Args:
        levels: float32 `[P, 4]`, what was learned before, 0: nothing; grey levels.
    """

    def __init__(self, levels: np.ndarray):
        self.levels: np.ndarray = levels.astype(np.float32)
        self._seen = np.where(levels.any(axis=1), SURE, 0).astype(np.int32)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory."""
        return self.levels.nbytes + self._seen.nbytes

    @property
    def known(self) -> int:
        """Observations of all patches together."""
        return int(self._seen.sum())

    def copy(self) -> "PatchNoise":
        """The same, to be changed apart."""
        other = PatchNoise(self.levels)
        other.levels, other._seen = self.levels.copy(), self._seen.copy()
        return other

    def observe(self, structure: np.ndarray, at_rest: np.ndarray) -> None:
        """Takes in one frame.

        Args:
            structure: float32 `[P, 4]`, of the frame against what the patches showed of late.
            at_rest: bool `[P]`, the patches that did not change.
        """
        self._seen += at_rest
        sure = (self._seen > SURE)[:, None]
        rise = np.maximum(structure - self.levels, 0)
        rise = np.where(sure, np.minimum(rise, LARGEST_STEP * self.levels + LARGEST_RISE), rise)
        self.levels += np.where(at_rest[:, None], rise - FORGETS * self.levels * sure, 0)

    def bounds(self) -> np.ndarray:
        """The largest measures of a patch at rest, float32 `[P, 4]`, grey levels; infinite where not yet known."""
        factor = FACTOR + FACTOR_UNSURE / np.maximum(self._seen, 1)
        bounds = self.levels * factor[:, None].astype(np.float32) + FLOORS
        bounds[self._seen < TRUSTED] = np.inf
        return bounds


def levels_to_bytes(levels: np.ndarray) -> np.ndarray:
    """Levels on a logarithmic scale: float32 `[P, 4]` -> uint8 `[4 P]`; they are found again within 3% and 0.01 levels."""
    scaled = np.rint(QUANTUM * np.log2(levels.astype(np.float32) * OFFSET + 1))
    return np.clip(scaled, 0, 255).astype(np.uint8).reshape(-1)


def levels_from_bytes(stored: np.ndarray) -> np.ndarray:
    """The levels that `levels_to_bytes` was given, float32 `[P, 4]`."""
    return ((np.exp2(stored.reshape(-1, 4) / np.float32(QUANTUM)) - 1) / OFFSET).astype(np.float32)
