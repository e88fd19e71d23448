"""The images of a request: fetched together, then decoded and split one at a time."""

import asyncio
from collections.abc import Awaitable, Callable

from PIL import Image

from backdrop.processing.image_loading_backdrop import rgb_array
from backdrop.processing.patch_groups_backdrop import METADATA_KEY

from .frames import FrameSplitter, SplitFrame
from .image_decoding import decode_data_url, open_image
from .image_fetching import Budget, ImageFetcher
from .problems import ApiError
from .settings import Limits


async def fetch_images(
    urls: list[str], limits: Limits, fetcher: ImageFetcher, in_thread: Callable[..., Awaitable]
) -> list[bytes]:
    """The encoded images at URLs, in order.

    Args:
        urls: data:, http:, https:, or bare base64.
        limits: bounds on each image, and (`body_bytes`) on all fetched ones together.
        fetcher: for http: and https:.
        in_thread: runs a function and its arguments in a worker thread.

    Raises:
        ApiError: 400, 413 or 504, of the first image that cannot be had; the others are given up.
    """
    budget = Budget(limits.body_bytes)

    async def fetch(url: str) -> bytes:
        begin = url[:64].strip().lower()
        if begin.startswith("data:") or ":" not in begin:  # base64 has no colon
            return await in_thread(decode_data_url, url, limits.image_bytes)
        return await fetcher.fetch(url.strip(), budget)

    tasks = [asyncio.ensure_future(fetch(url)) for url in urls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:  # where one failed, the others are worth nothing
            task.cancel()


def split_image(
    data: bytes,
    splitter: FrameSplitter,
    namespace: str,
    limits: Limits,
    split: bool = True,
    match: bool = True,
    tolerance: float | None = None,
) -> SplitFrame:
    """Decodes an image and splits it into its patch groups; the pixels are not kept.

    A megabyte of a request can hold a gigabyte of pixels: call it for one image of a request at a time.

    Args:
        data: the encoded image, or patch group.
        splitter: finds the background and the objects.
        namespace: of the references that it may match.
        limits: bounds on its pixels.
        split: False gives the whole image as one background group, and matches nothing.
        match, tolerance: see `FrameSplitter.split`.

    Raises:
        ApiError: 400, no image, or an RGBA image that is no valid patch group; 413, too many pixels.
    """
    image = open_image(data, limits.image_pixels, limits.photo_pixels)
    # A client's picture may happen to have a group's alpha; a group that was sent as one carries its mark.
    if METADATA_KEY not in image.info and image.has_transparency_data:
        image = Image.fromarray(rgb_array(image))
    # Padding to a square may turn a thin image into many more pixels than it has.
    most = 4 * limits.image_pixels
    if splitter.pads and max(image.size) ** 2 > most:
        raise ApiError(
            413,
            f"an image has {image.width} x {image.height} pixels, and the model pads it to a square; wanted at most "
            f"{most:,} pixels then",
            "image_too_large",
        )
    try:
        return splitter.split(image, namespace, match=split and match, split=split, tolerance=tolerance)
    except (ValueError, AttributeError, RecursionError) as error:  # a patch group that is not valid
        raise ApiError(400, f"an image cannot be split: {str(error):.300}", "invalid_image") from None
