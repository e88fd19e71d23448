"""The store behind matching: what it keeps, evicts and proposes, and a full disk."""

import errno
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from same_layers import same_layer
from textures import flat, texture

from backdrop.processing.background_layers_backdrop import make_layer
from backdrop.processing.background_matching_backdrop import BackgroundMatcher
from backdrop.processing.patch_groups_backdrop import pixel_mask
from backdrop.processing.reference_descriptors_backdrop import region_means
from backdrop.processing.reference_slots_backdrop import SlotFile
from backdrop.processing.reference_store_backdrop import ReferenceStore
from backdrop.processing.staleness_backdrop import reusable_patches

WHOLE = np.ones(16, dtype=bool)


def whole(image, patch_mask, patch_size):
    """One layer of these patches."""
    return (make_layer(image, patch_mask, patch_size),)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "remove", "touch"]), st.integers(0, 3), st.integers(0, 255)),
        max_size=60,
    ),
    st.integers(1, 20),
)
def test_the_store_keeps_what_a_dictionary_would(steps, max_references):
    store = ReferenceStore(4, max_references)
    model: dict[int, tuple[str, int]] = {}  # ordered, the least recently used first
    for action, namespace, value in steps:
        if action == "add":
            if (
                len(model) == max_references
            ):  # the fullest namespace loses one, and itself before others that are as full
                sizes = Counter([name for name, _ in model.values()] + [str(namespace)])
                fullest = {name for name, size in sizes.items() if size == max(sizes.values())}
                fullest = {str(namespace)} if str(namespace) in fullest else fullest
                del model[next((i for i, (name, _) in model.items() if name in fullest), next(iter(model)))]
            reference = store.add(
                str(namespace), flat(8, value), whole(flat(8, value), np.ones(4, dtype=bool), 4)
            )
            model[reference.reference_id] = (str(namespace), value)
        elif model:
            chosen = list(model)[value % len(model)]
            if action == "remove":
                store.remove(chosen)
                del model[chosen]
            else:
                store.mark_used(chosen)
                model[chosen] = model.pop(chosen)
        assert len(store) == len(model)
        for namespace in {name for name, _ in model.values()}:
            found = {reference_id for *_, reference_id in store.candidates(namespace, flat(8, 0), 0)}
            assert found == {i for i, (name, _) in model.items() if name == namespace}
        for reference_id, (_, colour) in model.items():
            assert (store.read(reference_id).pixels == colour).all()


def test_a_busy_namespace_does_not_empty_another():
    store = ReferenceStore(4, 10)
    quiet = [
        store.add("quiet", flat(8, i), whole(flat(8, i), np.ones(4, dtype=bool), 4)).reference_id
        for i in range(3)
    ]
    for i in range(100):
        store.add("busy", flat(8, i), whole(flat(8, i), np.ones(4, dtype=bool), 4))
    assert store.of_namespace("quiet") == quiet and len(store) == 10
    store.clear()
    store.add("quiet", flat(8, 1), whole(flat(8, 1), np.ones(4, dtype=bool), 4))
    assert len(store) == 1


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 3.0, 10.0]))
def test_the_lower_bound_is_one(seed, tolerance):
    rng = np.random.default_rng(seed)
    store = ReferenceStore(7, 8)
    base = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
    for _ in range(4):
        image = np.clip(base + rng.normal(0, rng.uniform(0, 12), base.shape), 0, 255).astype(np.uint8)
        image[: rng.integers(0, 40)] = 0
        store.add("", image, whole(image, rng.random(64) < 0.9, 7))
    for _, bound, reference_id in store.candidates("", base, tolerance):
        reference = store.read(reference_id)
        reusable = reusable_patches(reference.pixels, base, 7, tolerance)[0] & reference.patch_mask
        assert bound <= (~reusable).sum()


def test_a_full_disk_costs_references_and_no_answer(monkeypatch):
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("no posix_fallocate here")
    matcher = BackgroundMatcher(14, 0, max_references=100)
    for seed in range(16):
        matcher.add(texture(56, seed), WHOLE)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    matcher.add(texture(56, 16), WHOLE)
    assert matcher.stats()["references"] == 16
    assert matcher.match(texture(56, 16)) is not None and matcher.match(texture(56, 0)) is None
    fresh_start = BackgroundMatcher(14, 0)
    fresh_start.add(texture(56, 0), WHOLE)
    assert fresh_start.match(texture(56, 0)) is None


def test_slots_are_acquired_once_and_keep_their_content_as_the_file_grows():
    file, mask = SlotFile(8, 4, None), np.array([True, False, True, True])
    assert file.acquire() is None
    file.grow(2)
    slots = [file.acquire(), file.acquire()]
    for value, slot in enumerate(slots):
        file.write(slot, flat(8, value), mask)
    file.grow(3)
    assert len({*slots, *(file.acquire() for _ in range(3))}) == 5 and not file.has_free_slot
    for value, slot in enumerate(slots):
        pixels, kept, noise = file.read(slot)
        assert (pixels == value).all() and np.array_equal(kept, mask) and not noise.any()
    file.release(slots[0])
    assert file.acquire() == slots[0] and file.num_bytes == 5 * (8 * 8 * 3 + 4 + 16)


@pytest.mark.parametrize(
    ("side", "patch_size"), [(336, 14), (384, 14), (59, 7), (56, 14), (8, 1), (1548, 258)]
)
def test_region_means_are_the_means_of_whole_patches(side, patch_size):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image[: side // 2] = 255  # the largest sums
    grid = side // patch_size
    starts = [i * grid // min(grid, 6) * patch_size for i in range(min(grid, 6))] + [grid * patch_size]
    edges = list(zip(starts, starts[1:], strict=False))
    expected = [
        image[top:bottom, left:right].mean(axis=(0, 1)) for top, bottom in edges for left, right in edges
    ]
    np.testing.assert_allclose(region_means(image, patch_size), np.array(expected).T, rtol=1e-6)


def test_two_layers_are_found_again_with_their_noise_and_give_both_slots_back():
    store, rng = ReferenceStore(7, 2), np.random.default_rng(0)
    image = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    masks = [np.arange(16) < 12, np.arange(16) >= 10]  # two patches are in both
    layers = (make_layer(image, masks[0], 7), make_layer(255 - image, masks[1], 7))
    noise = rng.uniform(0, 60, (16, 4)).astype(np.float32)
    kept = store.read(store.add("", image, layers, noise).reference_id)
    assert all(same_layer(a, b) for a, b in zip(kept.layers, layers, strict=True))
    shown = np.where(pixel_mask(masks[1], 28, 7)[..., None], 255 - image, image)
    assert np.array_equal(kept.pixels, shown) and kept.patch_mask.all()
    np.testing.assert_allclose(kept.noise, noise, rtol=0.03, atol=0.02)
    for _ in range(9):
        store.add("", image, layers)
    assert len(store) == 2 and store.num_bytes()[1] == 4 * (28 * 28 * 3 + 5 * 16)
