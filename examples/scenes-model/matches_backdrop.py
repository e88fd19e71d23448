"""What the matcher found for one image, and what became of the image, as values."""

from dataclasses import dataclass

import numpy as np

from .reference_store_backdrop import Reference


@dataclass(frozen=True, eq=False)
class Match:
    """A reference for an image.

    Attributes:
        reference: whose pixels stand for the background.
        fresh: bool `[P]`, the patches of the image that must be encoded freshly.
        staleness: float32 `[P]`, of every patch against the reference, grey levels.
        refreshed: the reference was replaced with the help of this image, so no background cache has its tokens yet.
    """

    reference: Reference
    fresh: np.ndarray
    staleness: np.ndarray
    refreshed: bool = False


@dataclass(frozen=True, eq=False)
class MatchReport:
    """What the matcher did with one image, for observers.

    Attributes:
        image: uint8 `[S, S, 3]`, as the model sees it.
        reference: None on a miss.
        fresh: bool `[P]`, patches encoded freshly; all of them on a miss.
        unseen: bool `[P]`, patches that are fresh because the reference does not own them; all of them on a miss.
        stale: bool `[P]`, patches that are fresh because they differ from the reference.
        objects: bool `[P]`, patches that are fresh because an object was detected there.
        refreshed: as in `Match`.
    """

    image: np.ndarray
    reference: Reference | None
    fresh: np.ndarray
    unseen: np.ndarray
    stale: np.ndarray
    objects: np.ndarray
    refreshed: bool
