"""Images that are not square: cropped, padded or stretched, what is lost, who owns padding, what the detector sees."""

import json
import logging

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from red_detector import RedDetector
from red_square import groups_of
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from backdrop.processing.detections_backdrop import Detections
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import BACKGROUND, OBJECT, group_to_image, save_group
from backdrop.processing.processing_backdrop import BackdropProcessor

FITS = ("crop", "pad", "stretch")
SIDE = {"height": tiny.SIDE, "width": tiny.SIDE}
# The same square pictures, from three kinds of checkpoints.
CHECKPOINTS = {
    "crop": {"size": {"shortest_edge": tiny.SIDE}, "crop_size": SIDE},
    "pad": {"size": {"shortest_edge": tiny.SIDE}, "crop_size": SIDE, "do_pad": True},
    "stretch": {"size": SIDE, "do_center_crop": False},
}


def processor_of(checkpoint: str = "crop", **options) -> BackdropImageProcessor:
    processor = BackdropImageProcessor.from_dict({**CHECKPOINTS[checkpoint], "margin": 0}, **options)
    processor.set_detector(RedDetector())
    return processor


def with_red(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """Grey with one strongly red rectangle."""
    image = Image.new("RGB", (width, height), (90, 90, 120))
    image.paste((255, 0, 0), box)
    return image


# ---- one option for the steps


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_checkpoint_without_the_option_keeps_its_own(checkpoint):
    assert processor_of(checkpoint).fit == checkpoint


@pytest.mark.parametrize("size", [(80, 60), (60, 97), (56, 56), (3, 5), (200, 13)])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_pixels_are_those_of_llavas_processor_with_the_steps_of_the_fit(checkpoint, fit, size):
    image = tiny.photo(*size)
    theirs = LlavaImageProcessorPil(**CHECKPOINTS[fit])(image, return_tensors="pt")["pixel_values"]
    at_construction = processor_of(checkpoint, fit=fit)
    set_later, at_the_call = processor_of(checkpoint), processor_of(checkpoint)
    set_later.fit = fit
    for processor, options in ((at_construction, {}), (set_later, {}), (at_the_call, {"fit": fit})):
        found = processor(image, split=False, return_tensors="pt", **options)["pixel_values"]
        assert torch.equal(found, theirs)
    assert at_construction.fit == set_later.fit == fit and at_the_call.fit == checkpoint


@pytest.mark.parametrize("name", ["do_pad", "fit"])
def test_the_steps_and_the_option_follow_each_other(name):
    processor = processor_of("crop")
    setattr(processor, name, {"do_pad": True, "fit": "pad"}[name])
    assert (processor.fit, processor.do_pad) == ("pad", True)
    processor.fit = "crop"
    assert processor.do_pad is False
    image = tiny.photo(80, 60)
    by_step = processor(image, do_pad=True, split=False, return_tensors="pt")["pixel_values"]
    by_fit = processor(image, fit="pad", split=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(by_step, by_fit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "cover"}, "fit is 'cover'; wanted one of crop, pad, stretch"),
        ({"fit": "crop", "do_pad": True}, "fit is 'crop' and do_pad is True"),
        ({"fit": "pad", "do_resize": False}, "do_resize False"),
        ({"fit": "pad", "size": {"max_height": 56, "max_width": 56}}, "fit is 'pad', but"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        BackdropImageProcessor(**{**CHECKPOINTS["crop"], **options})
    if options["fit"] != "crop":  # the processor's own: nothing says that it was asked for
        with pytest.raises(ValueError, match=message):
            processor_of()(tiny.photo(), split=False, **options)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_square_picture_is_the_same_bit_for_bit_whatever_the_fit(checkpoint):
    image = tiny.photo(73, 73)
    found = [
        processor_of(checkpoint, fit=fit, own_padding=own)(image, split=False, return_tensors="pt")
        for fit in FITS
        for own in (True, False)
    ]
    for other in found[1:]:
        for name in ("pixel_values", "patch_mask", "group_kind"):
            assert torch.equal(other[name], found[0][name])


def test_a_zoom_of_the_checkpoint_stays():
    """Resized to 64 and cropped to 56: what a square picture loses there, it loses with every fit."""
    zoom = {"size": {"shortest_edge": 64}, "crop_size": SIDE}
    image = tiny.photo(90, 90)
    found = [
        BackdropImageProcessor(**zoom, fit=fit)(image, split=False, return_tensors="pt")["pixel_values"]
        for fit in FITS
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    names = {BackdropImageProcessor(**zoom, fit=fit).geometry() for fit in FITS}
    assert len(names) == 3


# ---- where the picture lies


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(FITS), st.sampled_from(list(CHECKPOINTS)))
def test_the_placement_is_where_the_picture_is(width, height, fit, checkpoint):
    """A white picture on black padding, averaged: a patch has light exactly where the placement says."""
    black = {"image_mean": [0.0] * 3, "resample": Image.Resampling.BOX}
    processor = processor_of(checkpoint, fit=fit, **black)
    white = Image.new("RGB", (width, height), (255, 255, 255))
    (pixels, placement), light = processor.placed_images(white)[0], None
    light = pixels.astype(int).sum(-1)
    patches = placement.picture_patches(tiny.PATCH).reshape(4, 4)
    cells = light.reshape(4, tiny.PATCH, 4, tiny.PATCH)
    # Less than half a grey level of light is rounded away.
    assert not (cells.max(axis=(1, 3)) > 0)[~patches].any()
    thin = min(width, height) / max(width, height) * tiny.SIDE < 1
    assert thin or (cells.sum(axis=(1, 3)) > 0)[patches].all() or placement.padded == 0
    assert abs(light.mean() / 765 - (1 - placement.padded)) < 0.02  # resampling rounds at two edges
    assert patches.any()
    left, top, right, bottom = placement.kept_box
    lost = (1 - (right - left) / width, 1 - (bottom - top) / height)
    assert np.allclose(lost, placement.lost) and (fit == "crop" or max(lost) == 0)
    assert fit == "pad" or placement.padded == 0


def test_of_a_wide_frame_336_patches_are_its_own_and_of_a_phone_264():
    processor = BackdropImageProcessor(fit="pad", own_padding=False)
    wide, phone = Image.new("RGB", (1920, 1080)), Image.new("RGB", (1080, 2400))
    masks = processor([wide, phone], split=False, return_tensors="pt")["patch_mask"]
    assert masks.sum(-1).tolist() == [336, 24 * 12]
    assert masks[0].reshape(24, 24)[5:19].all() and masks[1].reshape(24, 24)[:, 6:18].all()
    whole = processor([wide], split=False, own_padding=True, return_tensors="pt")["patch_mask"]
    assert whole.all()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (1, 1), (2, 1), (1, 3), (17, 4000)])
def test_extreme_and_tiny_pictures(size, fit):
    processor = processor_of(fit=fit, own_padding=False)
    image = Image.new("RGB", size, (10, 200, 30))
    (groups,) = processor.image_groups([image])
    assert sum(group.patch_mask.any() for group in groups) == len(groups) > 0
    assert processor(image, return_tensors="pt")["pixel_values"].shape[1:] == (3, tiny.SIDE, tiny.SIDE)


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1)])
def test_a_very_long_picture_is_padded_without_a_square_of_gigabytes(size):
    processor = processor_of(fit="pad")
    pixels = processor.model_images([Image.new("RGB", size, (10, 200, 30))])[0]
    assert (pixels == tuple(int(value * 255) for value in processor.image_mean)).all()


@pytest.mark.parametrize("size", [(9000, 300), (300, 9000)])
def test_the_short_cut_for_long_pictures_is_the_square(size, monkeypatch):
    from backdrop.processing import image_geometry_backdrop as geometry

    image = tiny.photo(*size)
    short = processor_of(fit="pad").model_images([image])[0].astype(int)
    monkeypatch.setattr(geometry, "LARGE_SQUARE", 10**6)
    square = processor_of(fit="pad").model_images([image])[0]
    # PIL resizes lines first, and rounds in between.
    assert np.abs(short - square).max() <= 1
    assert size[1] > size[0] or (short == square).all()


# ---- padding that nobody owns


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_an_image_and_its_own_groups_are_the_same_thing(data):
    width, height = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 120))
    fit, own = data.draw(st.sampled_from(FITS)), data.draw(st.booleans())
    margin = data.draw(st.integers(0, 2))
    processor = processor_of(fit=fit, own_padding=own)
    processor.margin = margin
    x, y = data.draw(st.integers(0, width)), data.draw(st.integers(0, height))
    image = with_red(width, height, (x, y, min(width, x + 30), min(height, y + 30)))
    groups = groups_of(processor, image)
    ordinary, ready = processor(image, return_tensors="pt"), processor(groups, return_tensors="pt")
    for name in ("pixel_values", "patch_mask", "group_kind"):
        assert torch.equal(ordinary[name], ready[name])
    ((_, placement),) = processor.placed_images([image])
    shown = torch.from_numpy(placement.picture_patches(tiny.PATCH))
    assert torch.equal(ordinary["patch_mask"].any(0), shown | own)


def test_the_fit_travels_with_a_group_and_another_is_refused(tmp_path):
    path = tmp_path / "group.png"
    padding = processor_of(fit="pad", own_padding=False)
    group = padding.image_groups([tiny.photo(80, 40)], split=False)[0][0]
    save_group(group_to_image(group, tiny.PATCH, padding.geometry()), path)
    read = padding.fetch_images(str(path))
    assert torch.equal(
        padding(read, return_tensors="pt")["patch_mask"][0], torch.from_numpy(group.patch_mask)
    )
    for other in ("crop", "stretch"):
        with pytest.raises(ValueError, match="made with geometry 'pad.resize"):
            processor_of(fit=other)(read)


@pytest.mark.parametrize("own", [True, False])
def test_matching_reuses_a_padded_background_and_never_gives_padding_away(own):
    processor = processor_of(fit="pad", own_padding=own)
    matcher = processor.enable_background_matching(tolerance=0)
    # The bars are a patch each; the object stands at the picture's edge, so that its margin reaches into one.
    processor.margin = 1
    first, second = (with_red(56, 28, (x, 0, x + 8, 8)) for x in (0, 45))
    shown = np.repeat([False, True, True, False], 4)
    for image in (first, second, second):
        groups = processor.image_groups([image])[0]
        owned = np.logical_or.reduce([group.patch_mask for group in groups])
        assert np.array_equal(owned, shown | own)
        assert [group.kind for group in groups] == [BACKGROUND, OBJECT]
        for group in groups:
            assert own or not group.pixels[:14].any()
    assert matcher.stats()["matches"] >= 1


def test_several_sizes_in_one_call_are_what_they_are_alone():
    processor = processor_of(fit="pad", own_padding=False)
    images = [with_red(*size, (4, 4, 20, 20)) for size in ((56, 28), (56, 28), (28, 56), (56, 56), (56, 28))]
    together = processor(images, return_tensors="pt")
    alone = [processor(image, return_tensors="pt") for image in images]
    for name in ("pixel_values", "patch_mask", "group_kind"):
        assert torch.equal(together[name], torch.cat([one[name] for one in alone]))


def test_the_engines_bound_of_tokens_follows_the_picture(processor):
    images = processor.image_processor
    sizes = [(28, 56), (56, 28), (56, 56)]
    assert processor._get_num_multimodal_tokens(sizes)["num_image_tokens"] == [3 * 16 + 6] * 3
    images.fit, images.own_padding = "pad", False
    bounds = processor._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    assert bounds == [3 * 8 + 6, 3 * 8 + 6, 3 * 16 + 6]
    for (height, width), bound in zip(sizes, bounds, strict=True):
        found = processor(images=with_red(width, height, (0, 0, 9, 9)), text="<image>", return_tensors="pt")
        ids = found["input_ids"]
        used = (ids == processor.image_token_id) | torch.isin(
            ids, torch.tensor(processor.separator_token_ids)
        )
        assert 8 + 4 <= int(used.sum()) <= bound


# ---- the detector


class Watching(RedDetector):
    """Keeps what it was shown; with instance masks of the red pixels beside the boxes."""

    def __init__(self, masks: bool = False):
        super().__init__()
        self.views, self.masks = [], masks

    def detect(self, images, **options):
        self.views += images
        found = super().detect(images, **options)
        if not self.masks:
            return found
        return [
            Detections(
                one.xyxy,
                one.confidence,
                one.class_id,
                one.names,
                np.stack([(image[..., 0] > 200) & (image[..., 1] < 60)] * len(one.xyxy))
                if len(one.xyxy)
                else np.zeros((0, *image.shape[:2]), dtype=bool),
            )
            for image, one in zip(images, found, strict=True)
        ]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("size", [(1600, 900), (900, 1600), (336, 336), (600, 200)])
@pytest.mark.parametrize("fit", FITS)
def test_the_detector_sees_the_picture_alone_and_undistorted(fit, size, masks):
    width, height = size
    processor = BackdropImageProcessor(fit=fit, image_mean=[1.0, 0.0, 1.0], margin=0)  # magenta bars
    detector = Watching(masks)
    processor.set_detector(detector)
    # A square object, in the middle, so that a crop keeps it.
    side = min(size) // 4
    left, top = (width - side) // 2, (height - side) // 2 + side // 2
    image = with_red(width, height, (left, top, left + side, top + side))
    ((pixels, placement),) = processor.placed_images([image])
    (found,) = processor.detections([pixels], [placement])
    (view,) = detector.views
    magenta = (view[..., 0] > 200) & (view[..., 2] > 200)
    assert magenta.mean() <= 2 / min(view.shape[:2])
    if fit == "crop":
        assert view is pixels
    else:
        assert abs(view.shape[1] / view.shape[0] / (width / height) - 1) < 0.03
    box = detector_box(view)
    assert abs((box[2] - box[0]) / (box[3] - box[1]) - 1) < 0.1  # a square object looks square
    # In the model's square the box lies around the red pixels.
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)
    rows, columns = np.nonzero(red)
    wanted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(found.xyxy[0] - wanted).max() <= 3
    if masks:
        assert found.masks.shape == (1, 336, 336)
        assert (found.masks[0] ^ red).sum() <= 0.15 * red.sum()
    covered = processor.image_groups([image])[0][-1]
    assert covered.kind == OBJECT and (covered.pixels[red] > 0).any(-1).all()


def detector_box(view):
    red = (view[..., 0] > 200) & (view[..., 1] < 60) & (view[..., 2] < 60)
    rows, columns = np.nonzero(red)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


# ---- what is said


def test_a_crop_of_more_than_a_tenth_is_told_once(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        processor = processor_of()
        processor(tiny.photo(100, 95), split=False)
        assert not caplog.messages
        processor([tiny.photo(160, 90), tiny.photo(90, 200)], split=False)
        (said,) = caplog.messages
        assert "160 x 90 px" in said and "43% of its width" in said and "fit='pad'" in said
        processor(tiny.photo(90, 200), split=False)
        assert len(caplog.messages) == 1
        processor_of()(tiny.photo(90, 200), split=False)
        assert "55% of its height" in caplog.messages[1]
        for fit in ("pad", "stretch"):
            processor_of(fit=fit)(tiny.photo(90, 200), split=False)
        assert len(caplog.messages) == 2
    finally:
        logger.removeHandler(caplog.handler)


# ---- saving


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("fit", [None, *FITS])
def test_saved_and_loaded(tmp_path, processor, checkpoint, fit):
    images = processor_of(checkpoint, own_padding=False)
    if fit is not None:
        images.fit = fit
    wanted = fit or checkpoint
    photo = tiny.photo(70, 40)
    first = images(photo, split=False, return_tensors="pt")
    for folder, written in (("alone", images), ("whole", BackdropProcessor(images, processor.tokenizer))):
        written.save_pretrained(tmp_path / folder)
        loaded = type(written).from_pretrained(tmp_path / folder)
        loaded = getattr(loaded, "image_processor", loaded)
        assert (loaded.fit, loaded.own_padding) == (wanted, False)
        again = loaded(photo, split=False, return_tensors="pt")
        for name in ("pixel_values", "patch_mask"):
            assert torch.equal(again[name], first[name])
        for other in FITS:
            changed = type(written).from_pretrained(tmp_path / folder, fit=other)
            changed = getattr(changed, "image_processor", changed)
            assert changed.fit == other
            found = changed(photo, split=False, return_tensors="pt")["pixel_values"]
            assert torch.equal(
                found, images(photo, fit=other, split=False, return_tensors="pt")["pixel_values"]
            )


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_processor_saved_before_the_option_loads_as_it_was(tmp_path, checkpoint):
    processor_of(checkpoint).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    saved = json.loads(path.read_text())
    assert saved.pop("fit") == checkpoint and saved.pop("own_padding") is True
    path.write_text(json.dumps(saved))
    for name, value in (("fit", checkpoint), ("own_padding", True)):
        assert getattr(BackdropImageProcessor.from_pretrained(tmp_path), name) == value
    assert BackdropImageProcessor.from_pretrained(tmp_path, fit="pad").do_pad is True


def test_a_saved_fit_is_replaced_by_its_steps(tmp_path):
    processor_of("crop").save_pretrained(tmp_path)
    loaded = BackdropImageProcessor.from_pretrained(tmp_path, do_pad=True)
    assert (loaded.fit, loaded.do_pad) == ("pad", True)
