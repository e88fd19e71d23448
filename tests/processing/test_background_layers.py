"""What layers show together, and growth of patches, against the plain definitions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from backdrop.processing.background_layers_backdrop import put_patches
from backdrop.processing.patch_groups_backdrop import grow_patches
from backdrop.processing.staleness_backdrop import reusable_patches


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6), st.integers(0, 4))
def test_put_patches_shows_the_other_picture_in_its_patches_only(seed, grid, patch_size, rest):
    rng = np.random.default_rng(seed)
    side = grid * patch_size + min(rest, patch_size - 1)
    one, other = rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    mask = rng.random(grid * grid) < 0.5
    wanted = one.copy()
    for patch in np.flatnonzero(mask):
        top, left = (index * patch_size for index in divmod(int(patch), grid))
        wanted[top : top + patch_size, left : left + patch_size] = other[
            top : top + patch_size, left : left + patch_size
        ]
    before = one.copy()
    assert (put_patches(one, other, mask, patch_size) == wanted).all() and (one == before).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(0, 8))
def test_grown_patches_are_those_within_the_margin(seed, grid, margin):
    mask = np.random.default_rng(seed).random((grid, grid)) < 0.1
    rows, columns = np.nonzero(mask)
    at = np.arange(grid)
    near = (np.abs(at[:, None] - rows) <= margin)[:, None] & (np.abs(at[:, None] - columns) <= margin)[None]
    before = mask.copy()
    assert (grow_patches(mask.reshape(-1), margin) == near.any(axis=-1).reshape(-1)).all()
    assert (mask == before).all()


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_bounds_that_are_not_known_change_no_verdict(seed, some_known):
    rng = np.random.default_rng(seed)
    one = rng.integers(60, 190, (84, 84, 3), dtype=np.uint8)
    other = np.clip(one + rng.normal(0, rng.uniform(1, 12), one.shape), 0, 255).astype(np.uint8)
    bounds = np.full((36, 4), np.inf, dtype=np.float32)
    known = np.zeros(36, dtype=bool)
    if some_known:
        known[rng.integers(36)] = True
        bounds[known] = 0
    plain, _ = reusable_patches(one, other, 14, 10)
    bounded, _ = reusable_patches(one, other, 14, 10, bounds)
    assert (bounded[~known] == plain[~known]).all() and not bounded[known].any()
