"""Undoing what a camera does to a whole frame, before it is compared with a reference: exposure, and a little shake.

Both estimates are robust: they are made on the patches that agree with each other, so that what moves in front, a lamp
that goes on or a door that opens neither spoils them nor is explained away by them. Both have bounds; what lies beyond
(zoom, pan, rotation, day to infrared) is not corrected, and the result says why.

How a matcher uses it: keep one `CorrectionTarget` for a reference it compares often, call `correct` with the frame, then
measure staleness between the reference and `result.frame`. Patches of `result.outside` hold pixels from beyond the frame's
edge: they must be fresh. Fresh patches are cut from `result.frame` too, so that background and objects fit together; the
report tells `result.gain`, `result.offset`, `result.shift` and `result.reasons`.

`S` is the side of the image as the model sees it, `P` its number of patches, `g` patches along a side. OpenCV is used
where it is installed, and is about ten times faster; the results agree to a grey level.
"""

from dataclasses import dataclass

import numpy as np

from .frame_pixels_backdrop import (
    cell_means,
    gradients,
    shifted,
    shrunk,
    smooth_luma,
    stacked,
    with_exposure_undone,
)

MAX_SHIFT = 4.0  # pixels, in each direction
MIN_SHIFT = (
    0.04  # pixels; a smaller shift is left as it is: resampling would cost more sharpness than it mends
)
GAIN_BOUNDS = (1 / 1.5, 1.5)
MAX_OFFSET = 32.0  # grey levels
MIN_CHANGE = 0.3  # grey levels; an exposure that changes less is left as it is
# Share of the patches that can tell, which must agree with an estimate.
MIN_AGREEING, MIN_AGREEING_COLOURS = 0.5, 0.35
MIN_PATCHES = 12  # that can tell; of fewer no estimate is made
# Exposure: how far a patch's mean colour may be off the fitted line, grey levels; first, and once it has settled.
ROUGH_MISFIT, FINE_MISFIT = 5.0, 3.0
TRIED_LINES, TRIED_ON = 32, 192  # lines through two patches, patches that they are tried on
CLIPPED_SHARE = 0.02  # of a patch's pixels at 0 or 255; beyond it its mean says nothing of exposure
FLAT = 6.0  # grey levels; a line through two patches that differ less says nothing of the gain
# Where a picture has few colours, gain and offset cannot be told apart, and a wrong pair would spoil every other colour.
# What cameras do is a gain of about so much around 1, and an offset of about so much around 0 ...
USUAL_GAIN, USUAL_OFFSET = 0.1, 4.0
EVIDENCE = 12  # ... which counts as much as so many patches: their misfits are not independent of each other
LEAST_MISFIT = 0.5  # grey levels; of patches that agree better this is assumed
# Shift: a patch can tell one where its gradient is this strong, grey levels a pixel (root mean square).
TEXTURE = 2.0
# It agrees where what is left of its difference is no more than noise and so many pixels of displacement explain.
NOISE, MISPLACED = 3.0, 0.3
MIN_SPREAD = 0.6  # of the height and the width of what is trusted, over which what agrees must be spread
BETTER = 0.6  # of the difference without the shift; what is left with it, where a shift explains a patch
SHRUNK = (
    2.0,
    3.5,
)  # the picture is looked at in two sizes, smaller by these; a patch has 4 pixels a side or more
# Steps at each level, at most; the last is one that moves by less than so many pixels. Each level sees the next finer one's
# start within its reach, and the finest ends within some hundredths.
COARSE_STEPS, FINE_STEPS = (4, 0.4), (3, 0.15)
REWEIGHTS = 3


@dataclass(frozen=True, eq=False)
class Correction:
    """A frame as it would look with the reference's exposure and position, and what was estimated.

    Attributes:
        frame: uint8 `[S, S, 3]`; the given frame where nothing was corrected.
        gain, offset: for each channel: frame = gain * reference + offset; 1 and 0 where exposure was not corrected.
        shift: (right, down) in pixels by which the frame's picture lay beside the reference's; (0, 0) where not corrected.
        residual: mean absolute difference of the mean colours of the agreeing patches after the correction, grey levels;
            nan where nobody asked for exposure or it was not corrected.
        outside: bool `[P]`, patches with pixels from beyond the frame's edge: they must not be reused.
        reasons: for each correction that was asked for and could not be made, why; empty where all is well.
    """

    frame: np.ndarray
    gain: tuple[float, float, float]
    offset: tuple[float, float, float]
    shift: tuple[float, float]
    residual: float
    outside: np.ndarray
    reasons: tuple[str, ...]

    @property
    def changed(self) -> bool:
        """Whether the frame was changed at all."""
        return self.shift != (0.0, 0.0) or self.gain != (1.0, 1.0, 1.0) or self.offset != (0.0, 0.0, 0.0)


class CorrectionTarget:
    """A reference that frames are corrected towards, with what can be computed once.

    Args:
        reference: uint8 `[S, S, 3]`.
        trusted: bool `[P]`, the patches that the reference owns; the others are not looked at.
        patch_size: pixels.
    """

    def __init__(self, reference: np.ndarray, trusted: np.ndarray, patch_size: int):
        self.patch_size = patch_size
        self.grid = reference.shape[0] // patch_size
        self.trusted: np.ndarray = trusted.astype(bool)
        self._trusted_spread = np.maximum(1, _spread(np.flatnonzero(self.trusted), self.grid))
        inner = self._inner(reference)
        fine_cell, coarse_cell = (min(patch_size, max(4, round(patch_size / n))) for n in SHRUNK)
        self._small_side = self.grid * fine_cell
        small = shrunk(inner, self._small_side)
        self._means, self._clipped = cell_means(small, self.grid), _clipped_share(small, self.grid)
        fine = smooth_luma(small)
        self._fine = _Level(fine, self.grid, patch_size)
        self._coarse = _Level(shrunk(fine, self.grid * coarse_cell), self.grid, patch_size)

    def correct(self, frame: np.ndarray, follow_exposure: bool = True, align: bool = True) -> Correction:
        """The frame with what could be estimated undone; first the shift, then the exposure.

        Args:
            frame: uint8 `[S, S, 3]`.
            follow_exposure: undo a gain and an offset of each channel.
            align: undo a shift of the whole frame by at most `MAX_SHIFT` pixels.
        """
        corrected, reasons = frame, []
        shift: tuple[float, float] = (0.0, 0.0)
        outside: np.ndarray = np.zeros(self.grid**2, dtype=bool)
        if align:
            shift, reason = self.shift(frame)
            if reason is not None:
                reasons.append(reason)
            elif shift != (0.0, 0.0):
                corrected, outside = shifted(frame, shift), self._outside(shift, frame.shape[0])
        gain, offset, residual = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), float("nan")
        if follow_exposure:
            gain, offset, residual, reason = self.exposure(corrected)
            if reason is not None:
                reasons.append(reason)
            else:
                corrected = with_exposure_undone(corrected, gain, offset)
        return Correction(corrected, gain, offset, shift, residual, outside, tuple(reasons))

    # ---- exposure

    def exposure(
        self, frame: np.ndarray
    ) -> tuple[tuple[float, float, float], tuple[float, float, float], float, str | None]:
        """Gain and offset of each channel of a frame against the reference.

        Lines through pairs of patches are tried, the one that leaves the least truncated squared misfit is refined by
        least squares on the patches that agree with it in all channels (MSAC: P. Torr and A. Zisserman, 2000).

        Args:
            frame: uint8 `[S, S, 3]`.

        Returns:
            Gains, offsets, the residual (see `Correction`), and why it cannot be estimated, None where it can.
        """
        same, none = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
        small = shrunk(self._inner(frame), self._small_side)
        clear = (self._clipped <= CLIPPED_SHARE) & (_clipped_share(small, self.grid) <= CLIPPED_SHARE)
        usable = np.flatnonzero(self.trusted & clear.all(axis=1))
        if len(usable) < MIN_PATCHES:
            return (
                same,
                none,
                float("nan"),
                f"exposure: {len(usable)} patches are not clipped; wanted {MIN_PATCHES}",
            )
        known, found = self._means[usable], cell_means(small, self.grid)[usable]
        some = slice(None, None, -(-len(usable) // TRIED_ON))
        lines = np.array([_best_line(known[some, c], found[some, c]) for c in range(3)])
        for misfit in (ROUGH_MISFIT, FINE_MISFIT, FINE_MISFIT):
            off = np.abs(found - known * lines[:, 0] - lines[:, 1])
            agree = (off <= misfit).all(axis=1)
            if agree.mean() < MIN_AGREEING_COLOURS:
                reason = (
                    f"exposure: {agree.mean():.0%} of the patches agree with one gain and offset; wanted "
                    f"{MIN_AGREEING_COLOURS:.0%}"
                )
                return same, none, float("nan"), reason
            lines = np.array([_line(known[agree, c], found[agree, c], *lines[c]) for c in range(3)])
        gains, offsets = lines.T
        if not (
            (gains >= GAIN_BOUNDS[0]) & (gains <= GAIN_BOUNDS[1]) & (np.abs(offsets) <= MAX_OFFSET)
        ).all():
            reason = (
                f"exposure: gain {_numbers(gains)} and offset {_numbers(offsets)}; wanted {GAIN_BOUNDS[0]:.2f} to "
                f"{GAIN_BOUNDS[1]:.2f}, at most {MAX_OFFSET:g} grey levels"
            )
            return same, none, float("nan"), reason
        fitted = known[agree] * gains + offsets
        residual = float(np.abs((found[agree] - fitted) / gains).mean())
        before, after = (
            np.minimum(np.abs(off), FINE_MISFIT).mean()
            for off in (found - known, found - known * gains - offsets)
        )
        if np.abs(fitted - known[agree]).max() < MIN_CHANGE or after >= before:
            return same, none, float(np.abs(found[agree] - known[agree]).mean()), None
        red, green, blue = gains.tolist()
        return (red, green, blue), tuple(offsets.tolist()), residual, None

    # ---- shift

    def shift(self, frame: np.ndarray) -> tuple[tuple[float, float], str | None]:
        """By how many pixels (right, down) the frame's picture lies beside the reference's.

        Least squares on gradients (B. Lucas and T. Kanade, 1981) from coarse to fine. The brightness of each patch is
        left free, so that exposure plays no part, and patches that fit badly lose weight.

        Args:
            frame: uint8 `[S, S, 3]`.

        Returns:
            The shift, and why it cannot be estimated, None where it can.
        """
        still = (0.0, 0.0)
        can_tell = self.trusted & (self._fine.texture >= TEXTURE**2)
        if can_tell.sum() < MIN_PATCHES:
            return still, f"shift: {can_tell.sum()} patches have texture; wanted {MIN_PATCHES}"
        fine = smooth_luma(shrunk(self._inner(frame), self._small_side))
        estimate = np.zeros(2)
        for level, (steps, small_step) in ((self._coarse, COARSE_STEPS), (self._fine, FINE_STEPS)):
            luma = shrunk(fine, len(level.luma))
            for _ in range(steps):
                step, left = level.step(luma, estimate, can_tell)
                estimate = estimate - step
                if np.abs(estimate).max() > MAX_SHIFT:
                    return still, f"shift: more than {MAX_SHIFT:g} pixels"
                if np.abs(step).max() < small_step:
                    break
        agree = left <= NOISE**2 + MISPLACED**2 * self._fine.texture[can_tell]
        if agree.mean() < MIN_AGREEING:
            return (
                still,
                f"shift: {agree.mean():.0%} of the patches with texture agree with one; wanted {MIN_AGREEING:.0%}",
            )
        if np.abs(estimate).max() < MIN_SHIFT:
            return still, None
        # Most patches that would look different by such a shift must look better for it. Else something moves in front of a
        # camera that stands still, and agrees with itself.
        noise = min(max(1.0, float(np.median(left))), NOISE**2)
        telling = self._fine.texture[can_tell] * float(estimate @ estimate) / 2 > 2 * noise
        if telling.sum() < MIN_PATCHES:
            return still, None  # too little to see
        better = telling & (left < BETTER * self._fine.difference(fine)[can_tell])
        share = better.sum() / telling.sum()
        if share < MIN_AGREEING:
            return (
                still,
                f"shift: it suits {share:.0%} of the patches that can tell; wanted {MIN_AGREEING:.0%}",
            )
        spread = _spread(np.flatnonzero(can_tell)[better], self.grid) / self._trusted_spread
        if spread.min() < MIN_SPREAD:
            return still, "shift: what agrees lies in one part of the picture; wanted it all over"
        return (float(estimate[0]), float(estimate[1])), None

    def _inner(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels that belong to patches."""
        inner = self.grid * self.patch_size
        return pixels[:inner, :inner]

    def _outside(self, shift: tuple[float, float], side: int) -> np.ndarray:
        """Patches whose pixels come from more than half a pixel beyond the last pixel's centre, bool `[P]`."""
        edges: np.ndarray = np.arange(self.grid) * self.patch_size
        beyond = []
        for move in shift:
            first, last = edges + move, edges + self.patch_size - 1 + move
            beyond.append((first < -0.5) | (last > side - 0.5))
        return (beyond[1][:, None] | beyond[0][None, :]).reshape(-1)


class _Level:
    """A reference's luma at one size, with its gradients and their sums in each patch.

    Args:
        luma: float32 `[n, n]`, n a multiple of `grid`.
        grid: `g`.
        patch_size: of the full size; gradients and shifts are in its pixels.

    Attributes:
        luma: as given.
        texture: mean squared gradient of each patch without its mean, `[P]`.
    """

    def __init__(self, luma: np.ndarray, grid: int, patch_size: int):
        self.luma, self.grid = luma, grid
        self._scale = len(luma) / (grid * patch_size)  # pixels of this level for one of the full size
        right, down = (gradient * np.float32(self._scale) for gradient in gradients(luma))
        self._right, self._down = right, down
        sums = cell_means(stacked(right, down, right * right, right * down, down * down), grid).T
        self._mean_right, self._mean_down = sums[:2]
        xx, xy, yy = sums[2] - sums[0] ** 2, sums[3] - sums[0] * sums[1], sums[4] - sums[1] ** 2
        self._tensor = np.stack([xx, xy, yy])  # [3, P]
        self.texture = xx + yy

    def difference(self, luma: np.ndarray) -> np.ndarray:
        """Variance of a frame's difference within each patch without any shift, grey levels squared, `[P]`."""
        off = luma - self.luma
        mean, square = cell_means(stacked(off, off * off), self.grid).T
        return square - mean * mean

    def step(
        self, luma: np.ndarray, estimate: np.ndarray, can_tell: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """One step of least squares, in which patches that fit badly lose weight.

        Args:
            luma: of a frame, float32 `[n, n]`.
            estimate: the shift so far, (right, down).
            can_tell: bool `[P]`, the patches that are asked, N of them.

        Returns:
            How far beyond the true shift the estimate is, (right, down), and the variance of the difference that will be
            left in each of the patches, grey levels squared, `[N]`.
        """
        off = shifted(luma, estimate * self._scale) - self.luma
        sums = cell_means(stacked(off, off * off, off * self._right, off * self._down), self.grid)[can_tell].T
        mean = sums[0]
        energy = np.maximum(sums[1] - mean**2, 0)
        side = np.stack(
            [sums[2] - mean * self._mean_right[can_tell], sums[3] - mean * self._mean_down[can_tell]]
        )
        tensor = self._tensor[:, can_tell]
        left = energy
        for _ in range(REWEIGHTS):
            weight = 1 / (left + NOISE**2)
            (xx, xy, yy), (x, y) = (tensor @ weight).tolist(), (side @ weight).tolist()
            ridge = 1e-6 * (xx + yy) + 1e-12
            xx, yy = xx + ridge, yy + ridge
            area = xx * yy - xy * xy
            right, down = (yy * x - xy * y) / area, (xx * y - xy * x) / area
            explained = np.array([right * right, 2 * right * down, down * down], dtype=np.float32) @ tensor
            left = energy - 2 * (np.array([right, down], dtype=np.float32) @ side) + explained
            np.maximum(left, 0, out=left)
        return np.array([right, down]), left


def _clipped_share(small: np.ndarray, grid: int) -> np.ndarray:
    """Share of each patch's values that are as dark or as bright as can be, float32 `[P, 3]`."""
    clipped = ((small < 0.5) | (small > 254.5)).astype(np.float32)
    return cell_means(clipped, grid)


def _best_line(known: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Gain and offset that most patches agree with, of lines through one or two patches, and of none."""
    order = np.argsort(known, kind="stable")
    half = len(order) // 2
    first = order[: half : -(-half // TRIED_LINES)]
    second = order[half : 2 * half : -(-half // TRIED_LINES)]
    apart = known[second] - known[first]
    pairs = np.where(apart >= FLAT, (found[second] - found[first]) / np.maximum(apart, FLAT), 1.0)
    gains = np.concatenate([[1.0], pairs, found[second] / np.maximum(known[second], 1.0)])
    offsets = np.zeros(len(gains))
    offsets[1 : 1 + len(first)] = found[first] - pairs * known[first]
    off = found[None] - gains[:, None] * known[None] - offsets[:, None]
    misfit = np.minimum(off * off, ROUGH_MISFIT**2).mean(axis=1)
    unusual = ((gains - 1) / USUAL_GAIN) ** 2 + (offsets / USUAL_OFFSET) ** 2
    best = int((misfit + unusual / EVIDENCE).argmin())
    return float(gains[best]), float(offsets[best])


def _line(known: np.ndarray, found: np.ndarray, gain: float, offset: float) -> tuple[float, float]:
    """The most probable gain and offset: least squares, drawn to what is usual as far as the patches do not tell.

    Args:
        known, found: mean colours of one channel, of the reference and of the frame, `[N]`.
        gain, offset: an estimate, by whose misfit the patches' evidence is weighed.
    """
    x: np.ndarray = known.astype(np.float64)
    y: np.ndarray = found.astype(np.float64)
    misfit = max(LEAST_MISFIT, float(np.abs(y - gain * x - offset).mean()) * 1.25)
    weight = EVIDENCE / misfit**2
    share = weight / len(x)
    xx, x1 = share * float(x @ x) + USUAL_GAIN**-2, share * float(x.sum())
    one = weight + USUAL_OFFSET**-2
    xy, y1 = share * float(x @ y) + USUAL_GAIN**-2, share * float(y.sum())
    area = xx * one - x1 * x1
    return (one * xy - x1 * y1) / area, (xx * y1 - x1 * xy) / area


def _spread(patches: np.ndarray, grid: int) -> np.ndarray:
    """How far apart most of some patches lie, down and across, in patches: float `[2]`."""
    if not len(patches):
        return np.zeros(2)
    low, high = np.percentile(np.stack(np.divmod(patches, grid)), (10, 90), axis=1)
    return high - low


def _numbers(values: np.ndarray) -> str:
    return "/".join(f"{value:.2f}" for value in values)
