"""Staleness by its definition, in float64 and patch by patch."""

import numpy as np


def naive_staleness(reference, image, patch_size):
    grid, half = image.shape[0] // patch_size, patch_size // 2
    parts = [slice(0, half), slice(half, patch_size)] if half else [slice(0, 1)]
    difference = np.abs(reference.astype(float) - image)
    cells = [
        difference[r * patch_size : (r + 1) * patch_size, c * patch_size : (c + 1) * patch_size]
        for r in range(grid)
        for c in range(grid)
    ]
    return np.array([max(cell[y, x].mean() for y in parts for x in parts) for cell in cells])
