"""Matching: its bound, which reference is found, the observer, and namespaces."""

import threading

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_staleness import naive_staleness
from red_detector import RedDetector
from red_square import scene
from same_layers import same_layer
from textures import flat, texture

from backdrop.processing import reference_descriptors_backdrop
from backdrop.processing.background_matching_backdrop import TRACKED_REFERENCES, BackgroundMatcher
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import BACKGROUND, covered_patches, patch_blocks
from backdrop.scenes.world import render_scene

WHOLE = np.ones(16, dtype=bool)


@pytest.fixture(scope="module")
def image_processor_factory():
    def make():
        side = {"height": tiny.SIDE, "width": tiny.SIDE}
        processor = BackdropImageProcessor(
            size={"shortest_edge": tiny.SIDE}, crop_size=side, patch_size=tiny.PATCH, margin=0
        )
        processor.set_detector(RedDetector())
        return processor

    return make


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


def test_the_observer_hears_of_every_image(image_processor):
    reports = []
    matcher = image_processor.enable_background_matching(tolerance=0, detect="always")
    matcher.observer = reports.append
    image_processor.image_groups([scene(0, 0), scene(28, 28)])
    miss, match = reports
    assert miss.detector_runs == 1  # of one run over both images
    assert miss.reference is None and miss.fresh.all() and np.flatnonzero(miss.objects).tolist() == [0]
    assert np.flatnonzero(match.unseen).tolist() == [0] and np.flatnonzero(match.stale).tolist() == [10]
    assert np.flatnonzero(match.objects).tolist() == [10] and match.fresh.sum() == 2


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
    monkeypatch.setattr(reference_descriptors_backdrop, "EXHAUSTIVE_LIMIT", 50)
    monkeypatch.setattr(reference_descriptors_backdrop, "INDEX_FROM", 80)
    monkeypatch.setattr(reference_descriptors_backdrop, "NEAREST", 16)
    index_class, indices = reference_descriptors_backdrop.Index, []
    if with_index and index_class is None:
        pytest.skip("usearch is not installed")

    def make_index(**options):
        indices.append(index_class(**options))
        return indices[-1]

    monkeypatch.setattr(reference_descriptors_backdrop, "Index", make_index if with_index else None)
    rng = np.random.default_rng(0)
    matcher = BackgroundMatcher(14, 0, max_references=200)
    images = [texture(56, seed) for seed in range(260)]
    for image in images:
        matcher.add(image, WHOLE)
    assert [len(index) for index in indices] == ([200] if with_index else [])
    for seed in rng.integers(60, 260, 40):  # the first 60 were evicted
        image = images[seed].copy()
        image[:14, :28] = rng.integers(256)  # another one each time: what stays becomes another background
        match = matcher.match(image)
        assert np.flatnonzero(match.fresh).tolist() == [0, 1]
        assert np.array_equal(match.reference.pixels, images[seed])
    assert all(matcher.match(images[seed]) is None for seed in range(60))


def test_bytes_are_bounded_whatever_comes():
    matcher = BackgroundMatcher(14, 10, max_references=20)
    sizes = set()
    for seed in range(120):
        image = texture(56, seed)
        matcher.add(image, WHOLE)
        matcher.match(image)
        sizes.add(matcher.stats()["bytes"])
    # An estimate, its mean in four bytes, a layer, three frames with unexplained changes, and per patch states and noise.
    tracker = 56 * 56 * 3 * 9 + 16 * 80
    assert max(sizes) <= 40 * (56 * 56 * 3 + 5 * 16) + 32 * 1024 + 16 * tracker


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


def test_the_tolerance_of_one_call():
    """A call may be stricter or more lenient; the promise then holds for its own tolerance, and the matcher's stays."""
    image = texture(tiny.SIDE, 0)
    matcher = BackgroundMatcher(tiny.PATCH, tolerance=10, refresh=False)
    matcher.add(image, WHOLE)
    near = np.clip(image.astype(int) + 6, 0, 255).astype(np.uint8)
    assert matcher.match(near) is not None
    with matcher.scope(tolerance=2) as strict:
        assert strict.tolerance == 2 and matcher.match(near) is None
        with matcher.scope(namespace="other"):
            assert matcher.tolerance == 2, "a scope inside keeps what it does not name"
        found = []
        thread = threading.Thread(target=lambda: found.append(matcher.tolerance))
        thread.start()
        thread.join()
        assert found == [10], "other threads have the matcher's own"
    assert matcher.tolerance == 10 and matcher.match(near) is not None


def test_what_is_known_is_listed_shown_and_forgotten():
    matcher = BackgroundMatcher(tiny.PATCH, tolerance=0)
    for namespace, seed in (("a", 1), ("b", 2), ("a", 3)):
        with matcher.scope(namespace=namespace):
            matcher.add(texture(tiny.SIDE, seed), WHOLE)
    known = matcher.known()
    assert [each.namespace for each in known] == ["a", "b", "a"]
    assert all(0 <= each.age < 60 for each in known)
    first = known[0].reference_id
    assert np.array_equal(matcher.reference(first).pixels, texture(tiny.SIDE, 1))
    assert matcher.forget(first) and not matcher.forget(first) and matcher.reference(first) is None
    with matcher.scope(namespace="a"):
        assert (
            matcher.match(texture(tiny.SIDE, 1)) is None and matcher.match(texture(tiny.SIDE, 3)) is not None
        )
    assert {each.reference_id for each in matcher.known()} == {each.reference_id for each in known[1:]}


SIGN = (slice(70, 98), slice(30, 58))


def sign_scenes(count: int = 2, seed: int = 0) -> list[np.ndarray]:
    """Backgrounds that differ in the colour of a sign of 2 x 2 patches (and what of its neighbours it touches)."""
    still = texture(168, seed)
    scenes = [still.copy() for _ in range(count)]
    for number, image in enumerate(scenes):
        image[SIGN] = (40 + 60 * number, 200 - 70 * number, 90)
    return scenes


@pytest.mark.parametrize("tolerance", [0.0, 10.0])
@pytest.mark.parametrize("order", ["abababab", "aaabbbab", "aabbccaabbcc"])
@pytest.mark.parametrize("layers", [1, 2])
def test_scenes_that_differ_in_a_sign_share_nothing_from_the_second_frame_on(tolerance, order, layers):
    scenes, rng = dict(zip("abc", sign_scenes(3), strict=True)), np.random.default_rng(0)
    matcher = BackgroundMatcher(14, tolerance, layers=layers)
    reports, seen = [], set()
    matcher.observer = reports.append
    for name in order:
        image = scenes[name]
        if tolerance:
            image = np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
        match = matcher.match(image)
        if match is None:
            matcher.miss(image, np.ones(144, dtype=bool))
        elif name in seen:
            assert not (reports[-1].stale | reports[-1].hidden).any()
        seen.add(name)
    assert matcher.stats()["misses"] == 1 and matcher.stats()["restarts"] == len(seen) - 1


def test_strict_shares_nothing_even_in_the_first_frame():
    first, second = sign_scenes()
    matcher = BackgroundMatcher(14, 0, strict=True)
    reports = []
    matcher.observer = reports.append
    matcher.miss(first, np.ones(144, dtype=bool))
    match = matcher.match(second)
    assert not (reports[-1].stale | reports[-1].hidden).any() and match.refreshed
    assert (matcher.match(second).encoded | matcher.match(first).encoded).sum() == 0


def test_what_a_detector_finds_starts_no_other_background():
    still = texture(168, 0)
    matcher = BackgroundMatcher(14, 0)
    matcher.miss(still, np.ones(144, dtype=bool))
    image, person = still.copy(), np.zeros((12, 12), dtype=bool)
    image[42:84, 42:70] = 255
    person[3:6, 3:5] = True
    for _ in range(6):
        matcher.accept(image, matcher.find(image), find_objects=lambda: person.reshape(-1))
    assert matcher.stats()["restarts"] == 0 and matcher.stats()["references"] == 1
    assert 1 <= matcher.stats()["detector_runs"] <= 2  # once the change is seen to stay, not in every frame
    assert matcher.match(still).encoded.sum() == 0


def test_leaves_are_disowned_and_the_second_layer_leaves_the_first_alone():
    rng, still = np.random.default_rng(0), texture(168, 0)
    matcher = BackgroundMatcher(14, 10)
    reports: list = []
    matcher.observer = reports.append
    matcher.miss(still, np.ones(144, dtype=bool))
    for frame in range(80):
        image = still.copy()
        image[:28, :28] = rng.integers(0, 256, (28, 28, 3))  # leaves: four patches that never rest
        if frame >= 50:
            image[84:112, 84:112] = (min(frame, 60) * 4, 30, 30)  # something rolls in, and stays
        assert matcher.match(image) is not None
    leaves = np.zeros((12, 12), dtype=bool)
    leaves[:2, :2] = True
    assert np.array_equal(reports[-1].disowned, leaves.reshape(-1))
    assert not reports[-1].stale.any() and not leaves.reshape(-1)[reports[-1].owned].any()
    firsts = {id(r.reference.layers[0]): r.reference.layers[0] for r in reports[55:]}.values()
    assert all(same_layer(layer, reports[-1].reference.layers[0]) for layer in firsts)
    second = reports[-1].reference.layers[1].patch_mask.reshape(12, 12)
    assert second[6:8, 6:8].all() and second[5:9, 5:9].sum() == second.sum()


@pytest.mark.parametrize("level", [12, 60, 150])
def test_a_figure_of_three_times_the_noise_is_fresh_day_and_night(level):
    rng, sigma = np.random.default_rng(level), 1.5
    still = np.clip(texture(168, 1).astype(float) * level / 128, 0, 255)

    def frame(picture):
        return np.clip(picture + rng.normal(0, sigma, picture.shape) + 0.5, 0, 255).astype(np.uint8)

    matcher = BackgroundMatcher(14, 10)
    matcher.miss(frame(still), np.ones(144, dtype=bool))
    for _ in range(30):
        quiet = matcher.match(frame(still))
    assert quiet.fresh.sum() <= 3
    for number in range(40):
        picture, (row, column) = still.copy(), rng.integers(1, 9, 2) * 14
        height, width = rng.integers(2, 4, 2) * 14
        picture[row : row + height, column : column + width] += 3 * sigma * (1 if number % 2 else -1)
        covered = np.zeros((168, 168), dtype=bool)
        covered[row : row + height, column : column + width] = True
        match = matcher.find(frame(np.clip(picture, 0, 255)))
        assert match is None or match.fresh[covered_patches(covered, 14)].all()


def test_a_tracker_may_go_while_the_detector_looks():
    """The lock is free then, and other cameras' references push the tracker out."""
    still, owned = texture(168, 0), np.ones(144, dtype=bool)
    owned[:72] = False
    others = [texture(168, seed) for seed in range(1, TRACKED_REFERENCES + 2)]
    matcher, looks = BackgroundMatcher(14, 0), []

    def find_objects():
        looks.append(1)
        for other in others:
            matcher.miss(other, np.ones(144, dtype=bool))
        return np.zeros(144, dtype=bool)

    matcher.miss(still, owned)
    for _ in range(12):
        match = matcher.accept(still, matcher.find(still), find_objects=find_objects)
        if looks:
            break
    assert looks and match is not None
    assert matcher.match(still).encoded.sum() == 0, "the layers that were made are kept"
