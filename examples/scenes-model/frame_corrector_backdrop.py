"""Corrections of frames for a matcher: what is known of the references that are compared most is kept."""

import threading
from collections import OrderedDict

import numpy as np

from .frame_corrections_backdrop import Correction, CorrectionTarget
from .reference_store_backdrop import Reference

KEPT_TARGETS = 8  # references; of each some 2 MB


class FrameCorrector:
    """Corrects frames for the references that they are compared with. Thread-safe.

    Args:
        patch_size: pixels.
        follow_exposure, align: see `BackgroundFinder`.
    """

    def __init__(self, patch_size: int, follow_exposure: bool, align: bool):
        self._patch_size, self._follow_exposure, self._align = patch_size, follow_exposure, align
        self._targets: OrderedDict[int, tuple[Reference, CorrectionTarget]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, reference: Reference, image: np.ndarray) -> Correction:
        """The image (uint8 `[S, S, 3]`) as it would be with the reference's exposure and place, and how that was found."""
        return self._target(reference).correct(
            image, follow_exposure=self._follow_exposure, align=self._align
        )

    def _target(self, reference: Reference) -> CorrectionTarget:
        with self._lock:
            kept = self._targets.pop(reference.reference_id, None)
            # A layer that is made anew is another picture under the same number.
            if kept is None or not _same_picture(kept[0], reference):
                kept = (
                    reference,
                    CorrectionTarget(reference.pixels, reference.patch_mask, self._patch_size),
                )
            self._targets[reference.reference_id] = kept
            while len(self._targets) > KEPT_TARGETS:
                self._targets.popitem(last=False)
            return kept[1]


def _same_picture(one: Reference, other: Reference) -> bool:
    return np.array_equal(one.pixels, other.pixels) and np.array_equal(one.patch_mask, other.patch_mask)
