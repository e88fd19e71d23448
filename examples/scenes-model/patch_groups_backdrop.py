"""Patch groups as values: which patches are whose, and a group as an RGBA image.

Pure functions on numpy arrays. `S` is the side of the image as the model sees it, `P` the number of patches of its
grid (row-major), `p` the patch size in pixels; where `S` is no multiple of `p` the right and bottom remainder belongs
to no patch.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

BACKGROUND, OBJECT = 0, 1
GROUP_KINDS = ("background", "object")
# Alpha of owned pixels by kind. No encoder writes these by chance: an ordinary cut-out has 255 or a gradient.
GROUP_ALPHA = (253, 254)
METADATA_KEY = "backdrop"
# Multiples of the tolerance; see `reusable_patches`.
FINE_LUMA, FINE_COLOUR = 1.2, 2.0


@dataclass(frozen=True)
class PatchGroup:
    """Pixels at the model's geometry and the patches they own.

    Attributes:
        pixels: uint8 `[S, S, 3]`, 0 outside the owned patches.
        patch_mask: bool `[P]`, at least one True.
        kind: `BACKGROUND` or `OBJECT`.
    """

    pixels: np.ndarray
    patch_mask: np.ndarray
    kind: int


def make_group(pixels: np.ndarray, patch_mask: np.ndarray, kind: int, patch_size: int) -> PatchGroup:
    """A group of `pixels [S, S, 3]` uint8, zeroed outside `patch_mask [P]` so that equal groups are equal bytes."""
    owned = pixel_mask(patch_mask, pixels.shape[0], patch_size)
    return PatchGroup(np.where(owned[..., None], pixels, np.uint8(0)), patch_mask.astype(bool), kind)


def pixel_mask(patch_mask: np.ndarray, side: int, patch_size: int) -> np.ndarray:
    """`[P]` bool -> `[S, S]` bool; the remainder at the right and bottom is False."""
    grid = side // patch_size
    mask = np.zeros((side, side), dtype=bool)
    cells = patch_mask.reshape(grid, grid).repeat(patch_size, axis=0).repeat(patch_size, axis=1)
    mask[: grid * patch_size, : grid * patch_size] = cells
    return mask


def covered_patches(mask: np.ndarray, patch_size: int, min_coverage: float = 0.0) -> np.ndarray:
    """Patches of which a pixel mask covers some, and at least the share `min_coverage`: `[S, S]` bool -> `[P]` bool.

    >>> covered_patches(np.eye(4, dtype=bool), 2).tolist()
    [True, False, False, True]
    """
    share = patch_blocks(mask[..., None], patch_size).mean(axis=(1, 2, 3))
    return (share > 0) & (share >= min_coverage)


def grid_side(patch_mask: np.ndarray) -> int:
    """Patches along a side of a square grid of `[P]` patches."""
    return math.isqrt(len(patch_mask))


def grow_patches(patch_mask: np.ndarray, margin: int) -> np.ndarray:
    """Patches within `margin` patches of an owned one, diagonals too: `[P]` bool -> `[P]` bool."""
    grid = grid_side(patch_mask)
    grown = np.pad(patch_mask.reshape(grid, grid), margin)
    windows = np.lib.stride_tricks.sliding_window_view(grown, (2 * margin + 1, 2 * margin + 1))
    return windows.any(axis=(2, 3)).reshape(-1)


def split_patches(
    object_patches: np.ndarray, margin: int = 0, overlap: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(background, object) patches `[P]` bool.

    Args:
        object_patches: `[P]` bool, patches that hold detected objects.
        margin: patches by which the object region grows.
        overlap: the background keeps the grown ring too.
    """
    grown = grow_patches(object_patches, margin)
    return ~(object_patches if overlap else grown), grown


def patch_blocks(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """`[S, S, C]` -> `[P, p, p, C]`, without the remainder."""
    grid = pixels.shape[0] // patch_size
    inner = pixels[: grid * patch_size, : grid * patch_size]
    blocks = inner.reshape(grid, patch_size, grid, patch_size, -1).swapaxes(1, 2)
    return blocks.reshape(grid * grid, patch_size, patch_size, -1)


def patch_staleness(reference: np.ndarray, image: np.ndarray, patch_size: int) -> np.ndarray:
    """Largest mean absolute RGB difference over the four quarter blocks of each patch.

    Args:
        reference, image: uint8 `[S, S, 3]` (or whole rows of patches of it).

    Returns:
        float32 `[P]`, grey levels 0-255. With an odd patch size the first half is the smaller one.
    """
    return _block_staleness(_signed_difference(reference, image, patch_size), patch_size)


def reusable_patches(
    reference: np.ndarray, image: np.ndarray, patch_size: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Patches of an image that a reference may stand for.

    Staleness (`patch_staleness`) averages over quarter blocks, in which a thin line or a small lamp drowns. So two
    finer measures must hold as well: the signed difference smoothed by a 3 x 3 binomial filter, which noise survives
    least and strokes most, at most `FINE_LUMA` tolerances in the mean of RGB and `FINE_COLOUR` in each channel (JPEG
    keeps colour at half resolution: its errors are larger there).

    Args:
        reference, image: uint8 `[S, S, 3]`.
        tolerance: grey levels; 0: pixels must be equal.

    Returns:
        bool `[P]`, and the staleness float32 `[P]`.
    """
    difference = _signed_difference(reference, image, patch_size)
    staleness = _block_staleness(difference, patch_size)
    reusable = staleness <= tolerance
    if 0 < tolerance < 255 and reusable.any():
        smooth = _binomial_filter(difference, patch_size)
        luma = smooth[..., 0] + smooth[..., 1]
        luma += smooth[..., 2]
        # The weights of the filter add up to 16, and luma is the sum of three channels.
        reusable &= _patch_peaks(smooth, patch_size) <= 16 * FINE_COLOUR * tolerance
        reusable &= _patch_peaks(luma[..., None], patch_size) <= 48 * FINE_LUMA * tolerance
    return reusable, staleness


def _signed_difference(reference: np.ndarray, image: np.ndarray, patch_size: int) -> np.ndarray:
    """int16 `[h, w, 3]`, without the remainder."""
    h, w = (size // patch_size * patch_size for size in image.shape[:2])
    return np.subtract(image[:h, :w], reference[:h, :w], dtype=np.int16)


def _block_staleness(difference: np.ndarray, patch_size: int) -> np.ndarray:
    height, width, _ = difference.shape
    half = patch_size // 2
    corners = np.array([0, half] if half else [0])
    tops, lefts = (
        (np.arange(0, size, patch_size)[:, None] + corners).reshape(-1) for size in (height, width)
    )
    flat = np.abs(difference).reshape(height, -1)
    # Rows first: that sum runs along contiguous memory. `reduceat` is general, and ten times slower.
    if 2 * half == patch_size and half <= 128:  # 128 * 255 fits int16
        rows = flat.reshape(len(tops), half, -1).sum(axis=1, dtype=np.int16)
        sums = rows.reshape(len(tops), len(lefts), half * 3).sum(axis=-1, dtype=np.int32)
    else:
        rows = np.add.reduceat(flat, tops, axis=0, dtype=np.int32)
        sums = np.add.reduceat(rows, lefts * 3, axis=1)
    sizes = np.diff([*corners, patch_size])
    parts = len(corners)
    blocks = sums.reshape(len(tops) // parts, parts, len(lefts) // parts, parts)
    means = blocks / (3 * sizes[:, None, None] * sizes)
    return means.max(axis=(1, 3)).reshape(-1).astype(np.float32)


def _binomial_filter(difference: np.ndarray, patch_size: int) -> np.ndarray:
    """int16 `[n, n, C]` under the filter [1 2 1]^T [1 2 1], within each patch: what changes beside it is no concern.

    No overflow: 16 * 255 < 2^15.
    """
    n, _, channels = difference.shape
    rows = difference.reshape(n // patch_size, patch_size, -1)
    vertical = rows * np.int16(2)
    vertical[:, 1:] += rows[:, :-1]
    vertical[:, :-1] += rows[:, 1:]
    cells = vertical.reshape(n, n // patch_size, patch_size * channels)
    smooth = cells * np.int16(2)
    smooth[..., channels:] += cells[..., :-channels]
    smooth[..., :-channels] += cells[..., channels:]
    return smooth.reshape(difference.shape)


def _patch_peaks(values: np.ndarray, patch_size: int) -> np.ndarray:
    """Largest absolute value in each patch: int16 `[n, n, C]` -> int16 `[P]`."""
    n, _, channels = values.shape
    grid = n // patch_size
    rows = values.reshape(grid, patch_size, n * channels)  # reduced along contiguous memory first
    high, low = rows.max(axis=1), rows.min(axis=1)
    peaks = np.maximum(high, -low).reshape(grid * grid, patch_size * channels)
    return peaks.max(axis=1)


def group_to_image(group: PatchGroup, patch_size: int, geometry: str = "") -> Image.Image:
    """A group as an RGBA image; `save_group` writes it so that it can be checked when it is read."""
    side = group.pixels.shape[0]
    alpha = np.where(pixel_mask(group.patch_mask, side, patch_size), GROUP_ALPHA[group.kind], 0).astype(
        np.uint8
    )
    image = Image.fromarray(np.dstack([group.pixels, alpha]))
    image.info[METADATA_KEY] = json.dumps(
        {"image_size": side, "patch_size": patch_size, "geometry": geometry}, sort_keys=True
    )
    return image


def save_group(image: Image.Image, path, compress_level: int = 6) -> None:
    """Writes a group image as PNG (a path or a file) with its geometry in the PNG's text."""
    text = PngInfo()
    text.add_text(METADATA_KEY, image.info[METADATA_KEY])
    image.save(path, format="PNG", pnginfo=text, compress_level=compress_level)


def looks_like_group(rgba: np.ndarray) -> bool:
    """Whether the alpha of uint8 `[H, W, 4]` says that this is a patch group: values in {0, 253, 254}, one owned."""
    present = np.bincount(rgba[..., 3].reshape(-1), minlength=256) > 0
    owned = present[list(GROUP_ALPHA)].any()
    return bool(owned and not present[1 : GROUP_ALPHA[0]].any() and not present[255])


def read_group(
    rgba: np.ndarray, side: int, patch_size: int, geometry: str = "", metadata: str | None = None
) -> PatchGroup:
    """The group that an RGBA image is.

    Args:
        rgba: uint8 `[H, W, 4]` for which `looks_like_group` holds.
        side, patch_size, geometry: the model's.
        metadata: the PNG's text under `METADATA_KEY`, if the image came with it.

    Raises:
        ValueError: wrong size, another geometry, mixed kinds, or alpha that varies inside a patch.
    """
    if rgba.shape[:2] != (side, side):
        raise ValueError(
            f"A patch group is {rgba.shape[1]} x {rgba.shape[0]} pixels; wanted {side} x {side}, the model's geometry."
        )
    if metadata is not None:
        found = json.loads(metadata)
        wanted = {"image_size": side, "patch_size": patch_size, "geometry": geometry}
        for name, value in wanted.items():
            if found.get(name) not in (value, ""):
                raise ValueError(f"A patch group was made with {name} {found.get(name)!r}; wanted {value!r}.")
    alpha = rgba[..., 3]
    kinds = [kind for kind, value in enumerate(GROUP_ALPHA) if (alpha == value).any()]
    if len(kinds) != 1:
        raise ValueError(
            f"A patch group's alpha mixes {list(GROUP_ALPHA)}; wanted one of them: a group is background or object."
        )
    cells = patch_blocks(alpha[..., None], patch_size)[..., 0]  # [P, p, p]
    uniform = (cells == cells[:, :1, :1]).all(axis=(1, 2))
    if not uniform.all():
        raise ValueError(
            f"A patch group's alpha varies inside patch {int(np.argmin(uniform))}; wanted one value per "
            f"{patch_size} x {patch_size} patch."
        )
    patch_mask = cells[:, 0, 0] > 0
    grid = side // patch_size * patch_size
    if alpha[grid:].any() or alpha[:, grid:].any() or not patch_mask.any():
        raise ValueError("A patch group owns pixels outside its patch grid only; wanted at least one patch.")
    return make_group(np.ascontiguousarray(rgba[..., :3]), patch_mask, kinds[0], patch_size)
