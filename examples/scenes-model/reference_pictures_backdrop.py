"""A reference as a picture for people: what it shows, and hatched what it does not own."""

import numpy as np
from PIL import Image

from .patch_groups_backdrop import pixel_mask
from .reference_store_backdrop import Reference

HATCH_STEP = 7  # pixels from line to line
HATCH_COLOURS = ((96, 100, 108), (150, 154, 162))
SECOND_LAYER = (125, 63, 181)  # the edge of its patches


def reference_picture(reference: Reference, patch_size: int) -> Image.Image:
    """The reference as RGB, `S x S`; patches of its second layer have an edge."""
    side = reference.pixels.shape[0]
    rows, columns = np.mgrid[:side, :side]
    hatch = np.array(HATCH_COLOURS, dtype=np.uint8)[((rows + columns) % HATCH_STEP < 2).astype(int)]
    owned = pixel_mask(reference.patch_mask, side, patch_size)
    picture = np.where(owned[..., None], reference.pixels, hatch)
    for layer in reference.layers[1:]:
        inside = pixel_mask(layer.patch_mask, side, patch_size)
        edge = (rows % patch_size == 0) | (columns % patch_size == 0)
        picture[inside & edge] = SECOND_LAYER
    return Image.fromarray(picture)
