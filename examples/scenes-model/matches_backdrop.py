"""What the matcher found for one image, and what became of the image, as values."""

from dataclasses import dataclass

import numpy as np

from .background_tracking_backdrop import FrameChange
from .frame_corrections_backdrop import Correction
from .reference_store_backdrop import Reference


@dataclass(frozen=True, eq=False)
class Match:
    """A reference for an image.

    Attributes:
        reference: whose pixels stand for the background.
        frame: uint8 `[S, S, 3]`, the image after the corrections that were asked for; itself without any. Staleness is measured
            on it, and what is fresh is encoded from it.
        fresh: bool `[P]`, the patches of the frame that must be encoded freshly.
        staleness: float32 `[P]`, of every patch of the frame against the reference, grey levels.
        encoded: bool `[P]`, the patches that are encoded for this image: the fresh ones, and those of layers that no
            background cache has yet.
        estimate: what the corrections found; None without any.
        refreshed: a layer of the reference was made anew with the help of this image.
        change: how the frame differs from those before it, where the matcher tracks them.
    """

    reference: Reference
    frame: np.ndarray
    fresh: np.ndarray
    staleness: np.ndarray
    encoded: np.ndarray
    estimate: Correction | None = None
    refreshed: bool = False
    change: FrameChange | None = None


@dataclass(frozen=True, eq=False)
class MatchReport:
    """What the matcher did with one image, for observers.

    Attributes:
        image: uint8 `[S, S, 3]`, as the model sees it.
        frame: uint8 `[S, S, 3]`, the same after corrections, as in `Match`.
        reference: None on a miss.
        fresh: bool `[P]`, patches of the fresh group; all of them on a miss.
        encoded: bool `[P]`, all that are encoded for this image: fresh ones and layers made anew. What is not, is reused.
        unseen: bool `[P]`, patches that are fresh because the reference does not own them; all of them on a miss.
        stale: bool `[P]`, patches that the reference owns and the fresh group overrides: their tokens in the prompt are stale.
        hidden: bool `[P]`, patches that the second layer shows and the first one shows otherwise.
        disowned: bool `[P]`, patches that the reference does not own because they keep changing.
        objects: bool `[P]`, patches that are fresh because an object was detected there.
        unexplained: bool `[P]`, stale patches that neither an object nor coming and going explains so far.
        refreshed: as in `Match`.
        detector_runs: how often the detector looked at this image.
        estimate: as in `Match`.
    """

    image: np.ndarray
    frame: np.ndarray
    reference: Reference | None
    fresh: np.ndarray
    encoded: np.ndarray
    unseen: np.ndarray
    stale: np.ndarray
    hidden: np.ndarray
    disowned: np.ndarray
    objects: np.ndarray
    unexplained: np.ndarray
    refreshed: bool
    detector_runs: int
    estimate: Correction | None = None

    @property
    def owned(self) -> np.ndarray:
        """Bool `[P]`, the patches that the reference owns; none on a miss."""
        return np.zeros_like(self.fresh) if self.reference is None else self.reference.patch_mask
