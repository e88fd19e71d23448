"""The images of one call, of any kind: patch groups as they stand, ordinary pictures as the model sees them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend

from .image_geometry_backdrop import ImageGeometry
from .image_loading_backdrop import is_group, rgb_picture, rgba_array, upright
from .lost_groups_backdrop import lost_group
from .patch_groups_backdrop import METADATA_KEY, PatchGroup, read_group
from .picture_placement_backdrop import PicturePlacement

MAX_THREADS = 4  # that prepare the images of one call
NOTED_LOSS = 0.1  # share of an image's width or height; beyond it a crop is worth a warning


def placed_image(image, options: dict, backend: PilBackend) -> tuple[np.ndarray, PicturePlacement]:
    """An ordinary image as the model sees it, uint8 `[S, S, 3]`, and where its picture lies in that square.

    Args:
        image: PIL image, numpy array or torch tensor.
        options: a complete set of an image processor's options.
        backend: see `ImageGeometry.apply`.
    """
    geometry = ImageGeometry.from_options(options)
    picture = rgb_picture(upright(image), options.get("input_data_format"))
    return geometry.apply(picture, backend), geometry.place(picture.width, picture.height, backend)


def prepared_images(
    images: Sequence, options: dict, backend: PilBackend
) -> list[PatchGroup | tuple[np.ndarray, PicturePlacement]]:
    """Each image as the group that it is, or as `placed_image` gives it.

    Args:
        images: a flat list of what `placed_image` takes.
        options: a complete set of an image processor's options.
        backend: see `ImageGeometry.apply`.

    Raises:
        ValueError: a patch group that does not fit this model, or an image that is none.
    """
    geometry, patch_size = ImageGeometry.from_options(options), options["patch_size"]

    def prepare(image) -> PatchGroup | tuple[np.ndarray, PicturePlacement]:
        image = upright(image)
        rgba = rgba_array(image)
        if rgba is not None and is_group(image, geometry.side):
            metadata = image.info.get(METADATA_KEY) if isinstance(image, Image.Image) else None
            return read_group(rgba, geometry.side, patch_size, geometry.name, metadata)
        lost = lost_group(image, geometry.side, patch_size)
        if lost is not None:
            raise ValueError(
                f"An image was a patch group once ({lost}); wanted it as it was made, RGBA of {geometry.side} x "
                f"{geometry.side} pixels in a lossless format, or the image that it was made from."
            )
        return placed_image(image, options, backend)

    if len(images) < 2:
        return [prepare(image) for image in images]
    # PIL resizes without the interpreter's lock.
    with ThreadPoolExecutor(min(MAX_THREADS, len(images))) as pool:
        return list(pool.map(prepare, images))


def crop_warning(placement: PicturePlacement, options: dict) -> str | None:
    """What a user should know of an image that loses more than `NOTED_LOSS` of a side to the crop; None: nothing.

    Args:
        placement: of the image.
        options: a complete set of an image processor's options.
    """
    width, height = placement.lost
    if options["fit"] != "crop" or max(width, height) <= NOTED_LOSS:
        return None
    share, side = (width, "width") if width >= height else (height, "height")
    return (
        f"An image of {placement.width} x {placement.height} px is cropped to its centre: {share:.0%} of its {side} is cut "
        "off, and the model never sees it. The image processor's option fit='pad' shows it all with bars, fit='stretch' "
        "shows it all distorted; either suits a model that was trained so. This is said once."
    )
