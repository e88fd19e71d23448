"""ADE20K: its labels of scenes and objects, as questions.

Each set has two readers. The one of files reads what the set's authors publish (the layout is in its docstring), the one
of rows reads a Hub id or local files with the columns of the mirror named there.
"""

import csv
from pathlib import Path

import numpy as np
from datasets import ClassLabel
from PIL import Image

from .files import (
    choose_split,
    columns,
    one_file,
    require_columns,
    stored_rows,
    text_lines,
)
from .images import file_image, stored_image
from .prompts import OBJECTS, SCENE, checked_text
from .request import Parsed, Request, question_example
from .rows import BadRowError, Example

# Images that the benchmark could not give a scene.
_NO_SCENE = ("misc", "outliers")
_ADE_SPLITS = {"train": "training", "validation": "validation"}


def _ade_examples(stem: str, image: dict, scene: str | None, objects: list[str] | None) -> Parsed:
    """Two questions about an image, its scene and its objects; None leaves one out."""
    if scene is not None:
        try:
            if scene in _NO_SCENE:
                raise BadRowError(f"{stem}/scene", f"scene is {scene!r}")
            label = " ".join(checked_text(f"{stem}/scene", "scene", scene).replace("_", " ").split())
            yield question_example(
                f"{stem}/scene", image, SCENE, [label], question_type="scene", image_id=stem
            )
        except BadRowError as error:
            yield error
    if objects is not None:
        if objects:
            answer = ", ".join(dict.fromkeys(objects))
            yield Example(f"{stem}/objects", [image], [(OBJECTS, answer)], [answer], "objects", stem)
        else:
            yield BadRowError(f"{stem}/objects", "has no named object")


def _first_name(names: str) -> str:
    """ "windowpane, window" -> "windowpane": ADE20K gives synonyms of WordNet."""
    return names.split(",")[0].strip()


def ade_files(request: Request) -> Parsed:
    """The SceneParsing benchmark (ADEChallengeData2016): sceneCategories.txt (`ADE_train_00000001 airport_terminal`),
    images/{training,validation}/*.jpg, annotations/{training,validation}/*.png (0: none, 1-150: the index in
    objectInfo150.txt, whose last tab-separated column has the names). Objects come by falling area."""
    scenes = request.file("sceneCategories.txt")
    base = scenes.parent
    split = _ADE_SPLITS[choose_split(request.split, _ADE_SPLITS, str(base))]
    info = one_file(base, ["objectInfo150.txt"])
    with open(info, newline="", encoding="utf-8") as file:
        header, *lines = csv.reader(file, delimiter="\t")
    if header[0] != "Idx" or header[-1] != "Name":
        raise ValueError(f"{info} has columns {', '.join(header)}; wanted Idx first and Name last.")
    names = {int(line[0]): _first_name(line[-1]) for line in lines if line}
    prefix = {"training": "ADE_train_", "validation": "ADE_val_"}[split]

    def read() -> Parsed:
        for line in text_lines(scenes):
            stem, _, scene = line.strip().partition(" ")
            if not stem.startswith(prefix):
                continue
            try:
                image = file_image(
                    stem, [root / split / f"{stem}.jpg" for root in (*request.roots, base / "images")]
                )
                objects = _labels(stem, base / "annotations" / split / f"{stem}.png", names)
            except BadRowError as error:
                yield error
                continue
            yield from _ade_examples(stem, image, scene, objects)

    return read()


def _labels(row_id: str, path: Path, names: dict[int, str]) -> list[str]:
    """Names of the labels of an annotation image, by falling area."""
    try:
        with Image.open(path) as image:
            counts = np.bincount(np.asarray(image).ravel(), minlength=1)
    except Exception as error:  # as in `images`: a broken file raises anything
        raise BadRowError(row_id, f"annotation {path}: {error}") from None
    order = sorted(np.flatnonzero(counts), key=lambda label: -counts[label])
    return [names[int(label)] for label in order if int(label) in names]


def ade_rows(request: Request) -> Parsed:
    """1aurent/ADE20K (`scene`, `objects` with `name` and `parts`), or scene_parse_150 (`scene_category`; its objects
    have no names, so that only the scene is asked). Objects come in the order of the annotation, parts left out."""
    rows = request.open(["image"])
    found = columns(rows)
    if "scene_category" in found:
        label = (rows.features or {}).get("scene_category")

        def read_labels() -> Parsed:
            for number, row in enumerate(stored_rows(rows, ["image", "scene_category"])):
                stem, scene = f"{request.split}-{number}", row["scene_category"]
                try:
                    image = stored_image(stem, row["image"], request.images)
                except BadRowError as error:
                    yield error
                    continue
                scene = label.int2str(scene) if isinstance(label, ClassLabel) and scene is not None else scene
                yield from _ade_examples(stem, image, str(scene), None)

        return read_labels()

    wanted = ["image", "filename", "scene", "objects"]
    require_columns(rows, wanted, request.source)

    def read() -> Parsed:
        for number, row in enumerate(stored_rows(rows, wanted)):
            stem = Path(row["filename"] or f"#{number}").stem
            try:
                image = stored_image(stem, row["image"], request.images)
            except BadRowError as error:
                yield error
                continue
            scene = row["scene"]
            scene = (scene[-1] if scene else "") if isinstance(scene, list) else scene
            yield from _ade_examples(stem, image, scene or "", _object_names(row["objects"] or []))

    return read()


def _object_names(objects: list[dict]) -> list[str]:
    whole = [row for row in objects if not (row.get("parts") or {}).get("part_level")]
    return [_first_name(row["name"]) for row in whole if row.get("name")]
