"""A background in up to two layers: what has stayed long, and on it what has settled lately. Pure functions.

Each layer is a patch group of its own, with tokens and keys and values of its own. A patch that both own shows what the second one
shows. `S` is the side of the image as the model sees it, `P` its number of patches.
"""

from dataclasses import dataclass

import numpy as np

from .patch_groups_backdrop import only_owned


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: uint8 `[S, S, 3]`, 0 outside its patches, and bool `[P]`, the patches that it owns."""

    pixels: np.ndarray
    patch_mask: np.ndarray


def make_layer(pixels: np.ndarray, patch_mask: np.ndarray, patch_size: int) -> Layer:
    """A layer of uint8 `[S, S, 3]`, of which only the patches of bool `[P]` are kept."""
    return read_only(Layer(only_owned(pixels, patch_mask, patch_size), patch_mask.astype(bool)))


def read_only(layer: Layer) -> Layer:
    """The same layer, whose arrays can no longer be written."""
    layer.pixels.flags.writeable = layer.patch_mask.flags.writeable = False
    return layer


def stacked(layers: tuple[Layer, ...], patch_size: int) -> Layer:
    """What the layers show together, as one layer."""
    if len(layers) == 1:
        return layers[0]
    first, second = layers
    pixels = put_patches(first.pixels, second.pixels, second.patch_mask, patch_size)
    return read_only(Layer(pixels, first.patch_mask | second.patch_mask))


def put_patches(pixels: np.ndarray, other: np.ndarray, patch_mask: np.ndarray, patch_size: int) -> np.ndarray:
    """A copy of uint8 `[S, S, 3]` that shows `other` in the patches of bool `[P]`."""
    # x ^ (x ^ y) is y. Whole lines of bytes are an order of magnitude faster than to pick patches.
    return pixels ^ only_owned(pixels ^ other, patch_mask, patch_size)


def patch_cells(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """A view `[g, p, g, 3 p]` of `[S, S, 3]` without the remainder; writing to it writes to the image."""
    grid = pixels.shape[0] // patch_size
    inner = pixels[: grid * patch_size].reshape(grid, patch_size, -1)
    inner = inner[..., : grid * patch_size * 3]
    return np.lib.stride_tricks.as_strided(
        inner,
        (grid, patch_size, grid, patch_size * 3),
        (*inner.strides[:2], patch_size * 3 * inner.strides[2], inner.strides[2]),
        writeable=pixels.flags.writeable,
    )
