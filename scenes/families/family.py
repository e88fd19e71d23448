"""What a scene family is: the base class of `phone`, `street` and `panel`."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from ..canvas import Canvas
from ..drawing import Layer
from ..labels import ClassMaps
from ..questions import Questioner

Layout = TypeVar("Layout")
Frame = TypeVar("Frame")


class Family(ABC, Generic[Layout, Frame]):
    """A kind of fixed view: how its backgrounds look, what frames add to them, and what can be asked.

    A *layout* is all that a background seed decides, a *frame* all that a frame adds; both are values (frozen
    dataclasses) that the family defines. What `paint` draws stays from frame to frame; everything else is an object that
    `draw_objects` adds with `Canvas.add`, so that nothing changes outside the objects' boxes.

    Methods that take an `rng` draw from it alone, always in the same order: a scene follows from its seeds.

    Attributes:
        name: names the family in `render_scene`, in reports and in the seeds.
        detector_classes: what its objects are called to the detector.
        background_things: names, for the dense labels, of what backgrounds show.
        object_things: the same of objects; an object may have several (`toggle on`, `toggle off`).
        wordings: topic -> ways to ask for it; `{kind}` stands for a detector class. Topic "place": for a column.
        answered_by: topic -> detector classes of the objects that the answer hangs on; an empty tuple: those of the
            class that the question names. Topics about the background alone are left out.
        named_classes: detector classes that questions name.
        training_weight: how often training rows show the family, relative to the others.
    """

    name: ClassVar[str]
    detector_classes: ClassVar[tuple[str, ...]]
    background_things: ClassVar[tuple[str, ...]]
    object_things: ClassVar[tuple[str, ...]]
    wordings: ClassVar[dict[str, tuple[str, ...]]]
    answered_by: ClassVar[dict[str, tuple[str, ...]]]
    named_classes: ClassVar[tuple[str, ...]] = ()
    training_weight: ClassVar[float] = 1.0

    @abstractmethod
    def layout(self, rng: random.Random, background_seed: int) -> Layout:
        """A background's layout."""

    @abstractmethod
    def paint(self, layer: Layer, maps: ClassMaps, layout: Layout) -> None:
        """Draws the background on a layer of `DESIGN_SIZE` x `DESIGN_SIZE` and marks what it shows."""

    @abstractmethod
    def frame(self, rng: random.Random, layout: Layout) -> Frame:
        """A frame at random; some frames should have no objects."""

    @abstractmethod
    def next_frame(self, rng: random.Random, layout: Layout, frame: Frame) -> Frame:
        """The frame that follows another one in a camera's clip."""

    @abstractmethod
    def draw_objects(self, canvas: Canvas, layout: Layout, frame: Frame) -> None:
        """Adds the frame's objects to the background."""

    @abstractmethod
    def ask(self, ask: Questioner, layout: Layout, frame: Frame) -> None:
        """Asks everything that can be asked about the frame on its background."""
