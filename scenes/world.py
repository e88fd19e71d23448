"""Made scenes with shared backgrounds: the data on which the small Backdrop models learn and are measured.

Three families of fixed views are drawn on a 12 x 12 grid of 14-pixel patches (168 x 168 pixels):

* ``phone``: an alarm-clock screen. Wallpaper, card and label stay; the alarm time and its toggle change.
* ``street``: a fixed street camera. Sky, building, sign and road stay; up to three vehicles come and go.
* ``panel``: an instrument panel. Frame, names, gauge face and lamp sockets stay; the digits of the readout,
  the needle and the lit lamp change.

A scene is named by its family, a background seed and a frame seed. Scenes with the same family and background
seed are byte-identical outside their object boxes, so the background of one frame can be reused for the next.
Everything is a function of the seeds alone.

This file is the door to the made world; what stands behind it has a file for each concept: `drawing`, `labels`,
`questions`, `canvas`, `render`, `camera`, `sheet`, `seeds` and `families`. A new family is one file in `families/` (see
`families/family.py`) and one line in `families/__init__.py`.

``backdrop scenes sheet --out sheet.png`` writes a contact sheet.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from .camera import camera_clip, disturbed
from .drawing import COLOURS
from .labels import GLYPHS, SceneObject, box_patches
from .questions import Question
from .render import (
    DENSE_LABELS,
    DETECTOR_CLASSES,
    FAMILIES,
    THINGS,
    TOPICS,
    Scene,
    render_scene,
    sample_scenes,
    scene_family,
)
from .seeds import Split, background_seeds
from .sheet import contact_sheet

__all__ = [
    "COLOURS",
    "DENSE_LABELS",
    "DETECTOR_CLASSES",
    "FAMILIES",
    "GLYPHS",
    "THINGS",
    "TOPICS",
    "Question",
    "Scene",
    "SceneObject",
    "Split",
    "background_seeds",
    "box_patches",
    "camera_clip",
    "contact_sheet",
    "disturbed",
    "drawing_digest",
    "render_scene",
    "sample_scenes",
    "scene_family",
]

_FILES_THAT_DRAW = ("camera", "canvas", "drawing", "labels", "questions", "render", "seeds", "families/*")


def drawing_digest() -> str:
    """Names the code that draws: 12 hex digits over its source. Scenes that are kept in files are drawn anew with another."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for pattern in _FILES_THAT_DRAW:
        for path in sorted(folder.glob(f"{pattern}.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
