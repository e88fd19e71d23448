"""Whether something has changed since the frame that was asked about last.

The measure is the matcher's own staleness (`processing/staleness_backdrop.py`), on a small copy of the frame. Patches that
keep changing (leaves, a burned-in clock) are learned and not counted.
"""

import numpy as np
from PIL import Image

from backdrop.processing.staleness_backdrop import patch_staleness

SIDE, PATCH = 224, 14  # pixels of the copy, and of its patches
RATE = 0.05  # of the running average of how often a patch changes from one frame to the next
RESTLESS = 0.35  # share of frames in which a patch changes, from which on it does not count


class ChangeWatcher:
    """Compares frames with the one that was asked about last.

    Args:
        tolerance: largest staleness of a patch that has not changed, grey levels 0-255.
        share: of the patches that must have changed, between 0 and 1.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(self, tolerance: float = 10.0, share: float = 0.005) -> None:
        if not 0 <= tolerance <= 255:
            raise ValueError(f"tolerance is {tolerance}; wanted 0 to 255 grey levels.")
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}; wanted 0 to 1 of the patches.")
        self._tolerance, self._share = tolerance, share
        self._asked: np.ndarray | None = None
        self._previous: np.ndarray | None = None
        self._restless = np.zeros((SIDE // PATCH) ** 2)

    def changed(self, image: np.ndarray) -> bool:
        """Whether a frame (uint8 `[H, W, 3]`) is to be asked about; it is then what later ones are compared with."""
        small = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))
        if self._previous is not None:
            moved = patch_staleness(self._previous, small, PATCH) > self._tolerance
            self._restless += RATE * (moved - self._restless)
        self._previous = small
        if self._asked is not None:
            moved = patch_staleness(self._asked, small, PATCH) > self._tolerance
            if (moved & (self._restless <= RESTLESS)).mean() <= self._share:
                return False
        self._asked = small
        return True
