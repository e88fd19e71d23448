"""Whether two layers of a background are equal, so that what was computed of one holds for the other."""

import numpy as np


def same_layer(a, b) -> bool:
    return np.array_equal(a.patch_mask, b.patch_mask) and np.array_equal(a.pixels, b.pixels)
