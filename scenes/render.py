"""From seeds to a scene: the background, the objects of a frame, the labels and the questions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from . import families
from .canvas import Canvas
from .drawing import DESIGN_SIZE, Layer
from .labels import ClassMaps, SceneObject, Things
from .questions import Question, Questioner
from .seeds import Split, background_seeds, seeded_random

_FAMILIES = {family.name: family for family in families.ALL}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
DETECTOR_CLASSES: tuple[str, ...] = tuple(name for family in families.ALL for name in family.detector_classes)
_THINGS = Things(
    background=tuple(thing for family in families.ALL for thing in family.background_things),
    objects=tuple(thing for family in families.ALL for thing in family.object_things),
)
THINGS: tuple[str, ...] = _THINGS.names
# Class 0 of every head is "none"; class i + 1 is the i-th entry of the list that the head names.
DENSE_LABELS: dict[str, int] = _THINGS.dense_labels()
TOPICS: tuple[str, ...] = tuple(
    sorted({topic for family in families.ALL for topic in family.wordings} - {"place"})
)


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        family, background_seed: what names its background.
        frame_seed: None for frames of a camera clip, whose objects follow from the frame before.
        image: RGB, S x S.
        objects: what the frame adds to the background.
        labels: for each name in ``DENSE_LABELS`` int64 ``[P]`` classes, patches in row-major order; class 0 is "none".
        questions: everything that is asked about the scene.
        places: questions for the number of a thing's column, 1 to 12 from the left: left and right are learned through
            them.
    """

    family: str
    background_seed: int
    frame_seed: int | None
    image: Image.Image
    objects: tuple[SceneObject, ...]
    labels: dict[str, np.ndarray]
    questions: tuple[Question, ...]
    places: tuple[Question, ...] = ()


def scene_family(name: str) -> families.Family:
    """The family of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, not {name!r}")
    return _FAMILIES[name]


@lru_cache(maxsize=64)
def draw_background(family: str, background_seed: int, zoom: int) -> tuple[Any, Image.Image, ClassMaps]:
    """Layout, RGBA image of `zoom` times `DESIGN_SIZE` pixels a side, and label maps; shared, not to be written to."""
    kind = scene_family(family)
    layout = kind.layout(seeded_random(family, background_seed), background_seed)
    layer, maps = Layer(DESIGN_SIZE, DESIGN_SIZE, zoom), ClassMaps(_THINGS)
    kind.paint(layer, maps, layout)
    return layout, layer.flatten(), maps


def compose_scene(
    family: str,
    background_seed: int,
    frame_seed: int | None,
    frame: Any,
    rng: random.Random,
    size: int,
    patch_size: int,
) -> Scene:
    """A frame on its background; wordings are drawn from `rng`."""
    zoom = size // DESIGN_SIZE
    kind = scene_family(family)
    layout, image, maps = draw_background(family, background_seed, zoom)
    canvas = Canvas(image, maps, zoom)
    kind.draw_objects(canvas, layout, frame)
    ask = Questioner(kind.wordings, rng)
    kind.ask(ask, layout, frame)
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

    Args:
        family: one of ``FAMILIES``.
        background_seed: what stays; see ``background_seeds`` for which of them belong to a split.
        frame_seed: what changes.
        size: image side in pixels, a multiple of 168.
        patch_size: pixels; that multiple of a divisor of 168 (14 at 168 pixels, 28 or 14 at 336), so that patches fall
            on whole pixels of the drawing.

    Raises:
        ValueError: no such family, or a size that is not as wanted.
    """
    kind = scene_family(family)
    if size <= 0 or size % DESIGN_SIZE:
        raise ValueError(f"size must be a positive multiple of {DESIGN_SIZE}, not {size}")
    zoom = size // DESIGN_SIZE
    if patch_size <= 0 or patch_size % zoom or size % patch_size:
        raise ValueError(f"patch_size must divide size {size} and be a multiple of {zoom}, not {patch_size}")
    layout, _, _ = draw_background(family, background_seed, zoom)
    rng = seeded_random(family, background_seed, frame_seed)
    frame = kind.frame(rng, layout)
    return compose_scene(family, background_seed, frame_seed, frame, rng, size, patch_size)


def sample_scenes(split: Split, count: int, seed: int) -> Iterator[Scene]:
    """Yields `count` scenes, each of a random family, background of the split, and frame."""
    rng = seeded_random("sample", split, seed)
    seeds = background_seeds(split)
    for _ in range(count):
        yield render_scene(rng.choice(FAMILIES), rng.choice(seeds), rng.randrange(1 << 31))
