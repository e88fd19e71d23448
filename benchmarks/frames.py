"""Drawn frames for benchmarks: a background like a photo, and an object that changes a known share of its patches."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .shapes import Shape


@dataclass(frozen=True)
class Frame:
    """A frame and what is known about it.

    Attributes:
        image: PIL, RGB, at the source's size.
        changed: bool `[P]`, the patches that differ from the background.
        box: around them, xyxy in pixels at the model's geometry; None: nothing changed.
    """

    image: Image.Image
    changed: np.ndarray
    box: tuple[float, float, float, float] | None


def background_image(width: int, height: int, seed: int) -> Image.Image:
    """Something like a photo: smooth colours, edges and fine texture, all in middle greys (90-165)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = rng.uniform(0, width), rng.uniform(0, height)
        box = (left, top, left + rng.uniform(0.05, 0.3) * width, top + rng.uniform(0.05, 0.3) * height)
        draw.rectangle(box, outline=tuple(rng.integers(0, 256, 3).tolist()), width=max(1, height // 120))
    texture = rng.normal(0, 5, (height, width, 3))
    array = 90 + np.asarray(image) * (75 / 255) + texture
    return Image.fromarray(array.clip(90, 165).astype(np.uint8))


def draw_frame(background: Image.Image, shape: Shape, fresh_share: float, rng: np.random.Generator) -> Frame:
    """The background with one object that changes exactly `round(fresh_share * P)` patches at the model's geometry.

    The object is a rectangle whose last row may be shorter. It stays inside its patches by more than the reach of the
    resampling filter, and is darker or brighter than any background by 60 levels: no patch changes by accident and
    none is missed. Place, brightness and texture come from `rng`.
    """
    grid, patch, side = shape.grid, shape.vision["patch_size"], shape.vision["image_size"]
    count = round(fresh_share * grid * grid)
    changed: np.ndarray = np.zeros((grid, grid), dtype=bool)
    if not count:
        return Frame(background, changed.reshape(-1), None)
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    top, left = rng.integers(0, grid - rows + 1), rng.integers(0, grid - columns + 1)
    cells = np.arange(rows * columns).reshape(rows, columns) < count
    changed[top : top + rows, left : left + columns] = cells

    width, height = background.size
    scale = side / height  # the shortest edge becomes S, the middle is cut out
    x = ((np.arange(width) + 0.5) * scale - (width * scale - side) / 2) // patch
    y = ((np.arange(height) + 0.5) * scale) // patch
    inside = (x >= 0) & (x < grid)
    mask = changed[y.astype(int)][:, x.clip(0, grid - 1).astype(int)] & inside  # [height, width]
    # 3 pixels from every border: bicubic resampling to 0.7 reaches 2.9 source pixels from a pixel's centre.
    mask = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(7))) > 0
    darkest = rng.choice([0, 225])
    texture = darkest + rng.integers(0, 31, (height, width, 3))
    image = np.where(mask[..., None], texture, np.asarray(background)).astype(np.uint8)
    x0, y0 = float(left * patch + 3), float(top * patch + 3)
    x1, y1 = float((left + columns) * patch - 3), float((top + rows) * patch - 3)
    return Frame(Image.fromarray(image), changed.reshape(-1), (x0, y0, x1, y1))
