"""Whole frames moved, shrunk and summed: with OpenCV where it is installed, else with numpy, alike to a grey level.

Pure functions on numpy arrays. `S` is the side of the image as the model sees it, `g` the patches along a side.
"""

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

SHARPNESS = -0.75  # of cubic interpolation; on photos shifted by half a pixel better than the usual -0.5
_SMOOTH = np.array([0.25, 0.5, 0.25], dtype=np.float32)


def _has_opencv() -> bool:
    return cv2 is not None


def with_exposure_undone(
    frame: np.ndarray, gain: tuple[float, float, float], offset: tuple[float, float, float]
) -> np.ndarray:
    """The frame with `(value - offset) / gain` in each channel; what is clipped stays clipped.

    Args:
        frame: uint8 `[S, S, 3]`.
        gain, offset: for each channel.
    """
    if gain == (1.0, 1.0, 1.0) and offset == (0.0, 0.0, 0.0):
        return frame
    levels = (np.arange(256)[:, None] - np.array(offset)) / np.array(gain)
    levels = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    levels[0], levels[255] = 0, 255
    if _has_opencv():
        return cv2.LUT(frame, levels[None])
    return np.stack([levels[:, c][frame[..., c]] for c in range(3)], axis=-1)


def shifted(image: np.ndarray, shift) -> np.ndarray:
    """What lies (right, down) of each pixel, by cubic interpolation (R. Keys, 1981); edges are repeated.

    Args:
        image: uint8 or float32 `[H, W]` or `[H, W, C]`.
        shift: (right, down) in pixels.
    """
    (right, down), kernels = np.floor(shift).astype(int), [_cubic(part - np.floor(part)) for part in shift]
    if not right and not down and all(kernel[1] == 1 for kernel in kernels):
        return image
    rows, columns = (
        np.clip(np.arange(-1, length + 2) + start, 0, length - 1)
        for length, start in zip(image.shape[:2], (down, right), strict=True)
    )
    if _has_opencv():
        top, left = max(0, 1 - down), max(0, 1 - right)
        bottom, far = max(0, down + 2), max(0, right + 2)
        wide = cv2.copyMakeBorder(image, top, bottom, left, far, cv2.BORDER_REPLICATE)
        first_row, first_column = top + down - 1, left + right - 1
        wide = wide[first_row : first_row + len(rows), first_column : first_column + len(columns)]
        depth = cv2.CV_8U if image.dtype == np.uint8 else cv2.CV_32F
        # Correlation, anchored at the pixel itself: the kernel's second tap.
        found = cv2.sepFilter2D(wide, depth, kernels[0], kernels[1], anchor=(1, 1))
        return np.ascontiguousarray(found[1:-2, 1:-2])
    lines = image[rows].astype(np.float32)
    height, width = image.shape[:2]
    lines = sum(kernels[1][k] * lines[k : k + height] for k in range(4))[:, columns]
    result = sum(kernels[0][k] * lines[:, k : k + width] for k in range(4))
    if image.dtype == np.uint8:
        return np.clip(np.rint(result), 0, 255).astype(np.uint8)
    return result.astype(image.dtype)


def _cubic(part: float) -> np.ndarray:
    """Weights of the pixels at -1, 0, 1 and 2 for a place `part` of a pixel behind pixel 0, float32 `[4]`."""
    t, a = float(part), SHARPNESS
    inner = 1 - (a + 3) * t**2 + (a + 2) * t**3
    outer = a * t * (1 - t) ** 2
    last = a * t**2 * (1 - t)
    return np.array([outer, inner, 1 - inner - outer - last, last], dtype=np.float32)


def smooth_luma(pixels: np.ndarray) -> np.ndarray:
    """The mean of the channels, smoothed a little, float32 `[h, w]`: gradients of single pixels are noise."""
    if _has_opencv():
        grey = cv2.transform(pixels, np.full((1, 3), 1 / 3, dtype=np.float32))
        return cv2.sepFilter2D(grey, cv2.CV_32F, _SMOOTH, _SMOOTH, borderType=cv2.BORDER_REPLICATE)
    grey = pixels.mean(axis=2, dtype=np.float32)
    wide = np.pad(grey, 1, mode="edge")
    lines = (wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4
    return (lines[:, :-2] + 2 * lines[:, 1:-1] + lines[:, 2:]) / 4


def gradients(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Central differences to the right and down, grey levels a pixel, float32 `[h, w]` each; 0 at the edges."""
    right, down = np.zeros_like(luma), np.zeros_like(luma)
    right[:, 1:-1] = (luma[:, 2:] - luma[:, :-2]) / 2
    down[1:-1] = (luma[2:] - luma[:-2]) / 2
    return right, down


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """A square at a smaller side, each pixel the mean of what it covers, float32 `[side, side]` or `[side, side, C]`."""
    if _has_opencv():
        if side < len(pixels):
            # Of bytes OpenCV rounds the means to bytes, which averages out over a patch.
            pixels = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
        return pixels.astype(np.float32)
    if side == len(pixels):
        return pixels.astype(np.float32)
    weights = _area_weights(len(pixels), side)
    lines = np.tensordot(weights, pixels.astype(np.float32), axes=(1, 0))
    return np.moveaxis(np.tensordot(weights, lines, axes=(1, 1)), 0, 1)


def _area_weights(length: int, parts: int) -> np.ndarray:
    """Shares of `length` pixels in each of `parts` equal parts of their line, float32 `[parts, length]`."""
    edges = np.arange(parts + 1) * length / parts
    pixels = np.arange(length)
    cover = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(cover, 0, None) * parts / length).astype(np.float32)


def stacked(*values: np.ndarray) -> np.ndarray:
    """Arrays of one shape as the channels of one, `[h, w, C]`."""
    return cv2.merge(values) if _has_opencv() and len(values) <= 4 else np.stack(values, axis=-1)


def cell_means(values: np.ndarray, grid: int) -> np.ndarray:
    """Means over the cells of a grid: float32 `[n, n, C]`, n a multiple of `grid`, -> `[grid * grid, C]`."""
    channels = values.shape[2]
    if _has_opencv() and channels <= 4:
        return cv2.resize(values, (grid, grid), interpolation=cv2.INTER_AREA).reshape(-1, channels)
    cell = len(values) // grid
    return values.reshape(grid, cell, grid, cell, channels).mean(axis=(1, 3)).reshape(-1, channels)
