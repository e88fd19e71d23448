"""Staleness, and the small changes that are always seen at 10 grey levels, under noise and JPEG."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_staleness import naive_staleness
from textures import photographed, texture

from backdrop.processing.patch_groups_backdrop import patch_blocks
from backdrop.processing.staleness_backdrop import patch_staleness, patch_structure, reusable_patches
from backdrop.scenes.recording import plant_character


@pytest.mark.parametrize(("side", "patch_size"), [(56, 14), (60, 13), (8, 1), (50, 16)])
def test_staleness_is_the_contracts(side, patch_size):
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(2))
    assert np.allclose(
        patch_staleness(first, second, patch_size), naive_staleness(first, second, patch_size), atol=1e-4
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from([(56, 14), (45, 15), (59, 7), (4, 1)]))
@settings(deadline=None, max_examples=30)
def test_staleness_equals_the_definition(seed, geometry):
    side, patch = geometry
    rng = np.random.default_rng(seed)
    first, second = (rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(2))
    grid, half = side // patch, patch // 2
    expected = []
    for y in range(grid):
        for x in range(grid):
            cell = np.s_[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            difference = np.abs(first[cell].astype(float) - second[cell].astype(float))
            quarters = [
                difference[a][:, b]
                for a in (np.s_[:half], np.s_[half:])
                for b in (np.s_[:half], np.s_[half:])
            ]
            expected.append(max(quarter.mean() for quarter in quarters if quarter.size))
    np.testing.assert_allclose(patch_staleness(first, second, patch), expected, rtol=1e-5)


def filtered_peaks(difference):
    """Largest absolute values of one patch `[p, p, 3]` under the 3 x 3 binomial filter: of a channel, of the RGB mean."""
    p = len(difference)
    padded = np.pad(difference, ((1, 1), (1, 1), (0, 0)))
    weights = np.outer([1, 2, 1], [1, 2, 1])
    smooth = sum(
        weights[y, x] * padded[y : y + p, x : x + p] for y in range(3) for x in range(3)
    )  # 16 times the filter, in whole numbers
    return np.abs(smooth).max(), np.abs(smooth.sum(axis=-1)).max()


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(56, 14), (45, 15), (59, 7), (4, 1)]),
    st.sampled_from([1, 2.5, 10, 20, 254.9]),
    st.floats(0, 2.6),
)
@settings(deadline=None, max_examples=150)
def test_the_short_cut_for_small_differences_changes_no_patch(seed, geometry, tolerance, strength):
    side, patch = geometry
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    # Each patch differs by up to its own largest value, around the bounds of the two finer measures.
    grid = side // patch
    largest = np.rint(rng.uniform(0, strength * tolerance, (grid, grid))).astype(int)
    largest = np.pad(largest.repeat(patch, axis=0).repeat(patch, axis=1), (0, side - grid * patch))[..., None]
    sign = rng.integers(-1, 2, first.shape) if seed % 2 else rng.choice([-1, 1])
    second = np.clip(first + sign * largest, 0, 255).astype(np.uint8)
    reusable, staleness = reusable_patches(first, second, patch, tolerance)
    np.testing.assert_array_equal(staleness, patch_staleness(first, second, patch))
    difference = patch_blocks(second.astype(int) - first, patch)
    peaks = [filtered_peaks(block) for block in difference]
    expected = [
        stale <= tolerance and channel <= 16 * 2.0 * tolerance and luma <= 48 * 1.2 * tolerance
        for stale, (channel, luma) in zip(staleness, peaks, strict=True)
    ]
    assert reusable.tolist() == expected


def test_a_changed_character_is_stale_where_a_mean_over_the_patch_would_hide_it():
    reference = np.full((56, 56, 3), 120, dtype=np.uint8)
    image = reference.copy()
    image[2:6, 2:4] = 255  # 8 pixels
    assert (
        patch_staleness(reference, image, 14)[0] > 10 > np.abs(image.astype(int) - reference).mean() * 16 / 4
    )


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


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([(98, 14), (96, 16), (45, 5), (6, 1), (30, 3)]),
    st.floats(1, 250),
)
def test_the_structure_of_a_patch_is_its_definition(seed, geometry, strength):
    side, p = geometry
    rng = np.random.default_rng(seed)
    grid, half, tolerance = side // p, p // 2, 10
    difference = np.clip(rng.normal(0, strength, (side, side, 3)), -255, 255).astype(np.int16)
    grey, found = difference.sum(axis=2).astype(np.float64), patch_structure(difference, p, tolerance)
    parts = [slice(0, half), slice(half, p)] if half else [slice(0, 1)]
    for patch in range(grid * grid):
        top, left = (index * p for index in divmod(patch, grid))
        block, colours = grey[top : top + p, left : left + p], difference[top : top + p, left : left + p]
        mean = block.mean()
        padded = np.pad(block - np.rint(np.float32(mean)), 1)
        weights = np.outer([1, 2, 1], [1, 2, 1])
        smooth = sum(
            weights[row, column] * padded[row : row + p, column : column + p]
            for row in range(3)
            for column in range(3)
        )
        lines = max(np.abs(block.mean(axis=axis) - mean).max() for axis in (0, 1))
        quarters = max(
            np.abs(colours[rows, columns].mean(axis=(0, 1)) - colours.mean(axis=(0, 1))).max()
            for rows in parts
            for columns in parts
        )
        wanted = [np.abs(smooth).max() / 48, lines / 3, quarters]
        assert np.allclose(found[patch, :3], wanted, rtol=1e-4, atol=1e-3), (patch, found[patch], wanted)
