"""Patch groups as values and as RGBA images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from backdrop.processing.patch_groups_backdrop import (
    BACKGROUND,
    METADATA_KEY,
    OBJECT,
    covered_patches,
    group_to_image,
    grow_patches,
    looks_like_group,
    make_group,
    pixel_mask,
    read_group,
    save_group,
    split_patches,
)

masks = st.lists(st.booleans(), min_size=16, max_size=16).map(np.array)
sides = st.sampled_from([56, 59])  # with and without a remainder


def noise(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@given(masks.filter(np.any), sides, st.sampled_from([BACKGROUND, OBJECT]))
@settings(deadline=None)
def test_a_group_comes_back_from_its_image(mask, side, kind):
    group = make_group(noise(side), mask, kind, 14)
    rgba = np.asarray(group_to_image(group, 14))
    assert looks_like_group(rgba)
    again = read_group(rgba, side, 14)
    assert np.array_equal(again.pixels, group.pixels)
    assert np.array_equal(again.patch_mask, mask)
    assert again.kind == kind
    owned = pixel_mask(mask, side, 14)
    assert np.array_equal(group.pixels, np.where(owned[..., None], noise(side), 0))
    assert group.pixels.dtype == np.uint8 and group.pixels.flags.c_contiguous


@given(masks, st.integers(0, 3), st.booleans())
@settings(deadline=None)
def test_every_patch_has_an_owner_and_overlap_is_the_ring(objects, margin, overlap):
    background, grown = split_patches(objects, margin, overlap)
    assert (background | grown).all()
    ring = grow_patches(objects, margin) & ~objects
    assert np.array_equal(background & grown, ring if overlap else np.zeros(16, dtype=bool))


def test_growth_reaches_diagonals_and_stops_at_the_border():
    corner = np.zeros(16, dtype=bool)
    corner[0] = True
    assert np.flatnonzero(grow_patches(corner, 1)).tolist() == [0, 1, 4, 5]
    assert np.array_equal(grow_patches(corner, 0), corner)
    assert grow_patches(corner, 9).all()


@pytest.mark.parametrize(("share", "expected"), [(0.0, True), (0.25, True), (0.26, False)])
def test_coverage_is_a_share_of_the_patch(share, expected):
    mask = np.zeros((56, 56), dtype=bool)
    mask[:7, :7] = True
    assert covered_patches(mask, 14, share)[0] == expected
    assert not covered_patches(np.zeros((56, 56), dtype=bool), 14, 0.0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:28], "56 x 28 pixels; wanted 56 x 56"),
        (lambda a: _with_alpha(a, (0, 0), 0), "varies inside patch 0"),
        (lambda a: _with_alpha(a, (slice(42, 56), slice(42, 56)), 254), "mixes"),
    ],
)
def test_a_malformed_group_is_named(change, message):
    group = make_group(noise(56), np.array([True] * 8 + [False] * 8), BACKGROUND, 14)
    with pytest.raises(ValueError, match=message):
        read_group(change(np.asarray(group_to_image(group, 14)).copy()), 56, 14)


def _with_alpha(rgba, where, value):
    rgba[(*where, 3)] = value
    return rgba


def test_ordinary_cut_outs_are_no_groups():
    for alpha in (0, 255, 252, 128):
        rgba = np.dstack([noise(56), np.full((56, 56), alpha, dtype=np.uint8)])
        assert not looks_like_group(rgba)
    rgba[:14, :14, 3] = 253
    rgba[14:, 14:, 3] = 255
    assert not looks_like_group(rgba)


def test_geometry_travels_in_the_png(tmp_path):
    group = make_group(noise(56), np.ones(16, dtype=bool), OBJECT, 14)
    save_group(group_to_image(group, 14, "resize+crop"), tmp_path / "g.png")
    image = Image.open(tmp_path / "g.png")
    text = image.info[METADATA_KEY]
    read_group(np.asarray(image), 56, 14, "resize+crop", text)
    with pytest.raises(ValueError, match="geometry 'resize.crop'; wanted 'pad.resize'"):
        read_group(np.asarray(image), 56, 14, "pad+resize", text)
    with pytest.raises(ValueError, match="patch_size 14; wanted 28"):
        read_group(np.asarray(image), 56, 28, "resize+crop", text)
