"""Matching, alone and with the background cache: never stale beyond the bound, never another's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from red_square import scene

from backdrop.processing.background_matching_backdrop import BackgroundMatcher
from backdrop.processing.patch_groups_backdrop import BACKGROUND, OBJECT, pixel_mask
from backdrop.processing.staleness_backdrop import patch_staleness

# ---- matching


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 2.0, 10.0]),
    st.lists(st.integers(0, 6), min_size=2, max_size=6),
)
def test_every_patch_is_reused_within_tolerance_or_fresh(seed, tolerance, history):
    """Contract 4's first line over random images, noise and histories."""
    rng = np.random.default_rng(seed)
    bases = [rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for _ in range(3)]
    matcher = BackgroundMatcher(14, tolerance, min_reuse=0.2, max_overridden=0.8, max_references=2)
    for step in history:
        noise = rng.normal(0, step, (56, 56, 3))
        image = np.clip(bases[step % 3] + noise, 0, 255).astype(np.uint8)
        image[: 14 * (step % 3), :14] = 0
        match = matcher.match(image)
        if match is None:
            owned = rng.random(16) < 0.8
            owned[0] = True
            matcher.add(image, owned)
            continue
        reused = ~match.fresh
        staleness = patch_staleness(match.reference.pixels, image, 14)
        assert (staleness[reused] <= tolerance).all()
        assert match.reference.patch_mask[reused].all()
        if tolerance == 0:
            same = pixel_mask(reused, 56, 14)
            assert np.array_equal(match.reference.pixels[same], image[same])
        assert matcher.stats()["references"] <= 2


def test_a_moved_object_still_hits_and_the_fresh_group_overrides(image_processor, detector):
    image_processor.enable_background_matching(tolerance=0)
    first = image_processor.image_groups([scene(14, 14)])[0]
    second = image_processor.image_groups([scene(28, 28)])[0]
    assert detector.calls == 1  # on a match the detector does not run
    assert [g.kind for g in second] == [BACKGROUND, OBJECT]
    assert np.array_equal(second[0].pixels, first[0].pixels)
    # Fresh: where the object is now, and what the reference never showed.
    assert np.flatnonzero(second[1].patch_mask).tolist() == [5, 10]
    assert second[0].patch_mask[10]


def test_an_unchanged_frame_has_no_object_group_beyond_what_the_reference_lacks(image_processor):
    image_processor.enable_background_matching(tolerance=0)
    image_processor.image_groups([scene(width=0)])
    (again,) = image_processor.image_groups([scene(width=0)])[0]
    assert again.kind == BACKGROUND and again.patch_mask.all()


def test_detect_always_adds_detected_objects(image_processor, detector):
    image_processor.enable_background_matching(tolerance=255, detect="always")
    image_processor.image_groups([scene(width=0)])
    groups = image_processor.image_groups([scene(14, 14)])[0]
    assert detector.calls == 2 and np.flatnonzero(groups[1].patch_mask).tolist() == [5]


def test_images_of_one_batch_match_each_other(image_processor):
    image_processor.enable_background_matching(tolerance=0)
    groups = image_processor.image_groups([scene(0, 0), scene(28, 28), scene(42, 0)])
    assert all(np.array_equal(g[0].pixels, groups[0][0].pixels) for g in groups)


def test_too_much_override_is_refused():
    matcher = BackgroundMatcher(14, 0, min_reuse=0.1, max_overridden=0.25)
    reference = np.zeros((56, 56, 3), dtype=np.uint8)
    matcher.add(reference, np.ones(16, dtype=bool))
    image = reference.copy()
    image[:14] = 9  # 4 of 16 patches
    find_nothing = lambda: np.zeros(16, dtype=bool)  # noqa: E731
    match = matcher.accept(image, matcher.find(image), find_objects=find_nothing)
    assert match.fresh.sum() == 4
    image[14:28, :14] = 7  # 5 of 16
    assert matcher.accept(image, matcher.find(image), find_objects=find_nothing) is None
    assert matcher.stats()["refused"] == 1
    # What the detector sees is explained.
    match = matcher.accept(image, matcher.find(image), find_objects=lambda: np.arange(16) < 5)
    assert match.fresh.sum() == 5 and matcher.stats()["detector_runs"] == 2


def test_the_reference_with_the_least_to_compute_is_chosen():
    matcher = BackgroundMatcher(14, 0)
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    worse, better = image.copy(), image.copy()
    worse[:28, :14] = 0
    better[:14, :14] = 0
    for reference in (better, worse):
        matcher.add(reference, np.ones(16, dtype=bool))
    assert np.flatnonzero(matcher.match(image).fresh).tolist() == [0]


def test_namespaces_bypass_clear_ttl_and_bytes(image_processor, detector):
    matcher = image_processor.enable_background_matching(tolerance=0, max_references=4, ttl=1000)
    with matcher.scope(namespace="a"):
        image_processor.image_groups([scene(14, 14)])
    with matcher.scope(namespace="b"):
        image_processor.image_groups([scene(28, 14)])
    with matcher.scope(namespace="a", bypass=True):
        image_processor.image_groups([scene(28, 14)])
    assert detector.calls == 3 and matcher.stats()["matches"] == 0
    with matcher.scope(namespace="a"):
        image_processor.image_groups([scene(28, 14)])
    assert detector.calls == 3 and matcher.stats()["matches"] == 1
    for step in range(5):
        matcher.add(np.full((56, 56, 3), step, dtype=np.uint8), np.ones(16, dtype=bool))
    assert matcher.stats()["references"] == 4
    assert matcher.stats()["file_bytes"] == 8 * (56 * 56 * 3 + 5 * 16)  # room for two layers each
    with matcher.scope(namespace="a"):  # the namespace with most gave way
        assert matcher.match(np.asarray(scene(14, 14))) is not None
        for step in range(5):
            matcher.add(np.full((56, 56, 3), step, dtype=np.uint8), np.ones(16, dtype=bool))
        assert matcher.match(np.asarray(scene(14, 14))) is None  # the least recently used of its own
        assert matcher.stats()["references"] == 4
    matcher.clear()
    assert matcher.stats()["references"] == 0 == matcher.stats()["bytes"]


def test_references_expire(image_processor, monkeypatch):
    matcher = image_processor.enable_background_matching(tolerance=0, ttl=100)
    now = [0.0]
    monkeypatch.setattr("backdrop.processing.reference_store_backdrop.time.monotonic", lambda: now[0])
    image = np.asarray(scene(14, 14))
    matcher.add(image, np.ones(16, dtype=bool))
    now[0] = 99
    assert matcher.match(image) is not None
    now[0] = 101
    assert matcher.match(image) is None and matcher.stats()["expired"] == 1
    assert matcher.stats()["references"] == 0


def test_a_caller_that_draws_into_its_frame_changes_no_reference():
    matcher = BackgroundMatcher(14, 0)
    frame = np.zeros((56, 56, 3), dtype=np.uint8)
    matcher.add(frame, np.ones(16, dtype=bool))
    frame[:] = 255
    assert matcher.match(np.zeros((56, 56, 3), dtype=np.uint8)) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1}, "tolerance is -1"),
        ({"min_reuse": 0}, "min_reuse is 0"),
        ({"max_overridden": 2}, "max_overridden is 2"),
        ({"detect": "never"}, "detect is 'never'"),
        ({"max_references": 0}, "max_references is 0"),
        ({"ttl": 0}, "ttl is 0"),
    ],
)
def test_bad_matching_options_are_named(image_processor, options, message):
    with pytest.raises(ValueError, match=message):
        image_processor.enable_background_matching(**options)


# ---- both together


def test_another_image_with_the_same_background_reuses_tokens_and_prefix(processor, chat_model):
    processor.enable_background_matching(tolerance=0)
    cache = chat_model.enable_background_cache(10**8)

    def ask(image):
        inputs = processor(images=image, text="USER: <image>\nwhat? ASSISTANT:", return_tensors="pt")
        out = chat_model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with cache.scope(bypass=True):
            assert torch.equal(out, chat_model.generate(**inputs, max_new_tokens=4, do_sample=False))

    ask(scene(14, 14))
    before = cache.stats()
    ask(scene(28, 28))
    after = cache.stats()
    assert after["tokens_hits"] - before["tokens_hits"] == 1
    assert after["prefix_hits"] - before["prefix_hits"] == 1
    assert after["vision_tokens_reused"] - before["vision_tokens_reused"] == 15
    ask(Image.new("RGB", (56, 56), (1, 2, 3)))
    assert cache.stats()["tokens_hits"] == after["tokens_hits"]


def test_a_refresh_of_the_second_layer_leaves_the_first_ones_tokens_and_prefix(processor, chat_model):
    """One image, three groups: two layers of its background and what is fresh; cached equals uncached at every step."""
    matcher = processor.enable_background_matching(tolerance=0)
    cache = chat_model.enable_background_cache(10**8)
    reports = []
    matcher.observer = reports.append

    def ask(image):
        inputs = processor(images=image, text="USER: <image>\nwhat? ASSISTANT:", return_tensors="pt")
        before = cache.stats()
        out = chat_model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with cache.scope(bypass=True):
            assert torch.equal(out, chat_model.generate(**inputs, max_new_tokens=4, do_sample=False))
        after = cache.stats()
        names = ("vision_tokens_computed", "prefix_hits", "prefix_misses")
        return inputs, {name: after[name] - before[name] for name in names}

    def sign(colour, moving=None):
        pixels = np.asarray(scene(width=0)).copy()
        pixels[42:56, 42:56] = colour
        if moving is not None:
            pixels[:14, :14] = moving
        return Image.fromarray(pixels)

    ask(sign((9, 9, 9)))
    for colour in (60, 90):  # each change is seen to stay in the second frame
        for _ in range(2):
            ask(sign((colour, 20, 120)))
    first, second = reports[-1].reference.layers
    inputs, counted = ask(sign((90, 20, 120), moving=(250, 0, 0)))
    assert inputs["group_kind"].tolist() == [BACKGROUND, BACKGROUND, OBJECT]
    assert np.array_equal(inputs["patch_mask"][0].numpy(), first.patch_mask)
    assert np.array_equal(inputs["patch_mask"][1].numpy(), second.patch_mask)
    assert counted == {"vision_tokens_computed": 1, "prefix_hits": 2, "prefix_misses": 0}
    ask(sign((200, 20, 20)))
    _, counted = ask(sign((200, 20, 20)))  # another second layer on the same first one
    assert reports[-1].reference.layers[0].patch_mask.tolist() == first.patch_mask.tolist()
    computed = int(reports[-1].reference.layers[1].patch_mask.sum())
    assert counted == {"vision_tokens_computed": computed, "prefix_hits": 1, "prefix_misses": 1}
