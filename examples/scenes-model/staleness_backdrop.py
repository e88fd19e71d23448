"""How far an image has moved away from a reference, patch by patch, and which of its patches the reference may stand for.

Pure functions on numpy arrays. `S` is the side of the image as the model sees it, `P` the number of patches of its grid;
where `S` is not a multiple of the patch size, the remainder at the right and the bottom belongs to no patch.
"""

import numpy as np

# How far the two finer measures of `reusable_patches` may go, in multiples of the tolerance.
FINE_LUMA, FINE_COLOUR = 1.2, 2.0


def patch_staleness(reference: np.ndarray, image: np.ndarray, patch_size: int) -> np.ndarray:
    """Staleness: the largest mean absolute RGB difference over the four quarter blocks of each patch.

    The measure is Backdrop's own. A mean over the whole patch would hide what changes in a corner of it.

    Args:
        reference, image: uint8 `[S, S, 3]` (or whole rows of patches of it).
        patch_size: pixels. An odd one is halved into a smaller first and a larger second part.

    Returns:
        float32 `[P]`, grey levels 0-255.
    """
    return _block_staleness(_signed_difference(reference, image, patch_size), patch_size)


def reusable_patches(
    reference: np.ndarray, image: np.ndarray, patch_size: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Patches of an image that a reference may stand for.

    Staleness averages over quarter blocks, which hides a thin line or a small lamp. So two finer measures must hold as
    well. Both smooth the signed difference by the 3 x 3 binomial filter, the outer product of [1 2 1] / 4 with itself
    (the usual discrete approximation of a Gaussian; see B. Jaehne, Digital Image Processing, on binomial filters): it
    averages noise out and keeps strokes. The result may be at most `FINE_LUMA` tolerances in the mean of RGB and
    `FINE_COLOUR` in each channel (more, since JPEG keeps colour at half resolution, with larger errors). The two factors
    were chosen on made scenes with noise and JPEG artefacts.

    Args:
        reference, image: uint8 `[S, S, 3]`.
        patch_size: pixels.
        tolerance: the largest staleness that is reused, grey levels 0-255; 0: pixels must be equal.

    Returns:
        bool `[P]`, and the staleness of every patch, float32 `[P]`.
    """
    difference = _signed_difference(reference, image, patch_size)
    staleness = _block_staleness(difference, patch_size)
    reusable = staleness <= tolerance
    if 0 < tolerance < 255 and reusable.any():
        # The filter's weights add up to 16 here, not to 1, and luma is the sum of three channels, not their mean.
        luma_bound, colour_bound = 48 * FINE_LUMA * tolerance, 16 * FINE_COLOUR * tolerance
        # An average exceeds no largest value: most patches need no filter.
        peaks = _patch_peaks(difference, patch_size)
        unsure = np.flatnonzero(reusable & ((48 * peaks > luma_bound) | (16 * peaks > colour_bound)))
        grid = difference.shape[0] // patch_size
        blocks = difference.reshape(grid, patch_size, grid, patch_size, -1).swapaxes(1, 2)
        smooth = _binomial_filter(blocks[unsure // grid, unsure % grid])
        luma = smooth[..., 0] + smooth[..., 1]
        luma += smooth[..., 2]
        reusable[unsure] = (np.abs(smooth).max(axis=(1, 2, 3), initial=0) <= colour_bound) & (
            np.abs(luma).max(axis=(1, 2), initial=0) <= luma_bound
        )
    return reusable, staleness


def _signed_difference(reference: np.ndarray, image: np.ndarray, patch_size: int) -> np.ndarray:
    """`image - reference`, int16 `[h, w, 3]`, without the remainder."""
    h, w = (size // patch_size * patch_size for size in image.shape[:2])
    return np.subtract(image[:h, :w], reference[:h, :w], dtype=np.int16)


def _block_staleness(difference: np.ndarray, patch_size: int) -> np.ndarray:
    """`patch_staleness` of a signed difference."""
    height, width, _ = difference.shape
    half = patch_size // 2
    corners = np.array([0, half] if half else [0])
    tops, lefts = (
        (np.arange(0, size, patch_size)[:, None] + corners).reshape(-1) for size in (height, width)
    )
    flat = np.abs(difference).reshape(height, -1)
    # Lines are summed first, along contiguous memory. `reduceat` takes any patch size, and is ten times slower.
    if 2 * half == patch_size and half <= 128:  # 128 * 255 fits int16
        strips = flat.reshape(len(tops), half, -1).sum(axis=1, dtype=np.int16)
        sums = strips.reshape(len(tops), len(lefts), half * 3).sum(axis=-1, dtype=np.int32)
    else:
        strips = np.add.reduceat(flat, tops, axis=0, dtype=np.int32)
        sums = np.add.reduceat(strips, lefts * 3, axis=1)
    sizes = np.diff([*corners, patch_size])
    parts = len(corners)
    blocks = sums.reshape(len(tops) // parts, parts, len(lefts) // parts, parts)
    means = blocks / (3 * sizes[:, None, None] * sizes)
    return means.max(axis=(1, 3)).reshape(-1).astype(np.float32)


def _binomial_filter(blocks: np.ndarray) -> np.ndarray:
    """int16 `[n, p, p, C]` filtered by [1 2 1]^T [1 2 1] within each of `n` patches, so that none depends on its neighbours.

    The sums fit int16: 16 * 255 < 2^15.
    """
    vertical = blocks * np.int16(2)
    vertical[:, 1:] += blocks[:, :-1]
    vertical[:, :-1] += blocks[:, 1:]
    smooth = vertical * np.int16(2)
    smooth[:, :, 1:] += vertical[:, :, :-1]
    smooth[:, :, :-1] += vertical[:, :, 1:]
    return smooth


def _patch_peaks(difference: np.ndarray, patch_size: int) -> np.ndarray:
    """Largest absolute value in each patch: int16 `[h, w, C]` -> int16 `[P]`."""
    height, width, channels = difference.shape
    strips = np.abs(difference).reshape(height // patch_size, patch_size, width * channels)
    peaks = strips.max(axis=1)  # along contiguous memory first
    return peaks.reshape(-1, patch_size * channels).max(axis=1)
