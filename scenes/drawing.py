"""Anti-aliased shapes and condensed characters, drawn with PIL, and the colours that scenes are made of.

Coordinates are *design pixels*: pixels of a drawing of 168 x 168. A larger image is the same drawing, zoomed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]

DESIGN_SIZE = 168  # side of a drawing, design pixels
CELL = 14  # side of a patch, design pixels; characters and objects keep to this grid
_OVERSAMPLING = 4

COLOURS: dict[str, RGB] = {
    "red": (206, 44, 42),
    "orange": (240, 138, 26),
    "yellow": (246, 214, 54),
    "green": (46, 156, 70),
    "blue": (44, 100, 212),
    "purple": (132, 66, 180),
    "pink": (242, 150, 196),
    "brown": (122, 78, 44),
    "white": (242, 242, 240),
    "black": (34, 34, 38),
}
COLOUR_NAMES = tuple(COLOURS)


def shade(rgb: RGB, factor: float) -> RGB:
    """The colour mixed with white (factor > 1) or black (factor < 1)."""
    if factor <= 1:
        red, green, blue = (round(c * factor) for c in rgb)
    else:
        red, green, blue = (round(c + (255 - c) * (factor - 1)) for c in rgb)
    return red, green, blue


def jitter(rgb: RGB, rng: random.Random, spread: int = 9) -> RGB:
    """The colour a little lighter or darker; its hue hardly moves, so that its name stays right."""
    light = rng.randint(-spread, spread)
    red, green, blue = (min(255, max(0, c + light + rng.randint(-3, 3))) for c in rgb)
    return red, green, blue


def ink_on(rgb: RGB) -> RGB:
    """Near-black or near-white, whichever reads better on the colour."""
    luminance = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    return (22, 22, 26) if luminance > 135 else (250, 250, 250)


@lru_cache(maxsize=1024)
def _glyph_mask(character: str, max_width: int, ink_height: int) -> Image.Image:
    """One character as an "L" mask, `ink_height` high and condensed to at most `max_width`."""
    font = ImageFont.load_default(size=96)
    canvas = Image.new("L", (192, 192), 0)
    ImageDraw.Draw(canvas).text((40, 30), character, fill=255, font=font, stroke_width=4, stroke_fill=255)
    ink = canvas.crop(canvas.getbbox())
    width = min(max_width, max(1, round(ink.width * ink_height / ink.height)))
    return ink.resize((width, ink_height), Image.Resampling.LANCZOS)


class Layer:
    """An RGBA surface with anti-aliased shapes. Coordinates are design pixels from the layer's own corner."""

    def __init__(self, width: int, height: int, zoom: int) -> None:
        self._zoom = zoom
        self._scale = zoom * _OVERSAMPLING
        self._large = Image.new("RGBA", (width * self._scale, height * self._scale), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self._large)
        self._text: list[tuple[Image.Image, tuple[int, int], RGB]] = []

    def _corners(self, xyxy: Sequence[float]) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = (round(v * self._scale) for v in xyxy)
        return x0, y0, x1 - 1, y1 - 1

    def rectangle(self, xyxy: Sequence[float], fill: Sequence[int], radius: float = 0) -> None:
        """A filled rectangle; corners and radius of its rounding in design pixels."""
        self._draw.rounded_rectangle(self._corners(xyxy), radius * self._scale, fill=tuple(fill))

    def ellipse(self, xyxy: Sequence[float], fill: Sequence[int]) -> None:
        """A filled ellipse within the box, in design pixels."""
        self._draw.ellipse(self._corners(xyxy), fill=tuple(fill))

    def pie(self, xyxy: Sequence[float], start: float, end: float, fill: Sequence[int]) -> None:
        """A slice of an ellipse; degrees run clockwise from the right, as in PIL."""
        self._draw.pieslice(self._corners(xyxy), start, end, fill=tuple(fill))

    def polygon(self, points: Sequence[tuple[float, float]], fill: Sequence[int]) -> None:
        """A filled polygon; corners in design pixels."""
        self._draw.polygon(
            [(round(x * self._scale), round(y * self._scale)) for x, y in points], fill=tuple(fill)
        )

    def text(self, x: int, y: int, text: str, cell: tuple[int, int], ink_height: int, fill: RGB) -> None:
        """One character to a cell, left to right, each centred in its cell."""
        for i, character in enumerate(text):
            if character != " ":
                mask = _glyph_mask(character, (cell[0] - 2) * self._zoom, ink_height * self._zoom)
                left = (x + i * cell[0]) * self._zoom + (cell[0] * self._zoom - mask.width) // 2
                top = y * self._zoom + (cell[1] * self._zoom - mask.height) // 2
                self._text.append((mask, (left, top), fill))

    def flip(self) -> None:
        """Mirrors the shapes drawn so far, not the text."""
        self._large = self._large.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        self._draw = ImageDraw.Draw(self._large)

    def flatten(self) -> Image.Image:
        """The picture as RGBA: shapes reduced to their size, the text over them."""
        image = self._large.reduce(_OVERSAMPLING)
        for mask, xy, fill in self._text:
            glyph = Image.new("RGBA", mask.size, fill)
            glyph.putalpha(mask)
            image.alpha_composite(glyph, xy)
        return image
