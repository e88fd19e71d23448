"""How far an image has moved away from a reference, patch by patch, and which of its patches the reference may stand for.

Pure functions on numpy arrays. `S` is the side of the image as the model sees it, `P` the number of patches of its grid;
where `S` is not a multiple of the patch size, the remainder at the right and the bottom belongs to no patch.
"""

import numpy as np

# How far the two finer measures of `reusable_patches` may go, in multiples of the tolerance.
FINE_LUMA, FINE_COLOUR = 1.2, 2.0
AROUND = 4  # patches: the surroundings of a patch reach so far


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
    reference: np.ndarray,
    image: np.ndarray,
    patch_size: int,
    tolerance: float,
    bounds: np.ndarray | None = None,
    excused: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Patches of an image that a reference may stand for.

    Staleness averages over quarter blocks, which hides a thin line or a small lamp. So finer measures must hold as well.
    Two smooth the signed difference by the 3 x 3 binomial filter, the outer product of [1 2 1] / 4 with itself
    (the usual discrete approximation of a Gaussian; see B. Jaehne, Digital Image Processing, on binomial filters): it
    averages noise out and keeps strokes. The result may be at most `FINE_LUMA` tolerances in the mean of RGB and
    `FINE_COLOUR` in each channel (more, since JPEG keeps colour at half resolution, with larger errors). The two factors
    were chosen on made scenes with noise and JPEG artefacts. Where the noise of a patch is known, bounds of its own take
    their place, see `patch_noise_backdrop`: they are lower where a scene is quiet, higher where its texture never rests.

    Args:
        reference, image: uint8 `[S, S, 3]`.
        patch_size: pixels.
        tolerance: the largest staleness that is reused, grey levels 0-255; 0: pixels must be equal.
        bounds: float32 `[P, 4]`, the largest `PatchStructure` of each patch, grey levels; None: not known.
        excused: bool `[P]`, patches of which the staleness alone decides; None: none.

    Returns:
        bool `[P]`, and the staleness of every patch, float32 `[P]`.
    """
    difference = _signed_difference(reference, image, patch_size)
    staleness = _block_staleness(difference, patch_size)
    reusable = staleness <= tolerance
    if not (0 < tolerance < 255 and reusable.any()):
        return reusable, staleness
    excused = np.zeros_like(reusable) if excused is None else excused
    limit: float | np.ndarray = FINE_LUMA * tolerance
    if bounds is not None:
        known = np.isfinite(bounds).any(axis=1)
        if (reusable & known & ~excused).any():  # else the verdict depends on no structure
            reusable &= (patch_structure(difference, patch_size, tolerance) <= bounds).all(axis=1) | excused
        # What the whole patch changed by is bounded by its staleness; a known bound is about what stands out of that.
        limit = np.where(np.isfinite(bounds[:, 0]), bounds[:, 0] + tolerance, limit)
    luma: np.ndarray = np.broadcast_to(limit, reusable.shape)
    colour = np.maximum(luma * (FINE_COLOUR / FINE_LUMA), FINE_LUMA * tolerance)
    # An average exceeds no largest value: most patches need no filter.
    peaks = _patch_peaks(difference, patch_size)
    unsure = np.flatnonzero(reusable & ~excused & ((peaks > luma) | (peaks > colour)))
    grid = difference.shape[0] // patch_size
    blocks = difference.reshape(grid, patch_size, grid, patch_size, -1).swapaxes(1, 2)
    smooth = _binomial_filter(blocks[unsure // grid, unsure % grid])
    grey = smooth[..., 0] + smooth[..., 1]
    grey += smooth[..., 2]
    # The filter's weights add up to 16 here, not to 1, and grey is the sum of three channels, not their mean.
    reusable[unsure] = (np.abs(smooth).max(axis=(1, 2, 3), initial=0) <= 16 * colour[unsure]) & (
        np.abs(grey).max(axis=(1, 2), initial=0) <= 48 * luma[unsure]
    )
    return reusable, staleness


def measured_patches(
    reference: np.ndarray, image: np.ndarray, patch_size: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Which patches are within the tolerance by their staleness alone, bool `[P]`, and their `patch_structure`."""
    difference = _signed_difference(reference, image, patch_size)
    same = _block_staleness(difference, patch_size) <= tolerance
    return same, patch_structure(difference, patch_size, tolerance)


def patch_structure(difference: np.ndarray, patch_size: int, tolerance: float) -> np.ndarray:
    """How far each patch's difference stands out, by four measures that see a figure in it and do not see slow light.

    A shadow or a camera's exposure moves whole neighbourhoods alike; a figure has edges. Of the signed difference these are
    measured, each without the patch's own mean: the largest value under the binomial filter (dots, strokes), the
    largest mean of a line or column of pixels (thin lines), and the largest mean of a quarter in any channel (edges, colours);
    and last the patch's mean without the median of the patches around it (a figure that fills the patch).

    Args:
        difference: int16 `[h, w, 3]`, whole patches.
        patch_size: pixels.
        tolerance: means are taken to be no larger, where the patches around are looked at.

    Returns:
        float32 `[P, 4]`, grey levels of the mean of RGB (the third: of a channel).
    """
    p, (height, width, _) = patch_size, difference.shape
    grid = height // p
    flat = difference.reshape(-1)
    sums = flat[:-2] + flat[1:-1]  # along contiguous memory, which is faster than channel by channel
    sums += flat[2:]
    grey = np.ascontiguousarray(sums[::3]).reshape(height, width)
    # Sums along a line of pixels are a product with ones, which is faster than any reduction over few values.
    lines = (grey.reshape(-1, p).astype(np.float32) @ np.ones(p, dtype=np.float32)).reshape(grid, p, grid)
    columns = grey.reshape(grid, p, width).sum(axis=1, dtype=np.int16 if p <= 42 else np.int32)
    columns = columns.reshape(grid, grid, p).astype(np.float32)
    means = lines.sum(axis=1) / (p * p)  # [g, g], of the sum of RGB
    line_peak = np.maximum(
        np.abs(lines / p - means[:, None]).max(axis=1), np.abs(columns / p - means[..., None]).max(axis=2)
    )
    offsets = np.rint(means).astype(np.int16).repeat(p, axis=1)  # [g, w]
    peak = _filtered_peaks((grey.reshape(grid, p, width) - offsets[:, None]), p)
    quarters = _quarter_sums(difference, p)  # [g, 2, g, 2, 3]
    whole = _folded(np.add, _folded(np.add, quarters, 3), 1) / np.float32(p * p)  # [g, g, 3]
    sizes: np.ndarray = np.diff([*_quarter_starts(p), p])
    quarters /= sizes[:, None, None, None] * sizes[:, None]
    quarters -= whole[:, None, :, None]
    np.abs(quarters, out=quarters)
    quarter_peak = _folded(np.maximum, _folded(np.maximum, _folded(np.maximum, quarters, 4), 3), 1)
    within = np.clip(means / 3, -tolerance, tolerance)
    around = np.abs(within - _median_around(within))
    return (
        np.stack([peak / 48, line_peak / 3, quarter_peak, around], axis=-1).reshape(-1, 4).astype(np.float32)
    )


def _quarter_starts(patch_size: int) -> list[int]:
    """Where the first and the second half of a patch begin, pixels."""
    return [0, patch_size // 2] if patch_size > 1 else [0]


def _folded(ufunc: np.ufunc, values: np.ndarray, axis: int) -> np.ndarray:
    """`ufunc.reduce` along a short axis: a call for each of its values, which is faster than a loop for each of the others."""
    parts = np.moveaxis(values, axis, 0)
    result = parts[0]
    for part in parts[1:]:
        result = ufunc(result, part)
    return result


def _quarter_sums(difference: np.ndarray, patch_size: int) -> np.ndarray:
    """Sums over the quarters of each patch: int16 `[h, w, C]` -> float32 `[g, 2, g, 2, C]` (one part where a patch is a pixel)."""
    height, width, channels = difference.shape
    corners = _quarter_starts(patch_size)
    parts, grid, half = len(corners), height // patch_size, patch_size // 2
    if 2 * half == patch_size and half <= 128:  # 128 * 255 fits int16
        strips = difference.reshape(parts * grid, half, -1).sum(axis=1, dtype=np.int16)
        # A product with ones, of whole numbers below 2^24, is exact.
        blocks = strips.reshape(-1, half * channels).astype(np.float32)
        sums = blocks @ np.tile(np.eye(channels, dtype=np.float32), (half, 1))
        return sums.reshape(grid, parts, grid, parts, channels)
    tops = (np.arange(0, height, patch_size)[:, None] + corners).reshape(-1)
    strips = np.add.reduceat(difference.reshape(height, -1), tops, axis=0, dtype=np.int32)
    lefts = (np.arange(0, width, patch_size)[:, None] + corners).reshape(-1)
    sums = np.add.reduceat(strips.reshape(-1, width, channels).astype(np.float32), lefts, axis=1)
    return sums.reshape(grid, parts, grid, parts, channels)


def _filtered_peaks(cells: np.ndarray, patch_size: int) -> np.ndarray:
    """Largest absolute value of each patch under 16 times the binomial filter: int16 `[g, p, w]` -> int16 `[g, g]`.

    No patch depends on its neighbours. The sums fit int16: 16 * 3 * 255 * 2 < 2^15.
    """
    vertical = cells * np.int16(2)
    vertical[:, 1:] += cells[:, :-1]
    vertical[:, :-1] += cells[:, 1:]
    smooth = vertical * np.int16(2)
    smooth[..., 1:] += vertical[..., :-1]
    smooth[..., :-1] += vertical[..., 1:]
    # What came from the neighbour on either side is taken back.
    smooth[..., patch_size::patch_size] -= vertical[..., patch_size - 1 : -1 : patch_size]
    smooth[..., patch_size - 1 : -1 : patch_size] -= vertical[..., patch_size::patch_size]
    grid = len(cells)
    return np.abs(smooth, out=smooth).max(axis=1).reshape(grid, grid, patch_size).max(axis=2)


def _median_around(values: np.ndarray) -> np.ndarray:
    """The median of every other patch within `AROUND` patches: `[g, g]` -> `[g, g]`; at the border, of those nearest to it."""
    reach = min(AROUND, (values.shape[0] - 1) // 2)
    windows = np.lib.stride_tricks.sliding_window_view(values, (2 * reach + 1, 2 * reach + 1))[..., ::2, ::2]
    flat = windows.reshape(*windows.shape[:2], -1)
    middle = flat.shape[-1] // 2
    return np.pad(np.partition(flat, middle, axis=-1)[..., middle], reach, mode="edge")


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
        # A product with ones, of whole numbers below 2^24, is exact.
        sums = strips.reshape(-1, half * 3).astype(np.float32) @ np.ones(half * 3, dtype=np.float32)
        quarters = sums.reshape(height // patch_size, 2, width // patch_size, 2)
        largest = _folded(np.maximum, _folded(np.maximum, quarters, 3), 1)
        return (largest.astype(np.float64) / (3 * half * half)).reshape(-1).astype(np.float32)
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
