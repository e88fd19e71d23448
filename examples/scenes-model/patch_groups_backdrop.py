"""Patch groups as values: which group owns which patches, and a group as an RGBA image.

Pure functions on numpy arrays. `S` is the side of the image as the model sees it, `P` the number of patches of its
grid (row by row), `p` the patch size in pixels. Where `S` is not a multiple of `p`, the remainder at the right and
the bottom belongs to no patch.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

BACKGROUND, OBJECT = 0, 1
GROUP_KINDS = ("background", "object")
# Alpha of owned pixels by group kind. Ordinary images do not have these by chance: a cut-out has 255 or a gradient.
GROUP_ALPHA = (253, 254)
METADATA_KEY = "backdrop"  # of a PNG's text


@dataclass(frozen=True)
class PatchGroup:
    """Pixels at the model's geometry, and the patches of them that the group owns.

    Attributes:
        pixels: uint8 `[S, S, 3]`, 0 outside the owned patches.
        patch_mask: bool `[P]`, at least one True.
        kind: the group kind, `BACKGROUND` or `OBJECT`.
    """

    pixels: np.ndarray
    patch_mask: np.ndarray
    kind: int


def make_group(pixels: np.ndarray, patch_mask: np.ndarray, kind: int, patch_size: int) -> PatchGroup:
    """A group whose pixels are 0 outside its patches, so that equal groups are equal bytes.

    Args:
        pixels: uint8 `[S, S, 3]`, the whole image.
        patch_mask: bool `[P]`, the patches that the group owns.
        kind: `BACKGROUND` or `OBJECT`.
        patch_size: pixels.
    """
    return PatchGroup(only_owned(pixels, patch_mask, patch_size), patch_mask.astype(bool), kind)


def only_patches(groups: list[PatchGroup], patches: np.ndarray, patch_size: int) -> list[PatchGroup]:
    """The groups without what they own beyond some patches; a group that keeps none is left out.

    Args:
        groups: of one image.
        patches: bool `[P]`, those that may be owned.
        patch_size: pixels.
    """
    if patches.all():
        return groups
    kept = [make_group(group.pixels, group.patch_mask & patches, group.kind, patch_size) for group in groups]
    return [group for group in kept if group.patch_mask.any()]


def only_owned(pixels: np.ndarray, patch_mask: np.ndarray, patch_size: int) -> np.ndarray:
    """A copy of uint8 `[S, S, 3]` that is 0 outside the patches of bool `[P]`."""
    side = pixels.shape[0]
    grid = side // patch_size
    inner = grid * patch_size
    # A line of patches at a time, so that the innermost loop is over contiguous memory.
    lines = (
        patch_mask.astype(bool).reshape(grid, 1, grid).repeat(patch_size * 3, axis=2).astype(np.uint8)
    )  # [g, 1, inner * 3]
    owned = np.zeros_like(pixels, shape=(side, side * 3))
    np.multiply(
        pixels[:inner].reshape(grid, patch_size, side * 3)[..., : inner * 3],
        lines,
        out=owned[:inner].reshape(grid, patch_size, side * 3)[..., : inner * 3],
    )
    return owned.reshape(pixels.shape)


def pixel_mask(patch_mask: np.ndarray, side: int, patch_size: int) -> np.ndarray:
    """Patches to their pixels: bool `[P]` -> bool `[S, S]`; the remainder at the right and the bottom is False."""
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
    """The number of patches along a side of the square grid that `patch_mask [P]` is about."""
    return math.isqrt(len(patch_mask))


def grow_patches(patch_mask: np.ndarray, margin: int) -> np.ndarray:
    """Patches within `margin` patches of an owned one, diagonals too: `[P]` bool -> `[P]` bool."""
    grid = grid_side(patch_mask)
    grown = patch_mask.reshape(grid, grid).copy()
    for across in (grown, grown.T):  # lines, then columns
        before = across.copy()
        for step in range(1, min(margin, grid - 1) + 1):
            across[step:] |= before[:-step]
            across[:-step] |= before[step:]
    return grown.reshape(-1)


def split_patches(
    object_patches: np.ndarray, margin: int = 0, overlap: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The patches of the background group and of the object group, bool `[P]` each.

    Args:
        object_patches: `[P]` bool, patches that hold detected objects.
        margin: patches by which the object region grows.
        overlap: the background keeps the grown ring too.
    """
    grown = grow_patches(object_patches, margin)
    return ~(object_patches if overlap else grown), grown


def patch_blocks(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """An image cut into its patches: `[S, S, C]` -> `[P, p, p, C]`, without the remainder."""
    grid = pixels.shape[0] // patch_size
    inner = pixels[: grid * patch_size, : grid * patch_size]
    blocks = inner.reshape(grid, patch_size, grid, patch_size, -1).swapaxes(1, 2)
    return blocks.reshape(grid * grid, patch_size, patch_size, -1)


def group_to_image(group: PatchGroup, patch_size: int, geometry: str = "") -> Image.Image:
    """A group as an RGBA image that carries its geometry.

    Args:
        group: the group.
        patch_size: pixels.
        geometry: how its image became `S x S`, see `BackdropImageProcessor.geometry`; "" where that is not known.

    Returns:
        `S x S`, with `GROUP_ALPHA` of the group kind in owned patches and 0 elsewhere; `save_group` writes it.
    """
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
    """Writes a group image as PNG with its geometry in the PNG's text, where `read_group` checks it.

    Args:
        image: from `group_to_image`.
        path: a path, or a file open for writing bytes.
        compress_level: of zlib, 0-9.
    """
    text = PngInfo()
    text.add_text(METADATA_KEY, image.info[METADATA_KEY])
    image.save(path, format="PNG", pnginfo=text, compress_level=compress_level)


def looks_like_group(rgba: np.ndarray) -> bool:
    """Whether an image has a patch group's alpha: values of {0, 253, 254} only, and not 0 alone.

    Args:
        rgba: uint8 `[H, W, 4]`.
    """
    present = np.bincount(rgba[..., 3].reshape(-1), minlength=256) > 0
    owned = present[list(GROUP_ALPHA)].any()
    return bool(owned and not present[1 : GROUP_ALPHA[0]].any() and not present[255])


def read_group(
    rgba: np.ndarray, side: int, patch_size: int, geometry: str = "", metadata: str | None = None
) -> PatchGroup:
    """The group that an RGBA image holds.

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
        found = _read_metadata(metadata)
        wanted = {"image_size": side, "patch_size": patch_size, "geometry": geometry}
        for name, value in wanted.items():
            # A group may not know how its image became S x S.
            if found.get(name) != value and not (name == "geometry" and found.get(name) == ""):
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


def _read_metadata(text: str) -> dict:
    """The values of a PNG's text.

    Raises:
        ValueError: it is damaged.
    """
    try:
        values = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"A patch group's text {METADATA_KEY!r} is damaged ({error}); wanted JSON."
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"A patch group's text {METADATA_KEY!r} is damaged ({text[:60]!r}); wanted a JSON object."
        )
    return values
