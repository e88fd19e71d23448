"""Scenes as a fixed camera sends them: consecutive frames of one background, and what a sensor does to them."""

from io import BytesIO

import numpy as np
from PIL import Image

from .drawing import CELL, DESIGN_SIZE
from .render import Scene, compose_scene, draw_background, scene_family
from .seeds import seeded_random


def camera_clip(family: str, background_seed: int, frames: int, seed: int) -> list[Scene]:
    """`frames` consecutive views of one background.

    Vehicles drive one patch a frame, readings drift, and alarm times, toggles and lamps change now and then.
    """
    kind = scene_family(family)
    rng = seeded_random("clip", family, background_seed, seed)
    layout, _, _ = draw_background(family, background_seed, 1)
    frame = kind.frame(rng, layout)
    scenes = []
    for i in range(frames):
        if i:
            frame = kind.next_frame(rng, layout, frame)
        scenes.append(compose_scene(family, background_seed, None, frame, rng, DESIGN_SIZE, CELL))
    return scenes


def disturbed(
    image: Image.Image, seed: int, noise: float = 2.5, light: float = 2.0, jpeg_quality: int = 90
) -> Image.Image:
    """The image as a fixed camera would send it: light that drifts, sensor noise, JPEG.

    Args:
        noise: standard deviation of the sensor's noise, grey levels.
        light: the whole image is at most so many grey levels lighter or darker.
    """
    rng = np.random.default_rng(seed)
    pixels = np.asarray(image, np.float32) + rng.uniform(-light, light)
    pixels += noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    buffer = BytesIO()
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=jpeg_quality, subsampling=0
    )
    return Image.open(buffer).convert("RGB")
