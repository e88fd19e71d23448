"""Small data sets to derive from, and what derives them; light to import, for tests start processes with it."""

import time
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import tiny
from datasets import Dataset, load_from_disk
from PIL import Image as PILImage
from red_detector import RedDetector

from backdrop.data.derive.groups import DatasetRows, GroupWork, groups_recipe
from backdrop.data.derive.shards import derive, source_digest
from backdrop.data.rows import TRAINING_FEATURES
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import (
    PatchGroup,
    group_to_image,
    read_group,
    save_group,
)

S, P = tiny.SIDE, tiny.PATCH


def red_processor(**options) -> BackdropImageProcessor:
    """As conftest's; by name, so that a worker process can make one."""
    side = {"height": S, "width": S}
    values = {"size": {"shortest_edge": S}, "crop_size": side, "patch_size": P, "margin": 0, **options}
    processor = BackdropImageProcessor(**values)
    processor.set_detector(RedDetector())
    return processor


def picture(seed: int = 0, red: tuple[int, int, int] | None = (14, 14, 14), size=(S, S)) -> np.ndarray:
    """A smooth image with a red square (x, y, side) in it."""
    pixels = np.asarray(tiny.photo(*size, seed=seed)).copy()
    pixels[..., 0] = pixels[..., 0] // 2  # nothing else is red
    if red is not None:
        x, y, side = red
        pixels[y : y + side, x : x + side] = (255, 0, 0)
    return pixels


def stored(pixels, image_format: str = "PNG") -> dict:
    buffer = BytesIO()
    PILImage.fromarray(pixels).save(buffer, format=image_format)
    return {"bytes": buffer.getvalue(), "path": None}


def stored_group(seed: int = 0) -> dict:
    buffer = BytesIO()
    group = red_processor().image_groups([PILImage.fromarray(picture(seed))])[0][0]
    save_group(group_to_image(group, P, red_processor().geometry()), buffer)
    return {"bytes": buffer.getvalue(), "path": None}


def said(answer: str) -> list[dict]:
    return [{"role": "user", "content": "what is shown?"}, {"role": "assistant", "content": answer}]


def mixed_rows(count: int, folder: Path, bad: bool = True) -> Dataset:
    """Files, bytes of several formats, groups, shared images, rows without an image, and one that is broken."""
    rows = []
    for i in range(count):
        images = [stored(picture(i % 3, (14 * (i % 4), 14, 14), (80, 60)), ["PNG", "JPEG"][i % 2])]
        if i % 4 == 1:
            path = folder / f"{i}.png"
            path.write_bytes(stored(picture(i, None))["bytes"])
            images.append({"bytes": None, "path": str(path)})
        elif i % 4 == 2:
            images.append(stored_group(i))
        elif i % 8 == 3:
            images = []
        if bad and i == 4:
            images.append({"bytes": b"no image", "path": None})
        rows.append({"id": f"row{i}", "images": images, "messages": said(f"answer {i}")})
    return Dataset.from_list(rows, features=TRAINING_FEATURES)


def contents(folder) -> list[dict]:
    """Rows of a derived data set, images as stored."""
    rows = load_from_disk(str(folder))
    assert rows.features == TRAINING_FEATURES
    return rows.with_format("arrow")[:].to_pylist()


def group_of(image: dict) -> PatchGroup:
    found = PILImage.open(BytesIO(image["bytes"]))
    geometry = red_processor().geometry()
    return read_group(np.asarray(found), S, P, geometry, found.info["backdrop"])


def make_groups(rows: Dataset, out: Path, load=red_processor, shard_rows: int = 4, **options) -> dict:
    source = DatasetRows(rows)
    return derive(source, groups_recipe(load, source_digest(source), shard_rows), out, **options)


class SlowWork(GroupWork):
    """Long enough to be killed at."""

    def __call__(self, first, rows):
        time.sleep(0.1)
        return super().__call__(first, rows)


def slow_groups(dataset: str, out: str) -> None:
    """What the subprocess runs."""
    source = DatasetRows(load_from_disk(dataset))
    recipe = groups_recipe(red_processor, source_digest(source), 1)
    derive(source, replace(recipe, make_work=partial(SlowWork, red_processor)), Path(out), workers=2)
