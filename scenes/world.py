"""Made scenes with shared backgrounds: the data on which the small Backdrop models learn and are measured.

Three families of fixed views are drawn on a 12 x 12 grid of 14-pixel patches (168 x 168 pixels):

* ``phone``: an alarm-clock screen. Wallpaper, card and label stay; the alarm time and its toggle change.
* ``street``: a fixed street camera. Sky, building, sign and road stay; up to three vehicles come and go.
* ``panel``: an instrument panel. Frame, names, gauge face and lamp sockets stay; the digits of the readout,
  the needle and the lit lamp change.

A scene is named by its family, a background seed and a frame seed. Scenes with the same family and background
seed are byte-identical outside their object boxes, so the background of one frame can be reused for the next.
Everything is a function of the seeds alone.

``backdrop scenes sheet --out sheet.png`` writes a contact sheet.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]
Split = Literal["train", "validation", "test"]

FAMILIES = ("phone", "street", "panel")
DETECTOR_CLASSES: tuple[str, ...] = (
    "time",
    "toggle",
    "car",
    "bus",
    "truck",
    "bike",
    "lamp",
    "readout",
    "needle",
)

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
GLYPHS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# fmt: off
THINGS = (
    "wallpaper", "card", "label",
    "day sky", "night sky", "road", "building", "sign",
    "frame", "face", "name", "unit", "gauge", "window", "socket",
    # From here on objects.
    "time", "toggle on", "toggle off", "car", "bus", "truck", "bike", "lamp", "readout",
    "needle low", "needle middle", "needle high",
)
# fmt: on
# Class 0 of every head is "none"; class i + 1 is the i-th entry of the list that the head names.
DENSE_LABELS: dict[str, int] = {
    "glyph": len(GLYPHS) + 1,
    "colour": len(COLOURS) + 1,
    "thing": len(THINGS) + 1,
    "anchor": 2,
    # Where a patch is, 1 to 12: a tower that does not keep it leaves the language model without left and right.
    "column": 13,
    "row": 13,
}

_COLOUR_NAMES = tuple(COLOURS)
_DESIGN_SIZE = 168  # every coordinate below is in pixels of a 168 x 168 drawing
_CELL = 14
_OVERSAMPLING = 4
_OBJECT_WEIGHT = 3
_SPLIT_STARTS = {"train": (0, 100_000), "validation": (100_000, 110_000), "test": (110_000, 120_000)}

# fmt: off
_LABEL_WORDS = (
    "WAKE", "GYM", "WORK", "BUS", "TEA", "RUN", "YOGA", "CLASS", "TRAIN", "SHIFT", "PILLS", "FEED", "BAKE",
    "CALL", "MEET", "NAP", "SWIM", "BIKE", "PARK", "LUNCH", "HOME", "DENT", "EXAM", "VISIT",
)
_PANEL_WORDS = (
    "PUMP", "FAN", "TANK", "LINE", "AXLE", "OVEN", "KILN", "MILL", "PRESS", "VALVE", "BOILER", "HOIST",
)
_UNITS = (
    "BAR", "RPM", "KPA", "VOLT", "AMP", "HZ", "DEG", "PSI",
)
# fmt: on
_PLATE_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # I, O and Q look like 1 and 0
_LAMP_COLOURS = ("red", "yellow", "green", "blue", "white")
_LANE_TOPS = (56, 112)
_VEHICLE_WIDTHS = {"car": 56, "bus": 84, "truck": 98, "bike": 42}
_VEHICLE_HEIGHT = 56
_NEEDLE_ANGLES = {"low": 150, "middle": 90, "high": 30}  # degrees, anticlockwise from the right

_QUESTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("phone", "time"): ("What time is the alarm set for?", "When does the alarm ring?"),
    ("phone", "toggle"): ("Is the alarm on or off?", "Is the toggle on or off?"),
    ("phone", "wallpaper"): ("What colour is the wallpaper?", "Which colour is behind the card?"),
    ("phone", "card"): ("What colour is the card?", "Which colour does the card have?"),
    ("phone", "label"): ("What does the label say?", "Which word is on the card?"),
    ("phone", "alarm"): ("Which alarm rings, and when?", "What is the label and the time of the alarm?"),
    ("street", "count"): ("How many vehicles are there?", "How many vehicles are on the road?"),
    ("street", "colour"): ("What colour is the {kind}?", "Which colour is the {kind}?"),
    ("street", "plate"): ("What is the plate of the {kind}?", "What is written on the {kind}?"),
    ("street", "presence"): ("Is there a {kind}?", "Is there a {kind} on the road?"),
    ("street", "side"): (
        "Is the {kind} left or right of the sign?",
        "On which side of the sign is the {kind}?",
    ),
    ("street", "sign"): ("What is written on the sign?", "What does the sign say?"),
    ("street", "place"): ("Which column is the {kind} in?", "In which column is the {kind}?"),
    ("street", "building"): ("What colour is the building?", "Which colour is the building?"),
    ("street", "sky"): ("Is it day or night?", "Is this by day or by night?"),
    ("panel", "readout"): ("What does the readout show?", "Which number is on the readout?"),
    ("panel", "lamp"): ("What colour is the lit lamp?", "Which colour is lit?"),
    ("panel", "needle"): ("Is the needle low, middle or high?", "Where does the needle stand?"),
    ("panel", "side"): (
        "Is the lit lamp left or right of the readout?",
        "On which side of the readout is the lit lamp?",
    ),
    ("panel", "place"): ("Which column is the {kind} in?", "In which column is the {kind}?"),
    ("panel", "zone"): ("What colour does the needle point at?", "Which zone is the needle in?"),
    ("panel", "reading"): ("What is the reading with its unit?", "Which value and unit are shown?"),
    ("panel", "name"): ("What is the panel called?", "What is the name of the panel?"),
    ("panel", "frame"): ("What colour is the frame?", "Which colour is the frame of the panel?"),
    ("panel", "unit"): ("What is the unit of the readout?", "Which unit is printed on the panel?"),
}
TOPICS = tuple(sorted({topic for _, topic in _QUESTIONS if topic != "place"}))


@dataclass(frozen=True)
class SceneObject:
    """One object: its detector class name and its tight box in pixels, half-open ``(x0, y0, x1, y1)``."""

    name: str
    xyxy: Box


@dataclass(frozen=True)
class Question:
    """A question with its short answer, what it asks for, and which part of the image holds the answer."""

    topic: str
    about: Literal["object", "background", "both"]
    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    ``image`` is RGB, S x S. ``labels`` maps each name in ``DENSE_LABELS`` to int64 ``[P]`` classes, patches in
    row-major order; class 0 is "none". ``places`` are questions for the number of a thing's column, 1 to 12 from the
    left: left and right are learned through them. ``frame_seed`` is None for frames of a camera clip, whose objects follow
    from the frame before.
    """

    family: str
    background_seed: int
    frame_seed: int | None
    image: Image.Image
    objects: tuple[SceneObject, ...]
    labels: dict[str, np.ndarray]
    questions: tuple[Question, ...]
    places: tuple[Question, ...] = ()


# What a background shows, drawn from its seed, and what a frame adds to it.


@dataclass(frozen=True)
class _PhoneLayout:
    wallpaper: str
    wallpaper_rgb: RGB
    pattern: str
    card: str
    card_rgb: RGB
    card_top: int
    label: str
    label_top: int
    time_xy: tuple[int, int]
    toggle_xy: tuple[int, int]


@dataclass(frozen=True)
class _PhoneFrame:
    minutes: int | None  # since midnight; None: no alarm, hence no toggle either
    enabled: bool


@dataclass(frozen=True)
class _StreetLayout:
    night: bool
    sky_rgb: RGB
    building: str
    building_rgb: RGB
    building_x: tuple[int, int]
    sign: str
    sign_rgb: RGB
    sign_x: int
    tree_xs: tuple[int, ...]
    skyline: tuple[int, ...]


@dataclass(frozen=True)
class _Vehicle:
    kind: str
    colour: str
    rgb: RGB
    lane: int  # 0: far, driving left; 1: near, driving right
    x: int
    plate: str


@dataclass(frozen=True)
class _StreetFrame:
    vehicles: tuple[_Vehicle, ...]


@dataclass(frozen=True)
class _PanelLayout:
    frame: str
    frame_rgb: RGB
    face_rgb: RGB
    name: str
    unit: str
    gauge_x: int
    window_x: int
    zones: tuple[str, str, str]
    lamp_xs: tuple[int, ...]
    lamp_y: int


@dataclass(frozen=True)
class _PanelFrame:
    value: int | None  # None: the readout is dark
    digit_rgb: RGB
    lamp: tuple[int, str] | None  # socket and colour
    needle: tuple[str, int] | None  # zone and degrees off its middle


_Layout = _PhoneLayout | _StreetLayout | _PanelLayout
_Frame = _PhoneFrame | _StreetFrame | _PanelFrame


def _rng(*key: str | int) -> random.Random:
    return random.Random(":".join(("backdrop-scenes", *map(str, key))))


def _shade(rgb: RGB, factor: float) -> RGB:
    """The colour mixed with white (factor > 1) or black (factor < 1)."""
    if factor <= 1:
        return tuple(round(c * factor) for c in rgb)
    return tuple(round(c + (255 - c) * (factor - 1)) for c in rgb)


def _jitter(rgb: RGB, rng: random.Random, spread: int = 9) -> RGB:
    """The colour a little lighter or darker; its hue hardly moves, so that its name stays right."""
    light = rng.randint(-spread, spread)
    return tuple(min(255, max(0, c + light + rng.randint(-3, 3))) for c in rgb)


def _word(words: Sequence[str], family: str, background_seed: int) -> str:
    """A word of the list, or, for half of all backgrounds, 3 to 5 random characters that nobody can know by heart."""
    rng = _rng("word", family, background_seed)
    if rng.random() < 0.5:
        return rng.choice(words)
    return "".join(rng.choice(GLYPHS) for _ in range(rng.randint(3, 5)))


def _ink_on(rgb: RGB) -> RGB:
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


class _Layer:
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
        self._draw.rounded_rectangle(self._corners(xyxy), radius * self._scale, fill=tuple(fill))

    def ellipse(self, xyxy: Sequence[float], fill: Sequence[int]) -> None:
        self._draw.ellipse(self._corners(xyxy), fill=tuple(fill))

    def pie(self, xyxy: Sequence[float], start: float, end: float, fill: Sequence[int]) -> None:
        """A slice of an ellipse; degrees run clockwise from the right, as in PIL."""
        self._draw.pieslice(self._corners(xyxy), start, end, fill=tuple(fill))

    def polygon(self, points: Sequence[tuple[float, float]], fill: Sequence[int]) -> None:
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
        image = self._large.reduce(_OVERSAMPLING)
        for mask, xy, fill in self._text:
            glyph = Image.new("RGBA", mask.size, fill)
            glyph.putalpha(mask)
            image.alpha_composite(glyph, xy)
        return image


class _ClassMaps:
    """One class per design pixel and head; later marks cover earlier ones."""

    def __init__(self, maps: dict[str, np.ndarray] | None = None) -> None:
        if maps is None:
            maps = {head: np.zeros((_DESIGN_SIZE, _DESIGN_SIZE), np.int64) for head in DENSE_LABELS}
        self._maps = maps

    def copy(self) -> _ClassMaps:
        return _ClassMaps({head: array.copy() for head, array in self._maps.items()})

    def mark(self, xyxy: Box, thing: str | None = None, colour: str | None = None) -> None:
        x0, y0, x1, y1 = xyxy
        if thing is not None:
            self._maps["thing"][y0:y1, x0:x1] = THINGS.index(thing) + 1
            self._maps["colour"][y0:y1, x0:x1] = 0
        if colour is not None:
            self._maps["colour"][y0:y1, x0:x1] = _COLOUR_NAMES.index(colour) + 1

    def mark_text(self, x: int, y: int, text: str, cell: tuple[int, int]) -> None:
        for i, character in enumerate(text):
            if character in GLYPHS:
                left = x + i * cell[0]
                self._maps["glyph"][y : y + cell[1], left : left + cell[0]] = GLYPHS.index(character) + 1

    def patches(self, objects: Sequence[SceneObject], size: int, patch_size: int) -> dict[str, np.ndarray]:
        """The commonest class but "none" of each patch where it fills a quarter of it, else "none": int64 [P].

        For the head "thing" an object counts `_OBJECT_WEIGHT` times its area.
        """
        step = patch_size * _DESIGN_SIZE // size
        side = _DESIGN_SIZE // step
        labels = {}
        for head, classes in DENSE_LABELS.items():
            pixels = self._maps[head].reshape(side, step, side, step).swapaxes(1, 2).reshape(side * side, -1)
            offsets = np.arange(side * side)[:, None] * classes
            counts = np.bincount((pixels + offsets).ravel(), minlength=side * side * classes)
            counts = counts.reshape(side * side, classes)
            if head == "thing":  # what a frame adds is seen before what it stands on
                counts[:, THINGS.index("time") + 1 :] *= _OBJECT_WEIGHT
            best = counts[:, 1:].argmax(axis=1) + 1
            enough = np.take_along_axis(counts, best[:, None], axis=1)[:, 0] * 4 >= step * step
            labels[head] = np.where(enough, best, 0)
        labels["row"], labels["column"] = (
            place.ravel() * 12 // side + 1 for place in np.indices((side, side))
        )
        for item in objects:
            x0, y0, x1, y1 = item.xyxy
            labels["anchor"][(y0 + y1) // 2 // patch_size * side + (x0 + x1) // 2 // patch_size] = 1
        return labels


# phone


def _phone_layout(rng: random.Random, background_seed: int) -> _PhoneLayout:
    wallpaper, card = rng.sample(_COLOUR_NAMES, 2)
    card_top = 14 * rng.randint(1, 3)
    tops = [card_top + offset for offset in rng.sample((0, 42, 84), 3)]
    return _PhoneLayout(
        wallpaper=wallpaper,
        wallpaper_rgb=_jitter(COLOURS[wallpaper], rng),
        pattern=rng.choice(("plain", "circles", "stripes")),
        card=card,
        card_rgb=_jitter(COLOURS[card], rng),
        card_top=card_top,
        label=_word(_LABEL_WORDS, "phone", background_seed),
        label_top=tops[0],
        time_xy=(14 * rng.randint(1, 2), tops[1]),
        toggle_xy=(14 * rng.randint(2, 7), tops[2]),
    )


def _paint_phone(layer: _Layer, maps: _ClassMaps, layout: _PhoneLayout) -> None:
    base = layout.wallpaper_rgb
    light = 1.18 if sum(base) < 600 else 0.93
    layer.rectangle((0, 0, 168, 168), base)
    if layout.pattern == "circles":
        for x, y, radius in ((22, 12, 26), (150, 30, 34), (10, 150, 40), (140, 164, 30)):
            layer.ellipse((x - radius, y - radius, x + radius, y + radius), _shade(base, light))
    elif layout.pattern == "stripes":
        for x in range(-168, 168, 28):
            layer.polygon([(x, 168), (x + 14, 168), (x + 182, 0), (x + 168, 0)], _shade(base, light))
    maps.mark((0, 0, 168, 168), thing="wallpaper", colour=layout.wallpaper)

    top, card = layout.card_top, layout.card_rgb
    layer.rectangle((14, top, 154, top + 112), card, radius=7)
    line = _shade(card, 0.8 if sum(card) > 250 else 1.25)
    for y in (top + 34, top + 76):
        layer.rectangle((22, y, 146, y + 2), line)
    maps.mark((14, top, 154, top + 112), thing="card", colour=layout.card)

    xy = (28, layout.label_top)
    layer.text(*xy, layout.label, (14, 28), 18, _ink_on(card))
    maps.mark((xy[0], xy[1], xy[0] + 14 * len(layout.label), xy[1] + 28), thing="label", colour=layout.card)
    maps.mark_text(*xy, layout.label, (14, 28))


def _time_text(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def _phone_frame(rng: random.Random, layout: _PhoneLayout) -> _PhoneFrame:
    minutes = rng.randrange(24 * 60) if rng.random() > 0.06 else None
    return _PhoneFrame(minutes=minutes, enabled=minutes is not None and rng.random() < 0.5)


def _phone_objects(scene: _Canvas, layout: _PhoneLayout, frame: _PhoneFrame) -> None:
    if frame.minutes is None:
        return
    text = _time_text(frame.minutes)
    x, y = layout.time_xy
    ink = _ink_on(layout.card_rgb)
    layer = scene.layer(126, 28)
    layer.text(0, 0, text[:2], (28, 28), 24, ink)
    layer.text(70, 0, text[3:], (28, 28), 24, ink)
    for top in (7, 17):
        layer.ellipse((61, top, 65, top + 4), ink)
    scene.add("time", layer, x, y, thing="time", colour=layout.card)
    scene.maps.mark_text(x, y, text[:2], (28, 28))
    scene.maps.mark_text(x + 70, y, text[3:], (28, 28))

    layer = scene.layer(42, 28)
    track = (40, 176, 84) if frame.enabled else (128, 128, 134)
    layer.rectangle((0, 2, 42, 26), (250, 250, 250), radius=12)
    layer.rectangle((2, 4, 40, 24), track, radius=10)
    knob = 21 if frame.enabled else 3
    layer.ellipse((knob, 5, knob + 18, 23), (250, 250, 250))
    state = "on" if frame.enabled else "off"
    scene.add("toggle", layer, *layout.toggle_xy, thing=f"toggle {state}")


def _phone_questions(ask: _Asker, layout: _PhoneLayout, frame: _PhoneFrame) -> None:
    time = "none" if frame.minutes is None else _time_text(frame.minutes)
    ask("time", "object", time)
    if frame.minutes is not None:
        ask("toggle", "object", "on" if frame.enabled else "off")
        ask("alarm", "both", f"{layout.label} {time}")
    ask("wallpaper", "background", layout.wallpaper)
    ask("card", "background", layout.card)
    ask("label", "background", layout.label)


# street


def _street_layout(rng: random.Random, background_seed: int) -> _StreetLayout:
    night = rng.random() < 0.35
    sign = str(rng.randint(10, 199))
    if rng.random() < 0.4:
        sign = rng.choice(_PLATE_LETTERS) + str(rng.randint(1, 99))
    sign_column = rng.randint(1, 8)
    building_columns = rng.randint(4, 6)
    if sign_column >= 6:
        left = rng.randint(0, sign_column - 1 - min(building_columns, sign_column - 1))
        right = min(left + building_columns, sign_column - 1)
    else:
        left = rng.randint(sign_column + 4, max(sign_column + 4, 12 - building_columns))
        right = min(left + building_columns, 12)
    taken = set(range(left, right)) | set(range(sign_column - 1, sign_column + 4))
    building = rng.choice(_COLOUR_NAMES)
    return _StreetLayout(
        night=night,
        sky_rgb=_jitter((32, 40, 78) if night else (158, 204, 238), rng),
        building=building,
        building_rgb=_jitter(COLOURS[building], rng),
        building_x=(14 * left, 14 * right),
        sign=sign,
        sign_rgb=_jitter(rng.choice(((250, 250, 246), (30, 78, 160), (24, 110, 60), (250, 212, 50))), rng, 5),
        sign_x=14 * sign_column,
        tree_xs=tuple(14 * c for c in range(12) if c not in taken and rng.random() < 0.5),
        skyline=tuple(rng.randint(24, 44) for _ in range(6)),
    )


def _paint_street(layer: _Layer, maps: _ClassMaps, layout: _StreetLayout) -> None:
    dim = 0.72 if layout.night else 1.0
    layer.rectangle((0, 0, 168, 56), layout.sky_rgb)
    maps.mark((0, 0, 168, 56), thing="night sky" if layout.night else "day sky")
    disc_x = 140 if layout.sign_x < 70 else 10
    layer.ellipse((disc_x, 3, disc_x + 11, 14), (244, 240, 210) if layout.night else (255, 222, 92))
    for i, top in enumerate(layout.skyline):
        layer.rectangle(
            (28 * i, top, 28 * i + 28, 56), _shade((134, 150, 170), dim * (0.92 + 0.05 * (i % 3)))
        )

    left, right = layout.building_x
    layer.rectangle((left, 3, right, 56), layout.building_rgb)
    layer.rectangle((left, 3, right, 6), _shade(layout.building_rgb, 0.75))
    glass = (252, 226, 130) if layout.night else (206, 226, 238)
    for x in range(left + 4, right - 6, 14):
        for y in (10, 24, 38):
            layer.rectangle((x - 1, y - 1, x + 7, y + 8), _shade(layout.building_rgb, 0.6))
            layer.rectangle((x, y, x + 6, y + 7), glass)
    maps.mark((left, 3, right, 56), thing="building", colour=layout.building)

    for x in layout.tree_xs:
        layer.rectangle((x + 6, 40, x + 9, 56), _shade((104, 74, 48), dim))
        layer.ellipse((x, 24, x + 14, 46), _shade((64, 128, 72), dim))

    layer.rectangle((0, 52, 168, 58), _shade((176, 172, 164), dim))
    layer.rectangle((0, 58, 168, 168), _shade((98, 100, 106), dim))
    for x in range(0, 168, 28):
        layer.rectangle((x + 6, 110, x + 22, 113), (236, 232, 214))
    layer.rectangle((0, 165, 168, 168), _shade((206, 202, 190), dim))
    maps.mark((0, 56, 168, 168), thing="road")

    x = layout.sign_x
    text_x = x + 14 * (3 - len(layout.sign))
    layer.rectangle((x + 20, 30, x + 23, 58), (92, 94, 100))
    layer.rectangle((x - 3, 1, x + 45, 31), (40, 42, 46), radius=3)
    layer.rectangle((x - 1, 3, x + 43, 29), layout.sign_rgb, radius=2)
    layer.text(text_x, 2, layout.sign, (14, 28), 19, _ink_on(layout.sign_rgb))
    maps.mark((x, 0, x + 42, 28), thing="sign")
    maps.mark_text(text_x, 0, layout.sign, (14, 28))


def _random_vehicle(rng: random.Random, lane: int) -> _Vehicle:
    kind = rng.choice(tuple(_VEHICLE_WIDTHS))
    colour = rng.choice(_COLOUR_NAMES)
    plate = ""
    if kind in ("bus", "truck") and rng.random() < 0.8:
        plate = rng.choice(_PLATE_LETTERS) + rng.choice("0123456789") + rng.choice(_PLATE_LETTERS)
    # Plates lie on the patch grid; vehicles without one also stop half a patch off it.
    step = 14 if plate else 7
    x = step * rng.randint(0, (_DESIGN_SIZE - _VEHICLE_WIDTHS[kind]) // step)
    return _Vehicle(kind, colour, _jitter(COLOURS[colour], rng), lane, x, plate)


def _is_free(vehicle: _Vehicle, others: Sequence[_Vehicle], gap: int = 14) -> bool:
    right = vehicle.x + _VEHICLE_WIDTHS[vehicle.kind]
    return all(
        o.lane != vehicle.lane or vehicle.x >= o.x + _VEHICLE_WIDTHS[o.kind] + gap or right + gap <= o.x
        for o in others
    )


def _street_frame(rng: random.Random, layout: _StreetLayout) -> _StreetFrame:
    count = rng.choices((0, 1, 2, 3), weights=(12, 33, 33, 22))[0]
    vehicles: list[_Vehicle] = []
    for _ in range(40):
        if len(vehicles) == count:
            break
        vehicle = _random_vehicle(rng, rng.randrange(len(_LANE_TOPS)))
        if _is_free(vehicle, vehicles):
            vehicles.append(vehicle)
    return _StreetFrame(tuple(sorted(vehicles, key=lambda v: (v.lane, v.x))))


def _paint_vehicle(layer: _Layer, vehicle: _Vehicle) -> None:
    """Draws the vehicle driving right on a layer of its width and 56 pixels high."""
    rgb, width = vehicle.rgb, _VEHICLE_WIDTHS[vehicle.kind]
    edge, glass = (18, 18, 22), (196, 222, 236)
    wheels: tuple[int, ...]
    if vehicle.kind == "bus":
        layer.rectangle((1, 3, width - 1, 48), edge, radius=5)
        layer.rectangle((2, 4, width - 2, 47), rgb, radius=4)
        for x in range(6, width - 14, 12):
            layer.rectangle((x, 6, x + 9, 14), glass, radius=1)
        layer.rectangle((width - 11, 6, width - 2, 24), glass, radius=2)
        wheels = (10, width - 24)
    elif vehicle.kind == "truck":
        layer.rectangle((1, 3, 68, 48), edge, radius=1)
        layer.rectangle((2, 4, 67, 47), rgb, radius=1)
        layer.rectangle((66, 38, width - 2, 47), (58, 58, 64))
        layer.polygon([(70, 47), (70, 14), (86, 14), (width - 2, 30), (width - 2, 47)], edge)
        layer.polygon([(71, 46), (71, 15), (85, 15), (width - 3, 31), (width - 3, 46)], rgb)
        layer.polygon([(75, 29), (75, 18), (84, 18), (92, 29)], glass)
        wheels = (8, 30, width - 22)
    elif vehicle.kind == "car":
        layer.polygon([(8, 31), (16, 15), (38, 15), (48, 31)], edge)
        layer.polygon([(10, 31), (17, 16), (37, 16), (46, 31)], rgb)
        layer.polygon([(14, 30), (19, 19), (26, 19), (26, 30)], glass)
        layer.polygon([(29, 30), (29, 19), (36, 19), (42, 30)], glass)
        layer.rectangle((1, 29, width - 1, 48), edge, radius=6)
        layer.rectangle((2, 30, width - 2, 47), rgb, radius=5)
        layer.rectangle((width - 7, 33, width - 2, 38), (255, 244, 190), radius=2)
        wheels = (6, width - 20)
    else:
        layer.polygon([(12, 34), (16, 14), (26, 14), (28, 34)], edge)
        layer.polygon([(13, 34), (17, 15), (25, 15), (27, 34)], rgb)
        layer.ellipse((15, 1, 27, 13), edge)
        layer.rectangle((19, 5, 27, 9), glass, radius=2)
        layer.polygon([(8, 42), (8, 31), (28, 29), (36, 34), (30, 46), (14, 46)], edge)
        layer.polygon([(9, 41), (9, 32), (28, 30), (34, 34), (29, 45), (15, 45)], rgb)
        layer.polygon([(24, 19), (34, 27), (33, 30), (22, 24)], edge)
        wheels = (0, 27)
    for x in wheels:
        layer.ellipse((x, 41, x + 14, 55), edge)
        layer.ellipse((x + 4, 45, x + 10, 51), (168, 170, 176))


def _street_objects(scene: _Canvas, layout: _StreetLayout, frame: _StreetFrame) -> None:
    for vehicle in frame.vehicles:
        width = _VEHICLE_WIDTHS[vehicle.kind]
        plate_x = {"bus": 28, "truck": 14}.get(vehicle.kind, 0)
        layer = scene.layer(width, _VEHICLE_HEIGHT)
        _paint_vehicle(layer, vehicle)
        if vehicle.plate:
            layer.rectangle((plate_x - 2, 16, plate_x + 44, 40), (18, 18, 22), radius=2)
            layer.rectangle((plate_x - 1, 17, plate_x + 43, 39), (252, 250, 240), radius=1)
        if vehicle.lane == 0:
            layer.flip()
            plate_x = width - plate_x - 42
        top = _LANE_TOPS[vehicle.lane]
        if vehicle.plate:
            layer.text(plate_x, 14, vehicle.plate, (14, 28), 18, (16, 16, 20))
        scene.add(vehicle.kind, layer, vehicle.x, top, thing=vehicle.kind, colour=vehicle.colour)
        scene.maps.mark_text(vehicle.x + plate_x, top + 14, vehicle.plate, (14, 28))


def _street_questions(ask: _Asker, layout: _StreetLayout, frame: _StreetFrame) -> None:
    ask("count", "object", str(len(frame.vehicles)))
    kinds = [v.kind for v in frame.vehicles]
    asked = ask.rng.choice(tuple(_VEHICLE_WIDTHS))
    ask("presence", "object", "yes" if asked in kinds else "no", kind=asked)
    for vehicle in frame.vehicles:
        if kinds.count(vehicle.kind) > 1:
            continue
        ask("colour", "object", vehicle.colour, kind=vehicle.kind)
        if vehicle.plate:
            ask("plate", "object", vehicle.plate, kind=vehicle.kind)
        offset = vehicle.x + _VEHICLE_WIDTHS[vehicle.kind] / 2 - (layout.sign_x + 21)
        if abs(offset) >= _CELL:
            ask("side", "both", "left" if offset < 0 else "right", kind=vehicle.kind)
    ask("sign", "background", layout.sign)
    ask("building", "background", layout.building)
    ask("sky", "background", "night" if layout.night else "day")
    for vehicle in frame.vehicles:
        if kinds.count(vehicle.kind) == 1:
            ask.place("object", vehicle.x + _VEHICLE_WIDTHS[vehicle.kind] / 2, vehicle.kind)
    ask.place("background", layout.sign_x + 21, "sign")


# panel


def _panel_layout(rng: random.Random, background_seed: int) -> _PanelLayout:
    frame = rng.choice(_COLOUR_NAMES)
    grey = rng.choice((76, 104, 196, 216))
    gauge_left = rng.random() < 0.5
    sockets = rng.randint(3, 5)
    first = rng.randint(0, 5 - sockets)
    return _PanelLayout(
        frame=frame,
        frame_rgb=_jitter(COLOURS[frame], rng),
        face_rgb=_jitter((grey, grey, grey + 6), rng, 6),
        name=f"{_word(_PANEL_WORDS, 'panel', background_seed)} {rng.randint(1, 9)}",
        unit=rng.choice(_UNITS),
        gauge_x=14 if gauge_left else 98,
        window_x=70 if gauge_left else 14,
        zones=tuple(rng.sample(("red", "orange", "yellow", "green", "blue", "purple"), 3)),
        lamp_xs=tuple(14 + 28 * i for i in range(first, first + sockets)),
        lamp_y=rng.choice((112, 126)),
    )


def _paint_panel(layer: _Layer, maps: _ClassMaps, layout: _PanelLayout) -> None:
    face = layout.face_rgb
    ink = _ink_on(face)
    layer.rectangle((0, 0, 168, 168), layout.frame_rgb)
    layer.rectangle((12, 12, 156, 156), _shade(face, 0.6), radius=4)
    layer.rectangle((14, 14, 154, 154), face, radius=3)
    for x in (4, 158):
        for y in (4, 158):
            layer.ellipse((x, y, x + 6, y + 6), (150, 152, 158))
    maps.mark((0, 0, 168, 168), thing="frame", colour=layout.frame)
    maps.mark((14, 14, 154, 154), thing="face")

    layer.text(28, 14, layout.name, (14, 28), 18, ink)
    maps.mark((28, 14, 28 + 14 * len(layout.name), 42), thing="name")
    maps.mark_text(28, 14, layout.name, (14, 28))

    x = layout.window_x
    layer.rectangle((x, 42, x + 84, 72), _shade(face, 0.55), radius=3)
    layer.rectangle((x + 1, 43, x + 83, 71), (16, 20, 22), radius=2)
    maps.mark((x, 42, x + 84, 70), thing="window")
    unit_x = x + 14
    layer.text(unit_x, 72, layout.unit, (14, 28), 17, ink)
    maps.mark((unit_x, 70, unit_x + 14 * len(layout.unit), 98), thing="unit")
    maps.mark_text(unit_x, 70, layout.unit, (14, 28))

    x = layout.gauge_x
    circle = (x + 1, 43, x + 55, 97)
    layer.ellipse((x, 42, x + 56, 98), (40, 42, 46))
    layer.ellipse(circle, (228, 228, 222))
    maps.mark((x, 42, x + 56, 98), thing="gauge")
    zone_boxes = ((x, 56, x + 14, 84), (x + 14, 42, x + 42, 56), (x + 42, 56, x + 56, 84))
    for i, (zone, box) in enumerate(zip(layout.zones, zone_boxes, strict=True)):
        layer.pie(circle, 180 + 60 * i, 240 + 60 * i, COLOURS[zone])
        maps.mark(box, thing="gauge", colour=zone)
    layer.ellipse((x + 11, 53, x + 45, 87), (228, 228, 222))
    layer.rectangle((x + 2, 71, x + 54, 74), (228, 228, 222))
    layer.ellipse((x + 24, 66, x + 32, 74), (30, 30, 34))

    y = layout.lamp_y
    for x in layout.lamp_xs:
        layer.ellipse((x + 3, y + 3, x + 25, y + 25), (34, 36, 40))
        layer.ellipse((x + 5, y + 5, x + 23, y + 23), (92, 94, 98))
        layer.ellipse((x + 9, y + 8, x + 15, y + 13), (128, 130, 134))
        maps.mark((x, y, x + 28, y + 28), thing="socket")


def _panel_frame(rng: random.Random, layout: _PanelLayout) -> _PanelFrame:
    if rng.random() < 0.06:
        return _PanelFrame(None, (0, 0, 0), None, None)
    return _PanelFrame(
        value=rng.choice((rng.randint(10, 99), rng.randint(100, 999), rng.randint(100, 999))),
        digit_rgb=rng.choice(((90, 240, 120), (255, 190, 70), (255, 96, 84), (120, 220, 255))),
        lamp=(rng.randrange(len(layout.lamp_xs)), rng.choice(_LAMP_COLOURS)) if rng.random() < 0.85 else None,
        needle=(rng.choice(tuple(_NEEDLE_ANGLES)), rng.randint(-14, 14)),
    )


def _panel_objects(scene: _Canvas, layout: _PanelLayout, frame: _PanelFrame) -> None:
    if frame.value is not None:
        layer = scene.layer(84, 28)
        text = f"{frame.value:>3d}"
        layer.text(0, 0, text, (28, 28), 22, frame.digit_rgb)
        scene.add("readout", layer, layout.window_x, 43, thing="readout")
        scene.maps.mark_text(layout.window_x, 42, text, (28, 28))
    if frame.needle is not None:
        zone, offset = frame.needle
        angle = np.deg2rad(_NEEDLE_ANGLES[zone] + offset)
        dx, dy = np.cos(angle), -np.sin(angle)
        layer = scene.layer(56, 56)
        tip, left, right = (
            (28 + 21 * dx, 28 + 21 * dy),
            (28 - 3 * dy, 28 + 3 * dx),
            (28 + 3 * dy, 28 - 3 * dx),
        )
        layer.polygon([tip, left, right], (196, 20, 30))
        layer.ellipse((23, 23, 33, 33), (30, 30, 34))
        scene.add("needle", layer, layout.gauge_x, 42, thing=f"needle {zone}")
    if frame.lamp is not None:
        socket, colour = frame.lamp
        rgb = COLOURS[colour]
        layer = scene.layer(28, 28)
        for radius, alpha in ((14, 60), (13, 110), (12, 255)):
            layer.ellipse((14 - radius, 14 - radius, 14 + radius, 14 + radius), (*rgb, alpha))
        layer.ellipse((8, 7, 15, 13), _shade(rgb, 1.65))
        scene.add("lamp", layer, layout.lamp_xs[socket], layout.lamp_y, thing="lamp", colour=colour)


def _panel_questions(ask: _Asker, layout: _PanelLayout, frame: _PanelFrame) -> None:
    ask("readout", "object", "none" if frame.value is None else str(frame.value))
    ask("lamp", "object", "none" if frame.lamp is None else frame.lamp[1])
    if frame.value is not None:
        ask("reading", "both", f"{frame.value} {layout.unit}")
    if frame.needle is not None:
        zone = frame.needle[0]
        ask("needle", "object", zone)
        ask("zone", "both", layout.zones[tuple(_NEEDLE_ANGLES).index(zone)])
    if frame.lamp is not None:
        offset = layout.lamp_xs[frame.lamp[0]] + 14 - (layout.window_x + 42)
        if abs(offset) >= _CELL:
            ask("side", "both", "left" if offset < 0 else "right")
    ask("name", "background", layout.name)
    ask("frame", "background", layout.frame)
    ask("unit", "background", layout.unit)
    if frame.lamp is not None:
        ask.place("object", layout.lamp_xs[frame.lamp[0]] + 14, "lit lamp")
    ask.place("background", layout.window_x + 42, "readout")


# Putting a scene together.


class _Canvas:
    """A copy of a background to which objects are added."""

    def __init__(self, image: Image.Image, maps: _ClassMaps, zoom: int) -> None:
        self.image = image.copy()
        self.maps = maps.copy()
        self.objects: list[SceneObject] = []
        self._zoom = zoom

    def layer(self, width: int, height: int) -> _Layer:
        return _Layer(width, height, self._zoom)

    def add(
        self,
        name: str,
        layer: _Layer,
        x: int,
        y: int,
        thing: str,
        colour: str | None = None,
    ) -> None:
        """Draws the layer at design pixel (x, y); its box is what the layer covers, so nothing else changes."""
        drawn = layer.flatten()
        x0, y0, x1, y1 = drawn.getchannel("A").getbbox()
        left, top = x * self._zoom, y * self._zoom
        self.image.alpha_composite(drawn, (left, top))
        box = (left + x0, top + y0, left + x1, top + y1)
        self.objects.append(SceneObject(name, box))
        first, last = (v // self._zoom for v in box[:2]), (-(-v // self._zoom) for v in box[2:])
        self.maps.mark((*first, *last), thing=thing, colour=colour)


class _Asker:
    """Collects questions, one wording of each picked at random."""

    def __init__(self, family: str, rng: random.Random) -> None:
        self.family = family
        self.rng = rng
        self.questions: list[Question] = []
        self.places: list[Question] = []

    def __call__(
        self, topic: str, about: Literal["object", "background", "both"], answer: str, **names: str
    ) -> None:
        wording = self.rng.choice(_QUESTIONS[self.family, topic]).format(**names)
        self.questions.append(Question(topic, about, wording, answer))

    def place(self, about: Literal["object", "background"], x: float, kind: str) -> None:
        """Asks for the column that design pixel `x` lies in."""
        wording = self.rng.choice(_QUESTIONS[self.family, "place"]).format(kind=kind)
        self.places.append(Question("place", about, wording, str(int(x) // _CELL + 1)))


_LAYOUTS = {"phone": _phone_layout, "street": _street_layout, "panel": _panel_layout}
_PAINTERS = {"phone": _paint_phone, "street": _paint_street, "panel": _paint_panel}
_FRAMES = {"phone": _phone_frame, "street": _street_frame, "panel": _panel_frame}
_OBJECTS = {"phone": _phone_objects, "street": _street_objects, "panel": _panel_objects}
_ASKERS = {"phone": _phone_questions, "street": _street_questions, "panel": _panel_questions}


@lru_cache(maxsize=64)
def _background(family: str, background_seed: int, zoom: int) -> tuple[_Layout, Image.Image, _ClassMaps]:
    layout = _LAYOUTS[family](_rng(family, background_seed), background_seed)
    layer, maps = _Layer(_DESIGN_SIZE, _DESIGN_SIZE, zoom), _ClassMaps()
    _PAINTERS[family](layer, maps, layout)
    return layout, layer.flatten(), maps


def _compose(
    family: str,
    background_seed: int,
    frame_seed: int | None,
    frame: _Frame,
    rng: random.Random,
    size: int,
    patch_size: int,
) -> Scene:
    zoom = size // _DESIGN_SIZE
    layout, image, maps = _background(family, background_seed, zoom)
    canvas = _Canvas(image, maps, zoom)
    _OBJECTS[family](canvas, layout, frame)
    ask = _Asker(family, rng)
    _ASKERS[family](ask, layout, frame)
    return Scene(
        family=family,
        background_seed=background_seed,
        frame_seed=frame_seed,
        image=canvas.image.convert("RGB"),
        objects=tuple(canvas.objects),
        labels=canvas.maps.patches(canvas.objects, size, patch_size),
        questions=tuple(ask.questions),
        places=tuple(ask.places),
    )


def render_scene(
    family: str, background_seed: int, frame_seed: int, size: int = 168, patch_size: int = 14
) -> Scene:
    """Draws the scene that the seeds name.

    `size` is the image side in pixels, a multiple of 168; `patch_size` must be that multiple of a divisor of 168
    (14 at 168 pixels, 28 or 14 at 336), so that patches fall on whole pixels of the drawing.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, not {family!r}")
    if size <= 0 or size % _DESIGN_SIZE:
        raise ValueError(f"size must be a positive multiple of {_DESIGN_SIZE}, not {size}")
    zoom = size // _DESIGN_SIZE
    if patch_size <= 0 or patch_size % zoom or size % patch_size:
        raise ValueError(f"patch_size must divide size {size} and be a multiple of {zoom}, not {patch_size}")
    layout, _, _ = _background(family, background_seed, zoom)
    rng = _rng(family, background_seed, frame_seed)
    return _compose(family, background_seed, frame_seed, _FRAMES[family](rng, layout), rng, size, patch_size)


def background_seeds(split: Split) -> range:
    """The background seeds of a split; the splits share none."""
    return range(*_SPLIT_STARTS[split])


def sample_scenes(split: Split, count: int, seed: int) -> Iterator[Scene]:
    """Yields `count` scenes, each of a random family, background of the split, and frame."""
    rng = _rng("sample", split, seed)
    seeds = background_seeds(split)
    for _ in range(count):
        yield render_scene(rng.choice(FAMILIES), rng.choice(seeds), rng.randrange(1 << 31))


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


def box_patches(
    boxes_xyxy: Sequence[Sequence[float]], size: int = 168, patch_size: int = 14, grow: int = 0
) -> np.ndarray:
    """Which patches the boxes touch: bool ``[P]``, row-major.

    `boxes_xyxy` are half-open boxes in pixels; `grow` widens every box by that many whole patches on each side.
    """
    side = size // patch_size
    mask = np.zeros((side, side), dtype=bool)
    for x0, y0, x1, y1 in boxes_xyxy:
        left, top = (max(0, int(v // patch_size) - grow) for v in (x0, y0))
        right, bottom = (max(0, int(-(-v // patch_size)) + grow) for v in (x1, y1))
        mask[top:bottom, left:right] = True
    return mask.ravel()


def camera_clip(family: str, background_seed: int, frames: int, seed: int) -> list[Scene]:
    """`frames` consecutive views of one background.

    Vehicles drive one patch a frame, readings drift, and alarm times, toggles and lamps change now and then.
    """
    rng = _rng("clip", family, background_seed, seed)
    layout, _, _ = _background(family, background_seed, 1)
    frame = _FRAMES[family](rng, layout)
    scenes = []
    for i in range(frames):
        if i:
            frame = _NEXT_FRAMES[family](rng, layout, frame)
        scenes.append(_compose(family, background_seed, None, frame, rng, _DESIGN_SIZE, _CELL))
    return scenes


def _next_phone_frame(rng: random.Random, layout: _PhoneLayout, frame: _PhoneFrame) -> _PhoneFrame:
    if frame.minutes is None:
        return _PhoneFrame(rng.randrange(24 * 60), False)
    enabled = frame.enabled != (rng.random() < 0.25)
    return _PhoneFrame((frame.minutes + rng.choice((0, 0, 1, 5))) % (24 * 60), enabled)


def _next_street_frame(rng: random.Random, layout: _StreetLayout, frame: _StreetFrame) -> _StreetFrame:
    moved = []
    for v in frame.vehicles:
        x = v.x + (-_CELL, _CELL)[v.lane]
        if 0 <= x <= _DESIGN_SIZE - _VEHICLE_WIDTHS[v.kind]:
            moved.append(_Vehicle(v.kind, v.colour, v.rgb, v.lane, x, v.plate))
    if len(moved) < 3 and rng.random() < 0.35:
        entering = _random_vehicle(rng, rng.randrange(len(_LANE_TOPS)))
        x = (_DESIGN_SIZE - _VEHICLE_WIDTHS[entering.kind], 0)[entering.lane]
        entering = _Vehicle(entering.kind, entering.colour, entering.rgb, entering.lane, x, entering.plate)
        if _is_free(entering, moved):
            moved.append(entering)
    return _StreetFrame(tuple(sorted(moved, key=lambda v: (v.lane, v.x))))


def _next_panel_frame(rng: random.Random, layout: _PanelLayout, frame: _PanelFrame) -> _PanelFrame:
    if frame.value is None or frame.needle is None:
        return _panel_frame(rng, layout)
    value = min(999, max(10, frame.value + rng.randint(-9, 12)))
    zone, offset = frame.needle
    offset += rng.randint(-6, 6)
    names = tuple(_NEEDLE_ANGLES)
    index = names.index(zone) + (offset < -14) - (offset > 14)
    zone = names[min(2, max(0, index))]
    lamp = _panel_frame(rng, layout).lamp if rng.random() < 0.3 else frame.lamp
    return _PanelFrame(value, frame.digit_rgb, lamp, (zone, min(14, max(-14, offset))))


_NEXT_FRAMES = {"phone": _next_phone_frame, "street": _next_street_frame, "panel": _next_panel_frame}


def contact_sheet(backgrounds: int = 2, frames: int = 4, seed: int = 0, zoom: int = 2) -> Image.Image:
    """Rows of frames, one row to a background, with object boxes and one question and answer over each tile."""
    caption, gap = 34, 8
    tile = _DESIGN_SIZE * zoom
    rows = [(family, seed + i) for family in FAMILIES for i in range(backgrounds)]
    sheet = Image.new(
        "RGB", (frames * (tile + gap) + gap, len(rows) * (tile + caption + gap) + gap), (250, 250, 250)
    )
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for row, (family, background_seed) in enumerate(rows):
        for column in range(frames):
            scene = render_scene(family, background_seed, column)
            x, y = gap + column * (tile + gap), gap + row * (tile + caption + gap)
            asked = scene.questions[(row * frames + column) % len(scene.questions)]
            draw.text(
                (x, y),
                f"{family}  background {background_seed}  frame {column}",
                fill=(90, 90, 90),
                font=font,
            )
            draw.text((x, y + 15), f"{asked.question} {asked.answer}", fill=(10, 10, 10), font=font)
            sheet.paste(scene.image.resize((tile, tile), Image.Resampling.NEAREST), (x, y + caption))
            for item in scene.objects:
                x0, y0, x1, y1 = (v * zoom for v in item.xyxy)
                box = (x + x0 - 1, y + caption + y0 - 1, x + x1, y + caption + y1)
                draw.rectangle(box, outline=(255, 0, 200), width=1)
    return sheet
