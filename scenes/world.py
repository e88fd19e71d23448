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

import argparse
import hashlib
from collections.abc import Sequence
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes a contact sheet of a few scenes of every family."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--backgrounds", type=int, default=2, help="backgrounds of each family")
    parser.add_argument("--frames", type=int, default=4, help="frames of each background")
    parser.add_argument("--seed", type=int, default=0, help="first background seed")
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(options.backgrounds, options.frames, options.seed).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
