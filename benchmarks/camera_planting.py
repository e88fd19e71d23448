"""Planting figures into frames of recordings: does matching ever reuse a patch that shows one?

    python -m backdrop.benchmarks.camera_planting cup.mp4 --plantings 1000 --brightness 1,0.3,0.1

Frames are darkened, noise of a known strength is added, and the matcher watches them. Then figures are planted into the next
frames, of three times the noise and more: people-sized blocks, bars, thin lines and characters of 8 px. A patch counts as erased where the
figure covers at least a quarter block of it (a line or character: the patch that shows most of it), and it is reused.
"""

import argparse
import json

import numpy as np

from backdrop.processing.background_matching_backdrop import BackgroundMatcher
from backdrop.processing.patch_groups_backdrop import patch_blocks

from .camera import default_processor
from .recordings import open_recording

WARM_UP = 24  # frames that are watched before the first figure


def planted(picture: np.ndarray, contrast: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A float picture `[S, S, 3]` with one figure, and where it is, bool `[S, S]`."""
    side, mask = picture.shape[0], np.zeros(picture.shape[:2], dtype=bool)
    kind = rng.integers(3)
    height, width = [(rng.integers(20, 90), rng.integers(14, 50)), (14, 1), (1, 14)][kind]
    row, column = rng.integers(0, side - height), rng.integers(0, side - width)
    mask[row : row + height, column : column + width] = True
    sign = 1 if picture[mask].mean() < 128 else -1
    return np.where(mask[..., None], picture + sign * contrast, picture), mask


def shown_patches(mask: np.ndarray, patch_size: int) -> np.ndarray:
    """The patches that must be fresh, bool `[P]`: a quarter covered, or the one that shows the most of it."""
    covered = patch_blocks(mask[..., None], patch_size).sum(axis=(1, 2, 3))
    wanted = covered >= patch_size**2 / 4
    return wanted if wanted.any() else covered == covered.max()


def run_planting(source: str, plantings: int, brightness: float, noise: float, seed: int = 0) -> dict:
    """Counts of plantings, of patches that had to be fresh, and of those that were reused."""
    rng, processor = np.random.default_rng(seed), default_processor()
    frames = [processor.model_images([frame])[0] for frame in open_recording(source).frames()]
    matcher = BackgroundMatcher(processor.patch_size, 10)
    patches = (frames[0].shape[0] // processor.patch_size) ** 2
    counts = {"plantings": 0, "patches": 0, "erased": 0, "mean": float(np.mean(frames[0]) * brightness)}

    def taken(picture: np.ndarray) -> np.ndarray:
        return np.clip(picture + rng.normal(0, noise, picture.shape) + 0.5, 0, 255).astype(np.uint8)

    index = 0
    while counts["plantings"] < plantings:
        picture = frames[index % len(frames)].astype(np.float32) * brightness
        if index >= WARM_UP:
            for _ in range(10):
                changed, mask = planted(picture, 3 * noise * rng.uniform(1, 2), rng)
                match = matcher.find(taken(changed))
                wanted = shown_patches(mask, processor.patch_size)
                counts["plantings"] += 1
                counts["patches"] += int(wanted.sum())
                counts["erased"] += 0 if match is None else int((wanted & ~match.fresh).sum())
        frame = taken(picture)
        match = matcher.match(frame)
        if match is None:
            matcher.miss(frame, np.ones(patches, dtype=bool))
        index += 1
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording")
    parser.add_argument("--plantings", type=int, default=1000)
    parser.add_argument("--brightness", default="1,0.3,0.1")
    parser.add_argument("--noise", type=float, default=2.0, help="standard deviation, grey levels")
    options = parser.parse_args()
    for brightness in map(float, options.brightness.split(",")):
        figures = run_planting(options.recording, options.plantings, brightness, options.noise)
        print(json.dumps({"recording": options.recording, "brightness": brightness, **figures}), flush=True)


if __name__ == "__main__":
    main()
