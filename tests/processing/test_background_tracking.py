"""References that improve: what becomes part of one, what never does, and when one is replaced."""

import numpy as np
from red_square import scene
from textures import photographed, texture

from backdrop.processing.background_layers_backdrop import make_layer, put_patches
from backdrop.processing.background_matching_backdrop import BackgroundMatcher
from backdrop.processing.background_tracking_backdrop import BackgroundTracker
from backdrop.processing.patch_groups_backdrop import patch_blocks
from backdrop.processing.staleness_backdrop import patch_staleness


def test_a_reference_grows_where_an_object_stood_and_takes_no_parked_object(image_processor, detector):
    matcher = image_processor.enable_background_matching(tolerance=0)
    image_processor.image_groups([scene(0, 0)])
    for _ in range(60):
        last = image_processor.image_groups([scene(28, 28)])[0]
    # What the object hid at first is part of the reference now. The object parked elsewhere is still an object.
    assert matcher.stats()["refreshes"] <= 3 and matcher.stats()["references"] == 1
    owned = np.logical_or.reduce([group.patch_mask for group in last[:-1]])
    assert owned[np.arange(16) != 10].all() and np.flatnonzero(last[-1].patch_mask).tolist() == [10]
    assert not (patch_blocks(last[0].pixels, 14)[10] == (250, 0, 0)).all()
    # The detector ran for the first frame, and when the reference was about to be replaced (once for the object alone).
    assert detector.calls <= 3
    moved = image_processor.image_groups([scene(42, 0)])[0]
    # What the parked object hid was disowned: the prompt held a stale token for it all the time.
    assert np.flatnonzero(moved[-1].patch_mask).tolist() == [3, 10]


def test_objects_parked_in_front_of_an_unseen_background_never_become_part_of_it(image_processor, detector):
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
        match = matcher.match(image)
        assert match is not None
        for (
            layer
        ) in match.reference.layers:  # what is owned is the background, and patches are disowned at most
            assert patch_staleness(layer.pixels, still, 14)[layer.patch_mask].max() <= 10
    assert matcher.stats()["refreshes"] <= 8 and matcher.stats()["references"] == 1


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
    assert 3 <= stats["refreshes"] <= 40 and stats["references"] == 1
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
    assert match.staleness.mean() < 0.97 * first


def test_refresh_off_keeps_the_first_frame():
    matcher = BackgroundMatcher(14, 0, refresh=False)
    frame = texture(56, 0)
    owned = np.ones(16, dtype=bool)
    owned[:4] = False
    matcher.add(frame, owned)
    for _ in range(30):
        assert matcher.match(frame).fresh.sum() == 4
    assert matcher.stats()["refreshes"] == 0


def _tracker_of(still: np.ndarray) -> BackgroundTracker:
    owned = np.ones((still.shape[0] // 14) ** 2, dtype=bool)
    return BackgroundTracker(
        still, (make_layer(still, owned, 14),), 14, 10, np.zeros((len(owned), 4), dtype=np.float32)
    )


def _show(tracker: BackgroundTracker, still: np.ndarray, hidden: np.ndarray, seed: int) -> None:
    """One frame in which other pixels hide the patches of bool `[P]`."""
    frame = put_patches(still, texture(still.shape[0], seed), hidden, 14)
    tracker.update(frame, ~hidden)


def test_what_has_passed_by_is_no_reason_to_make_the_first_layer_anew():
    still = texture(168, 0)
    tracker, hidden = _tracker_of(still), np.arange(144) < 24
    for frame in range(12):
        _show(tracker, still, hidden, 100 + frame)
    assert tracker.first_waste > 0  # were it to stay, it would pay to disown its patches
    for _ in range(20):
        _show(tracker, still, np.zeros(144, dtype=bool), 0)
    assert tracker.first_waste == 0


def test_a_first_layer_made_anew_does_not_own_what_is_hidden_just_then():
    still = texture(168, 0)
    tracker = _tracker_of(still)
    for _ in range(20):
        _show(tracker, still, np.zeros(144, dtype=bool), 0)
    hidden = np.arange(144) < 24  # for one frame only: too short to be disowned for its own sake
    _show(tracker, still, hidden, 100)
    proposal = tracker.propose(0)
    assert proposal is not None and (proposal.layers[0].patch_mask == ~hidden).all()
