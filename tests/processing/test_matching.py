"""Matching: the bound, what is always seen, references that improve, and the store behind them."""

import errno
import io
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from red_square import scene

import backdrop.processing.reference_store_backdrop as store_module
from backdrop.processing.background_matching_backdrop import BackgroundMatcher
from backdrop.processing.patch_groups_backdrop import (
    BACKGROUND,
    patch_blocks,
    patch_staleness,
    reusable_patches,
)
from backdrop.processing.reference_store_backdrop import ReferenceStore
from backdrop.scenes.recording import plant_character
from backdrop.scenes.world import render_scene

WHOLE = np.ones(16, dtype=bool)


def texture(side: int, seed: int, levels=(40, 210)) -> np.ndarray:
    """A smooth random field with some fine detail, uint8 `[S, S, 3]`."""
    rng = np.random.default_rng(seed)
    small = rng.integers(*levels, (side // 14, side // 14, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)).astype(float)
    return np.clip(smooth + rng.normal(0, 6, (side, side, 1)), 0, 255).astype(np.uint8)


def photographed(image: np.ndarray, rng, sigma: float = 2.5, quality: int | None = 85) -> np.ndarray:
    noisy = Image.fromarray(np.clip(image + rng.normal(0, sigma, image.shape) + 0.5, 0, 255).astype(np.uint8))
    if quality is None:
        return np.asarray(noisy)
    file = io.BytesIO()
    noisy.save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


# ---- the bound


def naive_staleness(reference, image, patch_size):
    grid, half = image.shape[0] // patch_size, patch_size // 2
    parts = [slice(0, half), slice(half, patch_size)] if half else [slice(0, 1)]
    difference = np.abs(reference.astype(float) - image)
    cells = [
        difference[r * patch_size : (r + 1) * patch_size, c * patch_size : (c + 1) * patch_size]
        for r in range(grid)
        for c in range(grid)
    ]
    return np.array([max(cell[y, x].mean() for y in parts for x in parts) for cell in cells])


@pytest.mark.parametrize(("side", "patch_size"), [(56, 14), (60, 13), (8, 1), (50, 16)])
def test_staleness_is_the_contracts(side, patch_size):
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(2))
    assert np.allclose(
        patch_staleness(first, second, patch_size), naive_staleness(first, second, patch_size), atol=1e-4
    )


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 2.0, 10.0, 255.0]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.booleans()), min_size=2, max_size=24),
    st.booleans(),
)
def test_every_patch_of_every_frame_is_fresh_or_within_the_bound(
    image_processor_factory, seed, tolerance, history, batched
):
    """Contract 4's first line, on the groups that leave the processor, with references that grow and are replaced."""
    rng = np.random.default_rng(seed)
    processor = image_processor_factory()
    matcher = processor.enable_background_matching(
        tolerance=tolerance, min_reuse=0.2, max_overridden=0.8, max_references=2
    )
    bases = [rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for _ in range(3)]
    frames = []
    for base, noise, moving in history:
        frame = np.clip(bases[base] + rng.normal(0, noise, (56, 56, 3)), 0, 255).astype(np.uint8)
        if moving:
            row, column = rng.integers(0, 43, 2)
            frame[row : row + 14, column : column + 14] = (250, 0, 0)
        frames.append(frame)
    results = processor.image_groups(frames) if batched else [processor.image_groups([f])[0] for f in frames]
    for frame, groups in zip(frames, results, strict=True):
        encoded = np.zeros(16, dtype=bool)
        for group in groups:
            same = (patch_blocks(group.pixels, 14) == patch_blocks(frame, 14)).all(axis=(1, 2, 3))
            if group.kind == BACKGROUND:
                staleness = naive_staleness(group.pixels, frame, 14)
                encoded |= group.patch_mask & (staleness <= tolerance + 1e-4)
                if tolerance == 0:
                    assert (same | ~encoded).all()
            else:
                assert same[group.patch_mask].all()
                encoded |= group.patch_mask
        assert encoded.all()
    stats = matcher.stats()
    assert stats["matches"] + stats["misses"] == len(frames) and stats["references"] <= 2
    assert stats["patches_reused"] + stats["patches_fresh"] == 16 * len(frames)


@pytest.fixture(scope="module")
def image_processor_factory():
    import tiny
    from red_detector import RedDetector

    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

    def make():
        side = {"height": tiny.SIDE, "width": tiny.SIDE}
        processor = BackdropImageProcessor(
            size={"shortest_edge": tiny.SIDE}, crop_size=side, patch_size=tiny.PATCH, margin=0
        )
        processor.set_detector(RedDetector())
        return processor

    return make


# ---- what is always seen, at 10 grey levels, under noise and JPEG


def line(image, row, column, contrast):
    image = image.astype(int)
    image[row : row + 12, column] += contrast
    return np.clip(image, 0, 255).astype(np.uint8)


def diagonal(image, row, column, contrast):
    image = image.astype(int)
    steps = np.arange(10)
    image[row + steps, column + steps] += contrast
    return np.clip(image, 0, 255).astype(np.uint8)


def lamp(image, row, column, contrast):
    image = image.astype(int)
    spot = image[row : row + 3, column : column + 3]  # one channel only: a coloured light
    spot[..., 0] += np.where(spot[..., 0] < 128, 2, -2) * abs(contrast)
    return np.clip(image, 0, 255).astype(np.uint8)


def character(image, row, column, contrast):
    return plant_character(image, (row, column), "8", contrast)


@pytest.mark.parametrize("change", [character, line, diagonal, lamp])
@pytest.mark.parametrize("contrast", [60, -60])
@pytest.mark.parametrize("seed", range(4))
def test_small_changes_are_fresh_under_noise_and_jpeg(change, contrast, seed):
    rng = np.random.default_rng(seed)
    still = texture(224, seed)
    reference = photographed(still, rng)
    for _ in range(6):
        row, column = rng.integers(0, 200, 2)
        changed = change(still, row, column, contrast)
        image = photographed(changed, rng, sigma=rng.uniform(2, 3))
        reusable, _ = reusable_patches(reference, image, 14, 10)
        touched = patch_blocks(np.abs(changed.astype(int) - still).max(axis=-1, keepdims=True) > 30, 14)
        touched = touched.sum(axis=(1, 2, 3))
        assert not reusable[np.argmax(touched)]  # the patch that shows the most of it


@pytest.mark.parametrize("sigma", [2, 3])
def test_a_still_scene_is_reused_under_noise_and_jpeg(sigma):
    rng = np.random.default_rng(0)
    still = texture(336, 1)
    reusable, staleness = reusable_patches(
        photographed(still, rng, sigma), photographed(still, rng, sigma), 14, 10
    )
    assert reusable.mean() > 0.99 and staleness.max() < 10


def test_a_change_beside_a_patch_is_none_of_it():
    still = texture(56, 0)
    changed = still.copy()
    changed[14:28, 14:28] = 255
    assert np.flatnonzero(~reusable_patches(still, changed, 14, 10)[0]).tolist() == [5]


def test_two_lamps_of_equal_brightness_are_told_apart():
    still = texture(56, 0)
    red, green = still.copy(), still.copy()
    red[20:24, 20:24], green[20:24, 20:24] = (200, 50, 50), (50, 200, 50)
    assert not reusable_patches(red, green, 14, 10)[0][5]


# ---- references that improve


def test_a_reference_grows_where_an_object_stood_and_takes_no_resting_object(image_processor, detector):
    matcher = image_processor.enable_background_matching(tolerance=0)
    image_processor.image_groups([scene(0, 0)])
    for _ in range(60):
        last = image_processor.image_groups([scene(28, 28)])[0]
    # What the object hid at first is known now. The object that rests elsewhere is still an object.
    assert matcher.stats()["refreshes"] == 1 and matcher.stats()["references"] == 1
    assert last[0].patch_mask.all() and np.flatnonzero(last[1].patch_mask).tolist() == [10]
    assert not (patch_blocks(last[0].pixels, 14)[10] == (250, 0, 0)).all()
    # The detector ran for the first frame, and when the reference was about to be replaced (once for the object alone).
    assert detector.calls <= 3
    moved = image_processor.image_groups([scene(42, 0)])[0]
    assert np.flatnonzero(moved[1].patch_mask).tolist() == [3]


def test_objects_that_rest_in_front_of_an_unseen_background_never_become_it(image_processor, detector):
    matcher = image_processor.enable_background_matching(tolerance=0)
    for _ in range(80):
        groups = image_processor.image_groups([scene(14, 14)])[0]
    assert matcher.stats()["refreshes"] == 0 and detector.calls <= 3
    assert np.flatnonzero(groups[1].patch_mask).tolist() == [5] and not groups[0].patch_mask[5]


def test_what_passes_by_never_makes_a_reference():
    matcher = BackgroundMatcher(14, 10)
    still = texture(336, 0)
    matcher.add(still, np.ones(576, dtype=bool))
    for frame in range(40):
        image = still.copy()
        column = 5 * frame
        image[100:200, column : column + 90] = texture(336, 100 + frame)[100:200, :90]
        assert matcher.match(image) is not None
    assert matcher.stats()["refreshes"] == 0 and matcher.stats()["references"] == 1


def test_slow_drift_of_brightness_refreshes_and_piles_nothing_up():
    rng = np.random.default_rng(0)
    matcher = BackgroundMatcher(14, 10)
    still = texture(168, 0, levels=(60, 150))
    matcher.add(still, np.ones(144, dtype=bool))
    fresh = []
    for frame in range(400):
        match = matcher.match(photographed(np.clip(still + 0.15 * frame, 0, 255), rng, 2, None))
        assert match is not None  # 60 levels brighter in the end, never lost
        fresh.append(0 if match.refreshed else match.fresh.mean())
    stats = matcher.stats()
    assert 3 <= stats["refreshes"] <= 20 and stats["references"] == 1
    assert np.mean(fresh) < 0.05


def test_an_averaged_reference_is_closer_than_a_single_frame():
    rng = np.random.default_rng(0)
    matcher = BackgroundMatcher(14, 10)
    still = texture(168, 0)
    owned = np.ones(144, dtype=bool)
    owned[:48] = False
    matcher.add(photographed(still, rng, 3, None), owned)
    first = matcher.match(photographed(still, rng, 3, None)).staleness[48:].mean()
    for _ in range(40):
        match = matcher.match(photographed(still, rng, 3, None))
    assert matcher.stats()["refreshes"] == 1 and match.reference.patch_mask.all()
    assert match.staleness.mean() < 0.85 * first


def test_refresh_off_keeps_the_first_frame():
    matcher = BackgroundMatcher(14, 0, refresh=False)
    frame = texture(56, 0)
    owned = WHOLE.copy()
    owned[:4] = False
    matcher.add(frame, owned)
    for _ in range(30):
        assert matcher.match(frame).fresh.sum() == 4
    assert matcher.stats()["refreshes"] == 0


def test_the_observer_hears_of_every_image(image_processor):
    reports = []
    matcher = image_processor.enable_background_matching(tolerance=0, detect="always")
    matcher.observer = reports.append
    image_processor.image_groups([scene(0, 0), scene(28, 28)])
    miss, match = reports
    assert miss.reference is None and miss.fresh.all() and np.flatnonzero(miss.objects).tolist() == [0]
    assert np.flatnonzero(match.unseen).tolist() == [0] and np.flatnonzero(match.stale).tolist() == [10]
    assert np.flatnonzero(match.objects).tolist() == [10] and match.fresh.sum() == 2


# ---- the store


def flat(side, colour):
    return np.full((side, side, 3), colour, dtype=np.uint8)


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
            if len(model) == max_references:  # the fullest gives way, the one that asks before others
                sizes = Counter([name for name, _ in model.values()] + [str(namespace)])
                fullest = {name for name, size in sizes.items() if size == max(sizes.values())}
                fullest = {str(namespace)} if str(namespace) in fullest else fullest
                del model[next((i for i, (name, _) in model.items() if name in fullest), next(iter(model)))]
            reference = store.add(str(namespace), flat(8, value), np.ones(4, dtype=bool))
            model[reference.reference_id] = (str(namespace), value)
        elif model:
            chosen = list(model)[value % len(model)]
            if action == "remove":
                store.remove(chosen)
                del model[chosen]
            else:
                store.touch(chosen)
                model[chosen] = model.pop(chosen)
        assert len(store) == len(model)
        for namespace in {name for name, _ in model.values()}:
            found = {reference_id for *_, reference_id in store.worth_trying(namespace, flat(8, 0), 0)}
            assert found == {i for i, (name, _) in model.items() if name == namespace}
        for reference_id, (_, colour) in model.items():
            assert (store.read(reference_id).pixels == colour).all()


def test_a_busy_namespace_does_not_empty_another():
    store = ReferenceStore(4, 10)
    quiet = [store.add("quiet", flat(8, i), np.ones(4, dtype=bool)).reference_id for i in range(3)]
    for i in range(100):
        store.add("busy", flat(8, i), np.ones(4, dtype=bool))
    assert store.of_namespace("quiet") == quiet and len(store) == 10
    store.clear()
    store.add("quiet", flat(8, 1), np.ones(4, dtype=bool))
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
        store.add("", image, rng.random(64) < 0.9)
    for _, bound, reference_id in store.worth_trying("", base, tolerance):
        reference = store.read(reference_id)
        reusable = reusable_patches(reference.pixels, base, 7, tolerance)[0] & reference.patch_mask
        assert bound <= (~reusable).sum()


@pytest.mark.parametrize("tolerance", [0.0, 10.0])
def test_others_of_the_same_kind_with_larger_masks_do_not_hide_the_right_one(tolerance):
    """A phone among a hundred phones: the bound alone put those first that own more patches."""
    rng = np.random.default_rng(0)
    images = phone_screens(100)
    matcher = BackgroundMatcher(14, tolerance, max_references=200)
    masks = [np.ones((12, 12), dtype=bool) for _ in images]
    for mask in masks:  # objects in front, some large
        (height, width), (top, left) = rng.integers(2, 9, 2), rng.integers(0, 4, 2)
        mask[top : top + height, left : left + width] = False
    masks = [mask.reshape(-1) for mask in masks]
    for image, mask in zip(images, masks, strict=True):
        matcher.add(image, mask)
    for number in np.argsort([mask.sum() for mask in masks])[:20]:  # those that own the fewest
        match = matcher.find(images[number])
        # Another one may do even better: phones have much in common.
        assert match is not None and match.fresh.sum() <= (~masks[number]).sum()


def phone_screens(count: int) -> list[np.ndarray]:
    """Phones' screens, one per background."""
    return [np.asarray(render_scene("phone", 120_000 + seed, 0).image) for seed in range(count)]


@pytest.mark.parametrize("with_index", [True, False])
def test_many_references_are_found_with_and_without_an_index(monkeypatch, with_index):
    monkeypatch.setattr(store_module, "EXHAUSTIVE_LIMIT", 50)
    monkeypatch.setattr(store_module, "INDEX_FROM", 80)
    monkeypatch.setattr(store_module, "PROPOSALS", 16)
    if not with_index:
        monkeypatch.setattr(store_module, "Index", None)
    elif store_module.Index is None:
        pytest.skip("usearch is not installed")
    rng = np.random.default_rng(0)
    matcher = BackgroundMatcher(14, 0, max_references=200)
    images = [texture(56, seed) for seed in range(260)]
    for image in images:
        matcher.add(image, WHOLE)
    assert (matcher._store._shelves[("", 56)].index is not None) == with_index
    for seed in rng.integers(60, 260, 40):  # the first 60 have given way
        image = images[seed].copy()
        image[:14, :28] = 0
        match = matcher.match(image)
        assert np.flatnonzero(match.fresh).tolist() == [0, 1]
        assert np.array_equal(match.reference.pixels, images[seed])
    assert all(matcher.match(images[seed]) is None for seed in range(60))


def test_a_full_disk_costs_references_and_no_answer(monkeypatch):
    if not hasattr(store_module.os, "posix_fallocate"):
        pytest.skip("no posix_fallocate here")
    matcher = BackgroundMatcher(14, 0, max_references=100)
    for seed in range(16):
        matcher.add(texture(56, seed), WHOLE)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "posix_fallocate", full)
    matcher.add(texture(56, 16), WHOLE)
    assert matcher.stats()["references"] == 16
    assert matcher.match(texture(56, 16)) is not None and matcher.match(texture(56, 0)) is None
    fresh_start = BackgroundMatcher(14, 0)
    fresh_start.add(texture(56, 0), WHOLE)
    assert fresh_start.match(texture(56, 0)) is None


def test_bytes_are_bounded_whatever_comes():
    matcher = BackgroundMatcher(14, 10, max_references=20)
    sizes = set()
    for seed in range(120):
        image = texture(56, seed)
        matcher.add(image, WHOLE)
        matcher.match(image)
        sizes.add(matcher.stats()["bytes"])
    tracker = 56 * 56 * 3 * 5 + 16 * 8
    assert max(sizes) <= 32 * (56 * 56 * 3 + 16) + 32 * 1024 + 16 * tracker


def test_sixteen_threads_of_sixteen_tenants_never_meet():
    matcher = BackgroundMatcher(14, 2, max_references=40)
    wrong: list = []

    def tenant(number: int) -> None:
        rng = np.random.default_rng(number)
        with matcher.scope(namespace=str(number)):
            for _ in range(30):
                image = flat(56, number * 15)
                image[:14, :14] = rng.integers(0, 256)
                match = matcher.match(image)
                if match is None:
                    matcher.miss(image, WHOLE)
                elif not (match.reference.pixels[14:] == number * 15).all():
                    wrong.append(number)

    threads = [threading.Thread(target=tenant, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = matcher.stats()
    assert not wrong and stats["matches"] + stats["misses"] == 480 and stats["references"] <= 40


def test_a_namespace_can_be_forgotten_by_itself():
    matcher = BackgroundMatcher(14, 2)
    for name in ("a", "b"):
        with matcher.scope(namespace=name):
            matcher.miss(flat(56, 100), WHOLE)
            assert matcher.match(flat(56, 101)) is not None  # a tracker too
    matcher.clear("a")
    with matcher.scope(namespace="a"):
        assert matcher.match(flat(56, 100)) is None
    with matcher.scope(namespace="b"):
        assert matcher.match(flat(56, 100)) is not None
    assert matcher.stats()["references"] == 1
