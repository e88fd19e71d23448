"""Pixels of patch groups to the vision tower's input: rescaled and normalised, each grey level once."""

from collections.abc import Sequence

import numpy as np
from transformers.image_processing_backends import PilBackend


def pixel_values(images: Sequence[np.ndarray], options: dict, backend: PilBackend) -> np.ndarray:
    """What the vision tower takes, float32 `[G, 3, S, S]`.

    Rescaling and normalising treat every pixel of a channel alike, so they are done for the 256 grey levels, and each pixel
    is looked up.

    Args:
        images: uint8 `[S, S, 3]` each, at least one.
        options: a complete set of an image processor's options.
        backend: whose `rescale` and `normalize` are used.
    """
    levels = normalized_levels(options, backend)
    values = np.empty((len(images), 3, *images[0].shape[:2]), dtype=np.float32)
    for image, out in zip(images, values, strict=True):
        for channel in range(3):
            out[channel] = np.take(levels[channel], image[..., channel])
    return values


def normalized_levels(options: dict, backend: PilBackend) -> np.ndarray:
    """What each grey level of each channel becomes, float32 `[3, 256]`."""
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    if options["do_rescale"]:
        levels = backend.rescale(levels, options["rescale_factor"])
    if options["do_normalize"]:
        levels = backend.normalize(levels, options["image_mean"], options["image_std"])
    return np.ascontiguousarray(levels[:, 0], dtype=np.float32)
