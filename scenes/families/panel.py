"""An instrument panel: frame, names, gauge face and lamp sockets stay; readout, needle and lit lamp change."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from ..canvas import Canvas
from ..drawing import CELL, COLOUR_NAMES, COLOURS, RGB, Layer, ink_on, jitter, shade
from ..labels import ClassMaps
from ..questions import Questioner, background_word
from .family import Family

# fmt: off
WORDS = (
    "PUMP", "FAN", "TANK", "LINE", "AXLE", "OVEN", "KILN", "MILL", "PRESS", "VALVE", "BOILER", "HOIST",
)
# fmt: on
_UNITS = ("BAR", "RPM", "KPA", "VOLT", "AMP", "HZ", "DEG", "PSI")
_LAMP_COLOURS = ("red", "yellow", "green", "blue", "white")
_NEEDLE_ANGLES = {"low": 150, "middle": 90, "high": 30}  # degrees, anticlockwise from the right


@dataclass(frozen=True)
class PanelLayout:
    """What a background shows; x and y are design pixels, xs the left edges of lamp sockets."""

    frame: str
    frame_rgb: RGB
    face_rgb: RGB
    name: str
    unit: str
    gauge_x: int
    window_x: int
    zones: tuple[str, ...]  # three, from low to high
    lamp_xs: tuple[int, ...]
    lamp_y: int


@dataclass(frozen=True)
class PanelFrame:
    """What a frame adds."""

    value: int | None  # None: the readout is dark
    digit_rgb: RGB
    lamp: tuple[int, str] | None  # socket and colour
    needle: tuple[str, int] | None  # zone and degrees off its middle


class Panel(Family[PanelLayout, PanelFrame]):
    """An instrument panel with a gauge, a readout and a row of lamps, one of which may be lit."""

    name = "panel"
    detector_classes = ("lamp", "readout", "needle")
    background_things = ("frame", "face", "name", "unit", "gauge", "window", "socket")
    object_things = ("lamp", "readout", "needle low", "needle middle", "needle high")
    wordings = {
        "readout": ("What does the readout show?", "Which number is on the readout?"),
        "lamp": ("What colour is the lit lamp?", "Which colour is lit?"),
        "needle": ("Is the needle low, middle or high?", "Where does the needle stand?"),
        "side": (
            "Is the lit lamp left or right of the readout?",
            "On which side of the readout is the lit lamp?",
        ),
        "place": ("Which column is the {kind} in?", "In which column is the {kind}?"),
        "zone": ("What colour does the needle point at?", "Which zone is the needle in?"),
        "reading": ("What is the reading with its unit?", "Which value and unit are shown?"),
        "name": ("What is the panel called?", "What is the name of the panel?"),
        "frame": ("What colour is the frame?", "Which colour is the frame of the panel?"),
        "unit": ("What is the unit of the readout?", "Which unit is printed on the panel?"),
    }
    answered_by = {
        "readout": ("readout",),
        "reading": ("readout",),
        "lamp": ("lamp",),
        "side": ("lamp",),
        "needle": ("needle",),
        "zone": ("needle",),
    }
    training_weight = 4

    def layout(self, rng: random.Random, background_seed: int) -> PanelLayout:
        """A panel with 3 to 5 lamp sockets, and the gauge on either side."""
        frame = rng.choice(COLOUR_NAMES)
        grey = rng.choice((76, 104, 196, 216))
        gauge_left = rng.random() < 0.5
        sockets = rng.randint(3, 5)
        first = rng.randint(0, 5 - sockets)
        return PanelLayout(
            frame=frame,
            frame_rgb=jitter(COLOURS[frame], rng),
            face_rgb=jitter((grey, grey, grey + 6), rng, 6),
            name=f"{background_word(WORDS, self.name, background_seed)} {rng.randint(1, 9)}",
            unit=rng.choice(_UNITS),
            gauge_x=14 if gauge_left else 98,
            window_x=70 if gauge_left else 14,
            zones=tuple(rng.sample(("red", "orange", "yellow", "green", "blue", "purple"), 3)),
            lamp_xs=tuple(14 + 28 * i for i in range(first, first + sockets)),
            lamp_y=rng.choice((112, 126)),
        )

    def paint(self, layer: Layer, maps: ClassMaps, layout: PanelLayout) -> None:
        """Draws frame, face, name, gauge, window and sockets."""
        face = layout.face_rgb
        ink = ink_on(face)
        layer.rectangle((0, 0, 168, 168), layout.frame_rgb)
        layer.rectangle((12, 12, 156, 156), shade(face, 0.6), radius=4)
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
        layer.rectangle((x, 42, x + 84, 72), shade(face, 0.55), radius=3)
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

    def frame(self, rng: random.Random, layout: PanelLayout) -> PanelFrame:
        """A reading, a needle and perhaps a lit lamp; nothing at all in 6% of frames."""
        if rng.random() < 0.06:
            return PanelFrame(None, (0, 0, 0), None, None)
        return PanelFrame(
            value=rng.choice((rng.randint(10, 99), rng.randint(100, 999), rng.randint(100, 999))),
            digit_rgb=rng.choice(((90, 240, 120), (255, 190, 70), (255, 96, 84), (120, 220, 255))),
            lamp=(rng.randrange(len(layout.lamp_xs)), rng.choice(_LAMP_COLOURS))
            if rng.random() < 0.85
            else None,
            needle=(rng.choice(tuple(_NEEDLE_ANGLES)), rng.randint(-14, 14)),
        )

    def next_frame(self, rng: random.Random, layout: PanelLayout, frame: PanelFrame) -> PanelFrame:
        """The reading and the needle moved a little."""
        if frame.value is None or frame.needle is None:
            return self.frame(rng, layout)
        value = min(999, max(10, frame.value + rng.randint(-9, 12)))
        zone, offset = frame.needle
        offset += rng.randint(-6, 6)
        names = tuple(_NEEDLE_ANGLES)
        index = names.index(zone) + (offset < -14) - (offset > 14)
        zone = names[min(2, max(0, index))]
        lamp = self.frame(rng, layout).lamp if rng.random() < 0.3 else frame.lamp
        return PanelFrame(value, frame.digit_rgb, lamp, (zone, min(14, max(-14, offset))))

    def draw_objects(self, canvas: Canvas, layout: PanelLayout, frame: PanelFrame) -> None:
        """Adds the readout's digits, the lit lamp and the needle."""
        if frame.value is not None:
            layer = canvas.layer(84, 28)
            text = f"{frame.value:>3d}"
            layer.text(0, 0, text, (28, 28), 22, frame.digit_rgb)
            canvas.add("readout", layer, layout.window_x, 43, thing="readout")
            canvas.maps.mark_text(layout.window_x, 42, text, (28, 28))
        if frame.needle is not None:
            zone, offset = frame.needle
            angle = np.deg2rad(_NEEDLE_ANGLES[zone] + offset)
            dx, dy = np.cos(angle), -np.sin(angle)
            layer = canvas.layer(56, 56)
            tip, left, right = (
                (28 + 21 * dx, 28 + 21 * dy),
                (28 - 3 * dy, 28 + 3 * dx),
                (28 + 3 * dy, 28 - 3 * dx),
            )
            layer.polygon([tip, left, right], (196, 20, 30))
            layer.ellipse((23, 23, 33, 33), (30, 30, 34))
            canvas.add("needle", layer, layout.gauge_x, 42, thing=f"needle {zone}")
        if frame.lamp is not None:
            socket, colour = frame.lamp
            rgb = COLOURS[colour]
            layer = canvas.layer(28, 28)
            for radius, alpha in ((14, 60), (13, 110), (12, 255)):
                layer.ellipse((14 - radius, 14 - radius, 14 + radius, 14 + radius), (*rgb, alpha))
            layer.ellipse((8, 7, 15, 13), shade(rgb, 1.65))
            canvas.add("lamp", layer, layout.lamp_xs[socket], layout.lamp_y, thing="lamp", colour=colour)

    def ask(self, ask: Questioner, layout: PanelLayout, frame: PanelFrame) -> None:
        """Asks for readout, lamp, needle and their places, and for what the panel shows."""
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
            if abs(offset) >= CELL:
                ask("side", "both", "left" if offset < 0 else "right")
        ask("name", "background", layout.name)
        ask("frame", "background", layout.frame)
        ask("unit", "background", layout.unit)
        if frame.lamp is not None:
            ask.place("object", layout.lamp_xs[frame.lamp[0]] + 14, "lit lamp")
        ask.place("background", layout.window_x + 42, "readout")
