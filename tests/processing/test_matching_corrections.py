"""Matching with `follow_exposure` and `align`: a camera that shakes or follows the light keeps its background."""

import numpy as np
import pytest
from naive_staleness import naive_staleness
from textures import texture

from backdrop.processing.background_matching_backdrop import BackgroundMatcher
from backdrop.processing.frame_pixels_backdrop import shifted

SIDE, PATCH = 336, 14
ALL = np.ones(576, dtype=bool)


def noisy(picture, rng, sigma=1.5):
    return np.clip(picture + rng.normal(0, sigma, picture.shape) + 0.5, 0, 255).astype(np.uint8)


def frames_of(disturbance, count=12):
    """A still background, disturbed as a whole, and a figure that walks in front of it."""
    rng, still = np.random.default_rng(0), texture(SIDE, 3)
    for number in range(count):
        picture = still.copy()
        left = 20 + 20 * number
        picture[150:220, left : left + 30] = (250, 30, 30)
        yield noisy(disturbance(picture, number), rng), left


def gains(picture, number):
    return np.clip(picture.astype(float) * (1 + 0.04 * (number % 3 - 1)) + 4 * (number % 2), 0, 255)


def shakes(picture, number):
    return shifted(picture, np.array([0.6 * (-1) ** number, 0.5 * (number % 3 - 1)]))


def reused(disturbance, **options):
    """Shares reused of the later frames, with the promise checked on each."""
    matcher, shares = BackgroundMatcher(PATCH, 10, **options), []
    reports: list = []
    matcher.observer = reports.append
    for number, (image, left) in enumerate(frames_of(disturbance)):
        match = matcher.match(image)
        if match is None:
            matcher.miss(image, ALL)
            continue
        report = reports[-1]
        kept = ~match.fresh
        staleness = naive_staleness(match.reference.pixels, match.frame, PATCH)
        assert (staleness[kept & match.reference.patch_mask] <= 10 + 1e-4).all()
        figure = np.zeros((24, 24), dtype=bool)
        figure[11:15, (left + 4) // PATCH : (left + 26) // PATCH] = True
        assert match.fresh[figure.reshape(-1)].all(), f"the figure of frame {number} was reused"
        if match.estimate is not None:
            assert match.fresh[match.estimate.outside].all()
        assert report.estimate is match.estimate
        shares.append(1 - match.encoded.mean())
    return np.mean(shares) if len(shares) > 5 else 0.0


@pytest.mark.parametrize(
    ("disturbance", "option", "gain"),
    [(gains, "follow_exposure", 0.15), (shakes, "align", 0.08)],
    ids=["gains", "shakes"],
)
def test_a_correction_keeps_the_background(disturbance, option, gain):
    without, with_it = reused(disturbance), reused(disturbance, **{option: True})
    assert with_it > 0.8 and with_it > without + gain, (without, with_it)


def test_corrections_cost_a_quiet_camera_nothing():
    plain = reused(lambda picture, number: picture)
    assert reused(lambda picture, number: picture, follow_exposure=True, align=True) > plain - 0.02


def test_without_a_correction_nothing_is_estimated():
    matcher = BackgroundMatcher(PATCH, 10)
    still = texture(SIDE, 3)
    matcher.miss(still, ALL)
    assert matcher.match(still).estimate is None and matcher.correct is None


def test_a_reference_that_was_made_anew_is_a_new_target():
    """The corrector keeps targets by number; layers made anew change the picture under it."""
    from backdrop.processing.frame_corrector_backdrop import FrameCorrector
    from backdrop.processing.reference_store_backdrop import Reference

    matcher = BackgroundMatcher(PATCH, 10)
    pictures = [texture(SIDE, seed) for seed in (3, 4)]
    for picture in pictures:
        matcher.miss(picture, ALL)
    references = [matcher.match(picture).reference for picture in pictures]
    corrector = FrameCorrector(PATCH, follow_exposure=True, align=False)
    same_number = [
        Reference.of_layers(reference.layers, 7, reference.noise, PATCH) for reference in references
    ]
    for reference, picture in zip(same_number, pictures, strict=True):
        darker = np.clip(picture.astype(float) * 0.94, 0, 255).astype(np.uint8)
        assert abs(np.mean(corrector(reference, darker).gain) - 0.94) < 0.03
