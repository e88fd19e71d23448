"""Pictures for the tests of matching: textures, noise and JPEG artefacts."""

import io

import numpy as np
from PIL import Image


def texture(side: int, seed: int, levels=(40, 210)) -> np.ndarray:
    """A smooth random field with some fine detail, uint8 `[S, S, 3]`."""
    rng = np.random.default_rng(seed)
    small = rng.integers(*levels, (side // 14, side // 14, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)).astype(float)
    return np.clip(smooth + rng.normal(0, 6, (side, side, 1)), 0, 255).astype(np.uint8)


def photographed(image: np.ndarray, rng, sigma: float = 2.5, quality: int | None = 85) -> np.ndarray:
    """The image with Gaussian noise and, unless `quality` is None, JPEG artefacts."""
    noisy = Image.fromarray(np.clip(image + rng.normal(0, sigma, image.shape) + 0.5, 0, 255).astype(np.uint8))
    if quality is None:
        return np.asarray(noisy)
    file = io.BytesIO()
    noisy.save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def flat(side: int, colour) -> np.ndarray:
    """uint8 `[side, side, 3]` of one grey level or colour."""
    return np.full((side, side, 3), colour, dtype=np.uint8)
