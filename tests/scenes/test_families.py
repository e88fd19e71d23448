"""Families of scenes: each says everything about itself, and another one is a class and a line."""

import hashlib
import subprocess
import sys

import pytest

from backdrop.scenes import families
from backdrop.scenes.rows import FAMILY_WEIGHTS
from backdrop.scenes.world import DETECTOR_CLASSES, FAMILIES, THINGS, TOPICS, render_scene, scene_family

# What someone writes who adds a family: a wall with a clock that shows the hour.
CLOCK = """
import hashlib
from backdrop.scenes import families
from backdrop.scenes.families.family import Family

class Clock(Family):
    name = "clock"
    detector_classes = ("hour",)
    background_things = ("wall",)
    object_things = ("hour",)
    wordings = {"hour": ("Which hour is it?",), "wall": ("What colour is the wall?",), "place": ("Where is the {kind}?",)}
    answered_by = {"hour": ("hour",)}

    def layout(self, rng, background_seed):
        return rng.choice(("red", "blue"))

    def paint(self, layer, maps, layout):
        layer.rectangle((0, 0, 168, 168), {"red": (206, 44, 42), "blue": (44, 100, 212)}[layout])
        maps.mark((0, 0, 168, 168), thing="wall", colour=layout)

    def frame(self, rng, layout):
        return rng.randrange(10)

    def next_frame(self, rng, layout, frame):
        return (frame + 1) % 10

    def draw_objects(self, canvas, layout, frame):
        layer = canvas.layer(28, 28)
        layer.text(0, 0, str(frame), (28, 28), 22, (250, 250, 250))
        canvas.add("hour", layer, 70, 70, thing="hour")
        canvas.maps.mark_text(70, 70, str(frame), (28, 28))

    def ask(self, ask, layout, frame):
        ask("hour", "object", str(frame))
        ask("wall", "background", layout)
        ask.place("object", 84, "hour")

families.ALL = (*families.ALL, Clock())  # the line in families/__init__.py

from backdrop.scenes.world import (
    DETECTOR_CLASSES, FAMILIES, THINGS, camera_clip, contact_sheet, render_scene, scene_family
)

assert FAMILIES[-1] == "clock" and DETECTOR_CLASSES[-1] == "hour" and {"wall", "hour"} < set(THINGS)
assert scene_family("clock").training_weight == 1
first, second = camera_clip("clock", 5, 2, seed=1)
assert [q.answer for q in first.questions] != [q.answer for q in second.questions]
(box,) = (item.xyxy for item in first.objects)
assert 70 <= box[0] < box[2] <= 98 and first.labels["thing"].max() == len(THINGS) - THINGS[::-1].index("hour")
assert first.places[0].answer == "7"
contact_sheet(1, 1)
print(hashlib.sha256(render_scene("panel", 3, 4).image.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("family", families.ALL, ids=FAMILIES)
def test_a_family_names_what_it_draws_and_asks(family):
    assert scene_family(family.name) is family
    assert set(family.detector_classes) <= set(DETECTOR_CLASSES)
    assert {*family.background_things, *family.object_things} <= set(THINGS)
    assert set(family.wordings) - {"place"} <= set(TOPICS)
    assert set(family.answered_by) < set(family.wordings)
    assert set(family.named_classes) <= set(family.detector_classes)
    for topic, classes in family.answered_by.items():
        assert set(classes) <= set(family.detector_classes)
        assert classes or any("{kind}" in wording for wording in family.wordings[topic])
    for frame in range(20):
        for question in render_scene(family.name, 2, frame).questions:
            # The exam asks about stale backgrounds where an object changed that an answer hangs on.
            assert (question.topic in family.answered_by) == (question.about != "background")


def test_streets_are_trained_on_most():
    assert FAMILY_WEIGHTS == {"phone": 3, "street": 5, "panel": 4}


def test_another_family_is_a_class_and_a_line():
    done = subprocess.run([sys.executable, "-c", CLOCK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = hashlib.sha256(render_scene("panel", 3, 4).image.tobytes()).hexdigest()
    assert done.stdout.split() == [ours]  # the other families draw what they drew
