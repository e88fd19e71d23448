"""Corrections of a whole frame: what was planted is found and undone, what is real is not explained away."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from backdrop.processing import frame_pixels_backdrop as frame_pixels
from backdrop.processing.frame_corrections_backdrop import CorrectionTarget
from backdrop.processing.frame_pixels_backdrop import shifted, with_exposure_undone
from backdrop.processing.patch_groups_backdrop import pixel_mask
from backdrop.processing.staleness_backdrop import patch_staleness

S, P, GRID = 336, 14, 24
ALL = np.ones(GRID * GRID, dtype=bool)
TOLERANCE = 10


def scenery(seed: int = 0, dark: float = 1.0) -> Image.Image:
    """A large picture with structure of every size, edges among it."""
    rng = np.random.default_rng(seed)
    side = 3 * (S + 40)
    total = np.zeros((side, side, 3))
    for cells, strength in ((5, 60), (17, 40), (60, 25), (190, 14)):
        small = rng.normal(0, strength, (cells, cells, 3)) * 0.5 + rng.normal(0, strength, (cells, cells, 1))
        for c in range(3):
            layer = Image.fromarray(small[..., c].astype(np.float32))
            total[..., c] += np.asarray(layer.resize((side, side), Image.Resampling.BICUBIC))
    for _ in range(60):
        x, y, w, h = (int(v) for v in rng.integers(20, 200, 4) * [5, 5, 1, 1])
        total[y : y + h, x : x + w] = rng.uniform(-90, 110, 3)
    return Image.fromarray(np.clip((total + 120) * dark, 0, 255).astype(np.uint8))


def seen(picture: Image.Image, right: float = 0, down: float = 0, zoom: float = 1.0, angle: float = 0):
    """What a camera shows when its picture moves (right, down) by so many pixels of the model's, uint8 `[S, S, 3]`."""
    if angle:
        picture = picture.rotate(angle, Image.Resampling.BICUBIC)
    scale, middle = picture.width / (S + 40), (S + 40) / 2
    half = S / 2 / zoom
    box = [middle - half - right, middle - half - down, middle + half - right, middle + half - down]
    return np.asarray(picture.resize((S, S), Image.Resampling.BICUBIC, box=[v * scale for v in box]))


def noisy(image: np.ndarray, sigma: float = 2.0, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


def exposed(image: np.ndarray, gain, offset=0.0) -> np.ndarray:
    return np.clip(np.rint(image * np.asarray(gain) + offset), 0, 255).astype(np.uint8)


def covered(frame: np.ndarray, share: float = 1 / 3, at: int = 0, seed: int = 9) -> np.ndarray:
    """The frame with a textured object over a part of it."""
    width = round(S * share)
    frame = frame.copy()
    frame[:, at : at + width] = seen(scenery(seed))[:, :width]
    return frame


def fitting(reference: np.ndarray, correction) -> float:
    """Share of patches that may be reused."""
    same = patch_staleness(reference, correction.frame, P) <= TOLERANCE
    return float((same & ~correction.outside).mean())


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return scenery()


@pytest.fixture(scope="module")
def reference(picture) -> np.ndarray:
    return seen(picture)


@pytest.fixture(scope="module")
def target(reference) -> CorrectionTarget:
    return CorrectionTarget(reference, ALL, P)


@pytest.fixture(params=["opencv", "numpy"])
def library(request, monkeypatch):
    """Both ways to compute; a target must be made after it."""
    if request.param == "opencv":
        pytest.importorskip("cv2")
    else:
        monkeypatch.setattr(frame_pixels, "cv2", None)
    return request.param


# ---- shake


@pytest.mark.parametrize(
    "moved", [(0.1, 0), (0.3, -0.2), (0.5, 0.5), (-0.6, 0.4), (1, -1), (2.2, 1.3), (-3, 2.5)]
)
def test_planted_shake_is_found_within_a_tenth_of_a_pixel_and_undone(picture, reference, library, moved):
    target = CorrectionTarget(reference, ALL, P)
    frame = noisy(seen(picture, *moved))
    found = target.correct(frame)
    assert np.abs(np.array(found.shift) - moved).max() <= 0.1 and not found.reasons
    assert found.gain == (1, 1, 1) or max(abs(gain - 1) for gain in found.gain) < 0.01
    before = (patch_staleness(reference, frame, P) <= TOLERANCE).mean()
    kept = 1 - found.outside.mean()
    assert fitting(reference, found) > 0.97 * kept - 0.02
    assert max(map(abs, moved)) < 0.45 or before < 0.9


def test_shake_is_found_behind_an_object_that_covers_a_third(picture, reference, target):
    for at in (0, 112, 224):
        frame = noisy(covered(seen(picture, 0.8, -0.6), at=at))
        found = target.correct(frame)
        assert np.abs(np.array(found.shift) - (0.8, -0.6)).max() < 0.1 and not found.reasons
        # The object is as stale as before.
        object_patches = np.zeros((GRID, GRID), dtype=bool)
        object_patches[:, -(-at // P) + 1 : (at + 112) // P - 1] = True
        staleness = patch_staleness(reference, found.frame, P)
        assert (staleness[object_patches.reshape(-1)] > TOLERANCE).mean() > 0.97


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("moved", [(0.7, -0.5), (2.5, 1.5)])
def test_an_object_that_moves_before_a_still_camera_is_no_shake(picture, plain, moved):
    """Before a plain wall nothing but the object can tell; before a picture the rest says that nothing moved."""
    still = np.full((S, S, 3), 130, dtype=np.uint8) if plain else seen(picture)

    def with_object(right, down):
        frame = still.copy()
        frame[100:250, 20:190] = seen(scenery(4), right, down)[100:250, 20:190]
        return frame

    found = CorrectionTarget(noisy(with_object(0, 0)), ALL, P).correct(noisy(with_object(*moved), seed=2))
    assert found.shift == (0, 0) and (found.reasons or not plain)


def test_patches_that_are_not_trusted_have_no_say(picture, reference):
    """Two thirds of the picture move elsewhere; the trusted third stays."""
    trusted = np.zeros((GRID, GRID), dtype=bool)
    trusted[:, :8] = True
    frame = seen(picture, 2.0, 0).copy()
    frame[:, : 8 * P] = seen(picture, 0.5, 0)[:, : 8 * P]
    found = CorrectionTarget(reference, trusted.reshape(-1), P).correct(frame)
    assert np.abs(np.array(found.shift) - (0.5, 0)).max() < 0.1


def test_pixels_from_beyond_the_edge_are_told(picture, reference, target):
    for moved, columns in ((0.3, []), (0.8, [GRID - 1]), (-0.8, [0]), (3.0, [GRID - 1])):
        outside = target.correct(seen(picture, moved, 0)).outside.reshape(GRID, GRID)
        assert outside.all(axis=0).nonzero()[0].tolist() == columns
        assert outside.sum() == GRID * len(columns)
    both = target.correct(seen(picture, 1.5, -1.5)).outside.reshape(GRID, GRID)
    assert both.sum() == 2 * GRID - 1 and both[0].all() and both[:, -1].all()


@pytest.mark.parametrize("side", [340, 349])
def test_a_remainder_beyond_the_grid_changes_no_estimate(picture, reference, side):
    wide = np.pad(reference, ((0, side - S), (0, side - S), (0, 0)), mode="reflect")
    frame = np.pad(seen(picture, 0.7, -0.4), ((0, side - S), (0, side - S), (0, 0)), constant_values=99)
    found = CorrectionTarget(wide, ALL, P).correct(frame)
    assert np.abs(np.array(found.shift) - (0.7, -0.4)).max() < 0.1 and found.frame.shape == frame.shape
    assert not found.outside.reshape(GRID, GRID)[:, -1].any()  # the remainder lies beyond the last patch


@pytest.mark.parametrize("patch", [4, 13, 16, 28])
def test_other_patch_sizes(picture, reference, patch):
    patches = (S // patch) ** 2
    found = CorrectionTarget(reference, np.ones(patches, dtype=bool), patch).correct(seen(picture, -0.6, 1.2))
    assert np.abs(np.array(found.shift) - (-0.6, 1.2)).max() < 0.1 and found.outside.shape == (patches,)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(-4, 4), st.floats(-4, 4), st.booleans())
def test_a_shift_in_opencv_is_the_one_in_numpy(seed, right, down, colour):
    pytest.importorskip("cv2")
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(9, 40)), int(rng.integers(9, 40)))
    image = rng.integers(0, 256, (*shape, 3) if colour else shape, dtype=np.uint8)
    fast = shifted(image, (right, down))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_pixels, "cv2", None)
        slow = shifted(image, (right, down))
    assert fast.dtype == np.uint8 and np.abs(fast.astype(int) - slow).max() <= 1
    whole = shifted(image, (2, -1))
    assert np.array_equal(whole[1:, :-2], image[:-1, 2:])


# ---- exposure


@pytest.mark.parametrize("gain", [0.9, 0.95, 0.98, 1.02, 1.06, 1.1, (1.08, 1.0, 0.92), (0.95, 1.0, 1.1)])
def test_planted_exposure_and_white_balance_are_found_and_undone(reference, library, gain):
    target = CorrectionTarget(reference, ALL, P)
    frame = noisy(exposed(reference, gain, 4.0))
    found = target.correct(frame)
    assert not found.reasons and found.shift == (0, 0)
    assert np.abs(np.array(found.gain) - gain).max() < 0.012
    assert np.abs(np.array(found.offset) - 4).max() < 1.0 and found.residual < 0.6
    # Clipped patches are honestly stale.
    assert fitting(reference, found) > 0.97


def test_exposure_follows_behind_an_object_that_covers_a_third(reference, target):
    frame = noisy(exposed(covered(reference), 1.08))
    found = target.correct(frame)
    assert np.abs(np.array(found.gain) - 1.08).max() < 0.015 and not found.reasons


def test_both_at_once(picture, reference, target):
    frame = noisy(exposed(covered(seen(picture, 0.6, -0.5), 0.25), (1.07, 1.05, 1.02), 2))
    found = target.correct(frame)
    assert np.abs(np.array(found.shift) - (0.6, -0.5)).max() < 0.1
    assert np.abs(np.array(found.gain) - (1.07, 1.05, 1.02)).max() < 0.015 and not found.reasons
    assert fitting(reference, found) > 0.9 * 0.75 * (1 - found.outside.mean())


def test_where_light_is_clipped_it_stays_clipped_and_the_rest_is_right(picture):
    bright = exposed(seen(picture), 1.25, 25)
    share = (bright == 255).mean()
    assert 0.05 < share < 0.5
    target = CorrectionTarget(bright, ALL, P)
    frame = exposed(seen(picture), 1.25 * 1.08, 25 * 1.08)
    found = target.correct(frame)
    assert np.abs(np.array(found.gain) - 1.08).max() < 0.02 and not found.reasons
    assert (found.frame[(frame == 255) & (bright == 255)] == 255).all()
    assert fitting(bright, found) > fitting(bright, target.correct(frame, follow_exposure=False))


def test_dark_frames(picture):
    dark = seen(scenery(dark=0.12))
    assert dark.mean() < 20
    target = CorrectionTarget(dark, ALL, P)
    found = target.correct(noisy(exposed(dark, 1.1), 1.0))
    assert np.abs(np.array(found.gain) - 1.1).max() < 0.05
    black = np.zeros_like(dark)
    for one, other in ((black, dark), (dark, black), (black, black)):
        nothing = CorrectionTarget(one, ALL, P).correct(other)
        assert not nothing.changed and nothing.frame is other
        assert nothing.reasons or one is other


def test_flat_pictures_tell_an_offset_and_no_gain():
    wall = np.full((S, S, 3), 120, dtype=np.uint8)
    found = CorrectionTarget(noisy(wall), ALL, P).correct(noisy(wall + 6, seed=2))
    assert any("texture" in reason for reason in found.reasons) and found.shift == (0, 0)
    assert np.abs(np.array(found.gain) - 1).max() < 0.1
    assert np.abs(patch_staleness(wall, found.frame, P) - patch_staleness(wall, noisy(wall), P)).max() < 1


# ---- what cannot be corrected


@pytest.mark.parametrize(
    "change",
    [
        {"zoom": 1.05},
        {"zoom": 0.93},
        {"angle": 3},
        {"right": 18.0},
        {"right": 7.0, "down": -9.0},
    ],
    ids=str,
)
def test_zoom_pan_and_rotation_cannot_be_corrected(picture, target, change):
    found = target.correct(seen(picture, **change))
    assert found.shift == (0, 0) and any(reason.startswith("shift") for reason in found.reasons)


def test_day_to_infrared_and_lights_out_cannot_be_corrected(picture, reference, target):
    grey = reference.mean(-1, keepdims=True).repeat(3, axis=-1)
    infrared = np.clip(255 - 0.6 * grey + 0.3 * reference[..., ::-1], 0, 255).astype(np.uint8)
    for frame in (infrared, exposed(reference, 0.1), seen(scenery(5))):
        found = target.correct(frame)
        assert any(reason.startswith("exposure") for reason in found.reasons)
        assert not found.changed and found.frame is frame


def test_only_what_was_asked_for_is_done(picture, target):
    frame = exposed(seen(picture, 0.8, 0), 1.06)
    nothing = target.correct(frame, follow_exposure=False, align=False)
    assert nothing.frame is frame and not nothing.changed and not nothing.reasons
    assert target.correct(frame, align=False).shift == (0, 0)
    assert target.correct(frame, follow_exposure=False).gain == (1, 1, 1)


# ---- nothing real is explained away


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_real_change_stays_as_stale_as_it_was(data):
    """A lamp, a figure, a darker object, anywhere, under shake and gain: its patches are no less stale than they would be
    in a frame of a camera that neither shakes nor follows."""
    picture = scenery(data.draw(st.integers(0, 3)))
    reference = seen(picture)
    target = CorrectionTarget(reference, ALL, P)
    rows, columns = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    top, left = data.draw(st.integers(1, GRID - rows - 1)), data.draw(st.integers(1, GRID - columns - 1))
    change = data.draw(st.sampled_from([-60, -30, -15, 15, 30, 60]))
    gain = data.draw(st.sampled_from([0.93, 1.0, 1.07]))
    moved = data.draw(st.sampled_from([(0, 0), (0.5, -0.4)]))
    where = np.zeros((GRID, GRID), dtype=bool)
    where[top : top + rows, left : left + columns] = True
    pixels = pixel_mask(where.reshape(-1), S, P)[..., None]

    def changed(image):
        return np.where(pixels, np.clip(image.astype(int) + change, 0, 255), image).astype(np.uint8)

    still = patch_staleness(reference, changed(reference), P)
    frame = noisy(exposed(changed(seen(picture, *moved)), gain))
    found = target.correct(frame)
    inner = where.copy()
    inner[[top, top + rows - 1], :] = inner[:, [left, left + columns - 1]] = False
    inner = (inner if inner.any() else where).reshape(-1)
    corrected = patch_staleness(reference, found.frame, P)
    assert (corrected[inner] > still[inner] * 0.7 - 3).all()
    fresh = still[inner] > 1.6 * TOLERANCE
    assert (corrected[inner][fresh] > TOLERANCE).all()


def test_undoing_an_exposure_is_the_same_in_both_ways(reference):
    pytest.importorskip("cv2")
    gain, offset = (1.1, 0.95, 1.0), (3.0, -2.0, 0.5)
    fast = with_exposure_undone(reference, gain, offset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_pixels, "cv2", None)
        assert np.array_equal(fast, with_exposure_undone(reference, gain, offset))
