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
            known, target = self._targets.pop(reference.reference_id, (None, None))
            # A layer that is made anew is another picture under the same number.
            if (
                known is None
                or not np.array_equal(known.pixels, reference.pixels)
                or not np.array_equal(known.patch_mask, reference.patch_mask)
            ):
                known = reference
                target = CorrectionTarget(reference.pixels, reference.patch_mask, self._patch_size)
            self._targets[reference.reference_id] = known, target
            while len(self._targets) > KEPT_TARGETS:
                self._targets.popitem(last=False)
            return target
