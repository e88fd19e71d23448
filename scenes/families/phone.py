"""An alarm-clock screen: wallpaper, card and label stay; the alarm time and its toggle change."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..canvas import Canvas
from ..drawing import COLOUR_NAMES, COLOURS, RGB, Layer, ink_on, jitter, shade
from ..labels import ClassMaps
from ..questions import Questioner, background_word
from .family import Family

# fmt: off
WORDS = (
    "WAKE", "GYM", "WORK", "BUS", "TEA", "RUN", "YOGA", "CLASS", "TRAIN", "SHIFT", "PILLS", "FEED", "BAKE",
    "CALL", "MEET", "NAP", "SWIM", "BIKE", "PARK", "LUNCH", "HOME", "DENT", "EXAM", "VISIT",
)
# fmt: on


@dataclass(frozen=True)
class PhoneLayout:
    """What a background shows; positions are design pixels."""

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
class PhoneFrame:
    """What a frame adds."""

    minutes: int | None  # since midnight; None: no alarm, hence no toggle either
    enabled: bool


class Phone(Family[PhoneLayout, PhoneFrame]):
    """One alarm on a card: its label, its time and its toggle."""

    name = "phone"
    detector_classes = ("time", "toggle")
    background_things = ("wallpaper", "card", "label")
    object_things = ("time", "toggle on", "toggle off")
    wordings = {
        "time": ("What time is the alarm set for?", "When does the alarm ring?"),
        "toggle": ("Is the alarm on or off?", "Is the toggle on or off?"),
        "wallpaper": ("What colour is the wallpaper?", "Which colour is behind the card?"),
        "card": ("What colour is the card?", "Which colour does the card have?"),
        "label": ("What does the label say?", "Which word is on the card?"),
        "alarm": ("Which alarm rings, and when?", "What is the label and the time of the alarm?"),
    }
    answered_by = {
        "time": ("time",),
        "toggle": ("toggle",),
        "alarm": ("time",),
    }
    training_weight = 3

    def layout(self, rng: random.Random, background_seed: int) -> PhoneLayout:
        """A wallpaper and a card with an alarm on it."""
        wallpaper, card = rng.sample(COLOUR_NAMES, 2)
        card_top = 14 * rng.randint(1, 3)
        tops = [card_top + offset for offset in rng.sample((0, 42, 84), 3)]
        return PhoneLayout(
            wallpaper=wallpaper,
            wallpaper_rgb=jitter(COLOURS[wallpaper], rng),
            pattern=rng.choice(("plain", "circles", "stripes")),
            card=card,
            card_rgb=jitter(COLOURS[card], rng),
            card_top=card_top,
            label=background_word(WORDS, self.name, background_seed),
            label_top=tops[0],
            time_xy=(14 * rng.randint(1, 2), tops[1]),
            toggle_xy=(14 * rng.randint(2, 7), tops[2]),
        )

    def paint(self, layer: Layer, maps: ClassMaps, layout: PhoneLayout) -> None:
        """Draws the wallpaper, the card and its labels."""
        base = layout.wallpaper_rgb
        light = 1.18 if sum(base) < 600 else 0.93
        layer.rectangle((0, 0, 168, 168), base)
        if layout.pattern == "circles":
            for x, y, radius in ((22, 12, 26), (150, 30, 34), (10, 150, 40), (140, 164, 30)):
                layer.ellipse((x - radius, y - radius, x + radius, y + radius), shade(base, light))
        elif layout.pattern == "stripes":
            for x in range(-168, 168, 28):
                layer.polygon([(x, 168), (x + 14, 168), (x + 182, 0), (x + 168, 0)], shade(base, light))
        maps.mark((0, 0, 168, 168), thing="wallpaper", colour=layout.wallpaper)

        top, card = layout.card_top, layout.card_rgb
        layer.rectangle((14, top, 154, top + 112), card, radius=7)
        line = shade(card, 0.8 if sum(card) > 250 else 1.25)
        for y in (top + 34, top + 76):
            layer.rectangle((22, y, 146, y + 2), line)
        maps.mark((14, top, 154, top + 112), thing="card", colour=layout.card)

        xy = (28, layout.label_top)
        layer.text(*xy, layout.label, (14, 28), 18, ink_on(card))
        maps.mark(
            (xy[0], xy[1], xy[0] + 14 * len(layout.label), xy[1] + 28), thing="label", colour=layout.card
        )
        maps.mark_text(*xy, layout.label, (14, 28))

    def frame(self, rng: random.Random, layout: PhoneLayout) -> PhoneFrame:
        """A time, switched on or off; no alarm in 6% of frames."""
        minutes = rng.randrange(24 * 60) if rng.random() > 0.06 else None
        return PhoneFrame(minutes=minutes, enabled=minutes is not None and rng.random() < 0.5)

    def next_frame(self, rng: random.Random, layout: PhoneLayout, frame: PhoneFrame) -> PhoneFrame:
        """The time moved by a few minutes at most, perhaps switched."""
        if frame.minutes is None:
            return PhoneFrame(rng.randrange(24 * 60), False)
        enabled = frame.enabled != (rng.random() < 0.25)
        return PhoneFrame((frame.minutes + rng.choice((0, 0, 1, 5))) % (24 * 60), enabled)

    def draw_objects(self, canvas: Canvas, layout: PhoneLayout, frame: PhoneFrame) -> None:
        """Adds the time and the switch."""
        if frame.minutes is None:
            return
        text = _time_text(frame.minutes)
        x, y = layout.time_xy
        ink = ink_on(layout.card_rgb)
        layer = canvas.layer(126, 28)
        layer.text(0, 0, text[:2], (28, 28), 24, ink)
        layer.text(70, 0, text[3:], (28, 28), 24, ink)
        for top in (7, 17):
            layer.ellipse((61, top, 65, top + 4), ink)
        canvas.add("time", layer, x, y, thing="time", colour=layout.card)
        canvas.maps.mark_text(x, y, text[:2], (28, 28))
        canvas.maps.mark_text(x + 70, y, text[3:], (28, 28))

        layer = canvas.layer(42, 28)
        track = (40, 176, 84) if frame.enabled else (128, 128, 134)
        layer.rectangle((0, 2, 42, 26), (250, 250, 250), radius=12)
        layer.rectangle((2, 4, 40, 24), track, radius=10)
        knob = 21 if frame.enabled else 3
        layer.ellipse((knob, 5, knob + 18, 23), (250, 250, 250))
        state = "on" if frame.enabled else "off"
        canvas.add("toggle", layer, *layout.toggle_xy, thing=f"toggle {state}")

    def ask(self, ask: Questioner, layout: PhoneLayout, frame: PhoneFrame) -> None:
        """Asks for the time and the switch, and for what the phone shows."""
        time = "none" if frame.minutes is None else _time_text(frame.minutes)
        ask("time", "object", time)
        if frame.minutes is not None:
            ask("toggle", "object", "on" if frame.enabled else "off")
            ask("alarm", "both", f"{layout.label} {time}")
        ask("wallpaper", "background", layout.wallpaper)
        ask("card", "background", layout.card)
        ask("label", "background", layout.label)


def _time_text(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"
