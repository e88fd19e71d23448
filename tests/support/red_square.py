"""The picture that the red detector finds an object in, and its groups."""

import numpy as np
import tiny
from PIL import Image

from backdrop.processing.patch_groups_backdrop import group_to_image


def scene(x: int = 0, y: int = 0, width: int = 14) -> Image.Image:
    """A 56 px grey gradient with one red square at (x, y); width 0: none."""
    pixels = np.full((tiny.SIDE, tiny.SIDE, 3), 90, dtype=np.uint8)
    pixels[..., 2] = np.arange(tiny.SIDE)[:, None] * 3
    pixels[y : y + width, x : x + width] = (255, 0, 0)
    return Image.fromarray(pixels)


def groups_of(processor, image, **options):
    groups = processor.image_groups([image], **options)[0]
    return [group_to_image(group, tiny.PATCH, processor.geometry()) for group in groups]
