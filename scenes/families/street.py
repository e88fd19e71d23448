"""A fixed street camera: sky, building, sign and road stay; up to three vehicles come and go."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..canvas import Canvas
from ..drawing import CELL, COLOUR_NAMES, COLOURS, DESIGN_SIZE, RGB, Layer, ink_on, jitter, shade
from ..labels import ClassMaps
from ..questions import Questioner
from .family import Family

_PLATE_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # I, O and Q look like 1 and 0
_LANE_TOPS = (56, 112)
_VEHICLE_WIDTHS = {"car": 56, "bus": 84, "truck": 98, "bike": 42}
_VEHICLE_HEIGHT = 56


@dataclass(frozen=True)
class StreetLayout:
    """What a background shows; x are design pixels."""

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
class Vehicle:
    """One vehicle; `x` is the left edge of its layer, design pixels; `plate` is empty where it has none."""

    kind: str
    colour: str
    rgb: RGB
    lane: int  # 0: far, driving left; 1: near, driving right
    x: int
    plate: str


@dataclass(frozen=True)
class StreetFrame:
    """What a frame adds: vehicles by lane, then by place."""

    vehicles: tuple[Vehicle, ...]


class Street(Family[StreetLayout, StreetFrame]):
    """A road of two lanes in front of a building and a sign."""

    name = "street"
    detector_classes = ("car", "bus", "truck", "bike")
    background_things = ("day sky", "night sky", "road", "building", "sign")
    object_things = ("car", "bus", "truck", "bike")
    named_classes = detector_classes
    wordings = {
        "count": ("How many vehicles are there?", "How many vehicles are on the road?"),
        "colour": ("What colour is the {kind}?", "Which colour is the {kind}?"),
        "plate": ("What is the plate of the {kind}?", "What is written on the {kind}?"),
        "presence": ("Is there a {kind}?", "Is there a {kind} on the road?"),
        "side": (
            "Is the {kind} left or right of the sign?",
            "On which side of the sign is the {kind}?",
        ),
        "sign": ("What is written on the sign?", "What does the sign say?"),
        "place": ("Which column is the {kind} in?", "In which column is the {kind}?"),
        "building": ("What colour is the building?", "Which colour is the building?"),
        "sky": ("Is it day or night?", "Is this by day or by night?"),
    }
    answered_by = {
        "count": ("car", "bus", "truck", "bike"),
        "colour": (),
        "plate": (),
        "presence": (),
        "side": (),
    }
    training_weight = 5

    def layout(self, rng: random.Random, background_seed: int) -> StreetLayout:
        """A street by day or night with a building, a sign, trees and a skyline."""
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
        building = rng.choice(COLOUR_NAMES)
        return StreetLayout(
            night=night,
            sky_rgb=jitter((32, 40, 78) if night else (158, 204, 238), rng),
            building=building,
            building_rgb=jitter(COLOURS[building], rng),
            building_x=(14 * left, 14 * right),
            sign=sign,
            sign_rgb=jitter(
                rng.choice(((250, 250, 246), (30, 78, 160), (24, 110, 60), (250, 212, 50))), rng, 5
            ),
            sign_x=14 * sign_column,
            tree_xs=tuple(14 * c for c in range(12) if c not in taken and rng.random() < 0.5),
            skyline=tuple(rng.randint(24, 44) for _ in range(6)),
        )

    def paint(self, layer: Layer, maps: ClassMaps, layout: StreetLayout) -> None:
        """Draws sky, skyline, building, trees, road and sign."""
        dim = 0.72 if layout.night else 1.0
        layer.rectangle((0, 0, 168, 56), layout.sky_rgb)
        maps.mark((0, 0, 168, 56), thing="night sky" if layout.night else "day sky")
        disc_x = 140 if layout.sign_x < 70 else 10
        layer.ellipse((disc_x, 3, disc_x + 11, 14), (244, 240, 210) if layout.night else (255, 222, 92))
        for i, top in enumerate(layout.skyline):
            layer.rectangle(
                (28 * i, top, 28 * i + 28, 56), shade((134, 150, 170), dim * (0.92 + 0.05 * (i % 3)))
            )

        left, right = layout.building_x
        layer.rectangle((left, 3, right, 56), layout.building_rgb)
        layer.rectangle((left, 3, right, 6), shade(layout.building_rgb, 0.75))
        glass = (252, 226, 130) if layout.night else (206, 226, 238)
        for x in range(left + 4, right - 6, 14):
            for y in (10, 24, 38):
                layer.rectangle((x - 1, y - 1, x + 7, y + 8), shade(layout.building_rgb, 0.6))
                layer.rectangle((x, y, x + 6, y + 7), glass)
        maps.mark((left, 3, right, 56), thing="building", colour=layout.building)

        for x in layout.tree_xs:
            layer.rectangle((x + 6, 40, x + 9, 56), shade((104, 74, 48), dim))
            layer.ellipse((x, 24, x + 14, 46), shade((64, 128, 72), dim))

        layer.rectangle((0, 52, 168, 58), shade((176, 172, 164), dim))
        layer.rectangle((0, 58, 168, 168), shade((98, 100, 106), dim))
        for x in range(0, 168, 28):
            layer.rectangle((x + 6, 110, x + 22, 113), (236, 232, 214))
        layer.rectangle((0, 165, 168, 168), shade((206, 202, 190), dim))
        maps.mark((0, 56, 168, 168), thing="road")

        x = layout.sign_x
        text_x = x + 14 * (3 - len(layout.sign))
        layer.rectangle((x + 20, 30, x + 23, 58), (92, 94, 100))
        layer.rectangle((x - 3, 1, x + 45, 31), (40, 42, 46), radius=3)
        layer.rectangle((x - 1, 3, x + 43, 29), layout.sign_rgb, radius=2)
        layer.text(text_x, 2, layout.sign, (14, 28), 19, ink_on(layout.sign_rgb))
        maps.mark((x, 0, x + 42, 28), thing="sign")
        maps.mark_text(text_x, 0, layout.sign, (14, 28))

    def frame(self, rng: random.Random, layout: StreetLayout) -> StreetFrame:
        """Up to three vehicles that do not overlap."""
        count = rng.choices((0, 1, 2, 3), weights=(12, 33, 33, 22))[0]
        vehicles: list[Vehicle] = []
        for _ in range(40):
            if len(vehicles) == count:
                break
            vehicle = _random_vehicle(rng, rng.randrange(len(_LANE_TOPS)))
            if _is_free(vehicle, vehicles):
                vehicles.append(vehicle)
        return StreetFrame(tuple(sorted(vehicles, key=lambda v: (v.lane, v.x))))

    def next_frame(self, rng: random.Random, layout: StreetLayout, frame: StreetFrame) -> StreetFrame:
        """Every vehicle one cell further along its lane; one may leave, one may come."""
        moved = []
        for v in frame.vehicles:
            x = v.x + (-CELL, CELL)[v.lane]
            if 0 <= x <= DESIGN_SIZE - _VEHICLE_WIDTHS[v.kind]:
                moved.append(Vehicle(v.kind, v.colour, v.rgb, v.lane, x, v.plate))
        if len(moved) < 3 and rng.random() < 0.35:
            entering = _random_vehicle(rng, rng.randrange(len(_LANE_TOPS)))
            x = (DESIGN_SIZE - _VEHICLE_WIDTHS[entering.kind], 0)[entering.lane]
            entering = Vehicle(entering.kind, entering.colour, entering.rgb, entering.lane, x, entering.plate)
            if _is_free(entering, moved):
                moved.append(entering)
        return StreetFrame(tuple(sorted(moved, key=lambda v: (v.lane, v.x))))

    def draw_objects(self, canvas: Canvas, layout: StreetLayout, frame: StreetFrame) -> None:
        """Adds the vehicles."""
        for vehicle in frame.vehicles:
            width = _VEHICLE_WIDTHS[vehicle.kind]
            plate_x = {"bus": 28, "truck": 14}.get(vehicle.kind, 0)
            layer = canvas.layer(width, _VEHICLE_HEIGHT)
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
            canvas.add(vehicle.kind, layer, vehicle.x, top, thing=vehicle.kind, colour=vehicle.colour)
            canvas.maps.mark_text(vehicle.x + plate_x, top + 14, vehicle.plate, (14, 28))

    def ask(self, ask: Questioner, layout: StreetLayout, frame: StreetFrame) -> None:
        """Asks for the vehicles, their colours, plates and places, and for what the street shows."""
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
            if abs(offset) >= CELL:
                ask("side", "both", "left" if offset < 0 else "right", kind=vehicle.kind)
        ask("sign", "background", layout.sign)
        ask("building", "background", layout.building)
        ask("sky", "background", "night" if layout.night else "day")
        for vehicle in frame.vehicles:
            if kinds.count(vehicle.kind) == 1:
                ask.place("object", vehicle.x + _VEHICLE_WIDTHS[vehicle.kind] / 2, vehicle.kind)
        ask.place("background", layout.sign_x + 21, "sign")


def _random_vehicle(rng: random.Random, lane: int) -> Vehicle:
    kind = rng.choice(tuple(_VEHICLE_WIDTHS))
    colour = rng.choice(COLOUR_NAMES)
    plate = ""
    if kind in ("bus", "truck") and rng.random() < 0.8:
        plate = rng.choice(_PLATE_LETTERS) + rng.choice("0123456789") + rng.choice(_PLATE_LETTERS)
    # Plates lie on the patch grid; vehicles without one also stop half a patch off it.
    step = 14 if plate else 7
    x = step * rng.randint(0, (DESIGN_SIZE - _VEHICLE_WIDTHS[kind]) // step)
    return Vehicle(kind, colour, jitter(COLOURS[colour], rng), lane, x, plate)


def _is_free(vehicle: Vehicle, others: Sequence[Vehicle], gap: int = 14) -> bool:
    right = vehicle.x + _VEHICLE_WIDTHS[vehicle.kind]
    return all(
        o.lane != vehicle.lane or vehicle.x >= o.x + _VEHICLE_WIDTHS[o.kind] + gap or right + gap <= o.x
        for o in others
    )


def _paint_vehicle(layer: Layer, vehicle: Vehicle) -> None:
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
