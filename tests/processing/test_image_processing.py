"""The image processor: options, splitting, groups taken as they stand, and copies of it."""

import copy
import pickle

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from red_detector import RedDetector
from red_square import groups_of, scene

from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import BACKGROUND, OBJECT, group_to_image
from backdrop.processing.pixel_values_backdrop import pixel_values

SIZES = {"size": {"shortest_edge": tiny.SIDE}, "crop_size": {"height": tiny.SIDE, "width": tiny.SIDE}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 1.5}, "confidence is 1.5"),
        ({"objects": "some"}, "objects is 'some'"),
        ({"margin": -1}, "margin is -1"),
        ({"min_coverage": 2.0}, "min_coverage is 2.0"),
    ],
)
def test_bad_options_are_named_at_construction_and_at_the_call(image_processor, options, message):
    with pytest.raises(ValueError, match=message):
        BackdropImageProcessor(**SIZES, **options)
    with pytest.raises(ValueError, match=message):
        image_processor(scene(), **options)


# ---- splitting


def test_a_red_square_becomes_the_object_group(image_processor):
    background, objects = image_processor.image_groups([scene(14, 28)])[0]
    assert (background.kind, objects.kind) == (BACKGROUND, OBJECT)
    assert np.flatnonzero(objects.patch_mask).tolist() == [9]
    assert np.array_equal(background.patch_mask, ~objects.patch_mask)
    assert not background.pixels[28:42, 14:28].any() and (objects.pixels[28:42, 14:28] == (255, 0, 0)).all()


def test_margin_overlap_and_whole_images(image_processor):
    options = {"margin": 1, "overlap": True}
    background, objects = image_processor.image_groups([scene(14, 14)], **options)[0]
    assert objects.patch_mask.sum() == 9 and background.patch_mask.sum() == 15
    (whole,) = image_processor.image_groups([scene(14, 14)], split=False)[0]
    assert whole.kind == BACKGROUND and whole.patch_mask.all()


def test_nothing_found_is_one_background_and_everything_one_object(image_processor):
    (nothing,) = image_processor.image_groups([scene(width=0)])[0]
    assert nothing.kind == BACKGROUND and nothing.patch_mask.all()
    (everything,) = image_processor.image_groups([scene(width=56)])[0]
    assert everything.kind == OBJECT and everything.patch_mask.all()


def test_a_batch_runs_the_detector_once_and_equals_single_images(image_processor, detector):
    images = [scene(0, 0), scene(width=0), scene(28, 14)]
    together = image_processor(images, return_tensors="pt")
    assert detector.calls == 3
    assert together["groups_per_image"].tolist() == [2, 1, 2]
    singles = [image_processor(image, return_tensors="pt") for image in images]
    for name in ("pixel_values", "patch_mask", "group_kind"):
        assert torch.equal(together[name], torch.cat([single[name] for single in singles]))


def test_images_prepared_by_threads_stay_in_order_and_the_first_bad_one_is_named(image_processor):
    photos = [tiny.photo(60 + i, 50 + 3 * i, seed=i) for i in range(9)]
    group = group_to_image(
        image_processor.image_groups([photos[0]], split=False)[0][0], image_processor.patch_size
    )
    images = [*photos[:4], group, *photos[4:]]
    together = image_processor(images, split=False, return_tensors="pt")
    for i, image in enumerate(images):
        alone = image_processor(image, split=False, return_tensors="pt")
        assert torch.equal(together["pixel_values"][i], alone["pixel_values"][0])
        assert torch.equal(together["patch_mask"][i], alone["patch_mask"][0])
    bad = np.full((20, 20, 3), 300.0)
    worse = np.full((20, 20, 3), np.nan)
    with pytest.raises(ValueError, match="to 300"):
        image_processor([photos[0], bad, photos[1], worse], split=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.3, 0.2, 1.7]},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
    ],
    ids=str,
)
def test_looked_up_pixels_are_the_normalised_ones(image_processor, options):
    own = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    options = {name: getattr(image_processor, name) for name in own} | options
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    array = np.moveaxis(image, -1, 0)
    if options["do_rescale"]:
        array = image_processor.rescale(array, options["rescale_factor"])
    if options["do_normalize"]:
        array = image_processor.normalize(array, options["image_mean"], options["image_std"])
    found = pixel_values([image, image[::-1]], options, image_processor)
    assert found.dtype == np.float32
    assert found[0].tobytes() == np.ascontiguousarray(array, dtype=np.float32).tobytes()
    assert found[1].tobytes() == np.ascontiguousarray(found[0][:, ::-1]).tobytes()


def test_without_a_detector_an_image_is_an_error_and_a_group_is_not(image_processor):
    bare = BackdropImageProcessor(**SIZES)
    with pytest.raises(ValueError, match="holds no detector.safetensors"):
        bare(scene())
    group = groups_of(image_processor, scene())[0]
    assert bare(group, return_tensors="pt")["pixel_values"].shape[0] == 1
    assert bare(scene(), split=False, return_tensors="pt")["patch_mask"].all()


# ---- contract 1: an image and its own groups are the same thing


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 42), st.integers(0, 42), st.integers(0, 30))
def test_an_image_and_its_groups_give_identical_inputs(x, y, width):
    processor = BackdropImageProcessor(**SIZES, margin=0)
    processor.set_detector(RedDetector())
    image = scene(x, y, width)
    groups = groups_of(processor, image)
    ordinary, ready = processor(image, return_tensors="pt"), processor(groups, return_tensors="pt")
    for name in ("pixel_values", "patch_mask", "group_kind"):
        assert torch.equal(ordinary[name], ready[name])


# ---- what others ask of it


def test_side_and_number_of_patches():
    processor = BackdropImageProcessor(**SIZES, patch_size=13)
    assert (processor.image_side, processor.num_patches) == (56, 16)
    with pytest.raises(ValueError, match="wanted one fixed square"):
        _ = BackdropImageProcessor(do_center_crop=False).image_side


def test_the_detector_is_loaded_once_and_a_missing_one_is_known_before(image_processor, detector):
    assert image_processor.has_detector and image_processor.loaded_detector is detector
    assert image_processor.load_detector() is detector
    bare = BackdropImageProcessor(**SIZES)
    assert not bare.has_detector and bare.loaded_detector is None
    assert BackdropImageProcessor(**SIZES, detector="yolov8n.pt").has_detector
    with pytest.raises(ValueError, match="the processor has no detector"):
        bare.load_detector()


def test_a_twin_shares_the_detector_and_not_the_references(image_processor, detector):
    matcher = image_processor.enable_background_matching()
    twin = image_processor.twin()
    assert twin.loaded_detector is detector and twin.background_matching is None
    twin.enable_background_matching()
    twin.image_groups([scene()])
    assert image_processor.background_matching is matcher and matcher.stats()["references"] == 0
    twin.set_detector(RedDetector())
    assert image_processor.loaded_detector is detector


# ---- copies


def test_copies_and_pickles_leave_the_live_parts_behind(processor):
    processor.enable_background_matching()
    repr(processor)
    for twin in (
        copy.deepcopy(processor.image_processor),
        pickle.loads(pickle.dumps(processor.image_processor)),
    ):
        assert twin.background_matching is None
        assert twin.to_dict() == processor.image_processor.to_dict()
