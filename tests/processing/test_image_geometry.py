"""From a picture of any size to the model's square, as transformers' LLaVA processor does it."""

import pytest
import tiny
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

SIZES = {"size": {"shortest_edge": tiny.SIDE}, "crop_size": {"height": tiny.SIDE, "width": tiny.SIDE}}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_pad": True, "size": {"height": 56, "width": 56}},
        {"do_center_crop": False, "size": {"height": 56, "width": 56}},
        {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(80, 60), (56, 56), (30, 200), (1, 1), (1, 600), (601, 1)])
def test_pixels_equal_transformers_llava_processor(size, options):
    image = tiny.photo(*size)
    ours = BackdropImageProcessor(**{**SIZES, **options}, split=False)(image, return_tensors="pt")
    theirs = LlavaImageProcessorPil(**{**SIZES, **options})(image, return_tensors="pt")
    difference = (ours["pixel_values"] - theirs["pixel_values"]).abs().max()
    # The short cut for extreme shapes may round differently, by a few of 255 grey levels.
    extreme = max(size) > 16 * min(size) and not options.get("do_pad") and "do_center_crop" not in options
    assert difference == 0 or (extreme and difference < 0.06)


def test_a_hundred_megapixels_and_a_pixel_wide(image_processor):
    big = Image.new("RGB", (10_000, 10_000), (10, 20, 30))
    thin = Image.new("RGB", (1, 200_000), (10, 20, 30))
    for image in (big, thin):
        assert (image_processor.model_images([image])[0] == (10, 20, 30)).all()
