"""Options of the processor and of matching: a wrong type is one line that names it."""

import numpy as np
import pytest
import torch
from PIL import Image

from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

PROCESSOR = [
    ("confidence", ["0.5", 2, -0.1, float("nan"), True, [0.5]]),
    ("objects", ["some", 3, ["all"]]),
    ("margin", ["1", 1.5, -1, True]),
    ("min_coverage", ["0", 1.1, float("inf")]),
    ("patch_size", ["14", 0, 14.5]),
    ("split", ["no", 1]),
    ("overlap", ["yes", 0]),
    ("background_first", ["no"]),
    ("classes", ["person", 3, [1.5], [True], {"person": 1}]),
    ("detector", ["", 3]),
]
MATCHING = [
    ("tolerance", ["5", -1, 256, float("nan"), True]),
    ("preset", ["cameras", True, ["camera"]]),
    ("layers", [0, 3, "2"]),
    ("strict", ["yes", 1]),
    ("min_reuse", ["0.3", 0, 1.5]),
    ("max_overridden", ["0.3", -0.1, 1.1]),
    ("detect", ["never", 1, None]),
    ("max_references", ["8", 0, 2.5, True]),
    ("ttl", ["60", 0, -1]),
    ("refresh", ["yes", 1, None]),
    ("folder", ["", 3, b""]),
]


def cases(table):
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table for value in values]


def one_line(error, name, value):
    text = str(error.value)
    assert text.startswith(f"{name} is {value!r}; wanted ") and "\n" not in text, text


@pytest.fixture
def processor():
    return BackdropImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, split=False
    )


@pytest.mark.parametrize(("name", "value"), cases(PROCESSOR))
def test_an_option_of_the_processor_is_named(processor, name, value):
    image = Image.new("RGB", (60, 60), (9, 99, 199))
    for call in (
        lambda: BackdropImageProcessor(**{name: value}),
        lambda: processor.image_groups([image], **{name: value}),
        lambda: processor.model_images([image], **{name: value}),
        lambda: processor(image, **{name: value}),
    ):
        with pytest.raises(ValueError) as error:
            call()
        one_line(error, name, value)


@pytest.mark.parametrize(("name", "value"), cases(MATCHING))
def test_an_option_of_matching_is_named(processor, name, value):
    with pytest.raises(ValueError) as error:
        processor.enable_background_matching(**{name: value})
    one_line(error, name, value)
    assert processor.background_matching is None


def test_numbers_of_numpy_are_numbers(processor):
    matcher = processor.enable_background_matching(
        np.float32(5), max_references=np.int64(8), ttl=np.float64(3)
    )
    assert matcher.tolerance == 5
    processor.image_groups([Image.new("RGB", (60, 60))], confidence=np.float32(0.5), margin=np.int64(1))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((0, 56, 3), np.uint8),
        np.zeros((56, 0, 3)),
        torch.zeros(3, 0, 0),
        Image.new("RGB", (0, 7)),
        Image.new("RGBA", (7, 0)),
    ],
    ids=lambda image: f"{type(image).__name__}{getattr(image, 'shape', getattr(image, 'size', ''))}",
)
def test_an_image_without_pixels_is_named(processor, image):
    for call in (processor.image_groups, processor.model_images):
        with pytest.raises(
            ValueError, match=r"An image (array has shape .*|has \d+ x \d+ pixels); wanted at least one"
        ):
            call([image])
