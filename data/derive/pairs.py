"""Stale pairs: the background group of one frame under the fresh group of a later one, as matching gives them.

What serves at inference makes the pairs: the earlier frame goes through the processor with matching on, then the
later one; its groups are taken as they come. So a model learns that fresh tokens override stale ones at the same
position (contract 4).
"""

import json
import random
from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from datasets import Dataset
from PIL import Image

from backdrop.processing.image_loading_backdrop import is_group
from backdrop.processing.matches_backdrop import MatchReport
from backdrop.processing.patch_groups_backdrop import PatchGroup

from .groups import (
    IMAGE_ERRORS,
    DatasetRows,
    LoadProcessor,
    about_processor,
    decoded,
    encoded,
    processor_identity,
)
from .shards import Recipe, Shard

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class PairOptions:
    """How pairs are made.

    Attributes:
        tolerance: the matcher's, grey levels 0-255.
        seed: of the choice of frames.
        any_order: the other frame may be a later one too.
        whole_background: share of rows, 0-1, whose reference is the *whole* other frame, old objects included.
        on_miss: "split" keeps a row that finds no match as a plain split, "drop" leaves it out.
    """

    tolerance: float = 10.0
    seed: int = 0
    any_order: bool = False
    whole_background: float = 0.0
    on_miss: str = "split"

    def __post_init__(self) -> None:
        if not 0 <= self.whole_background <= 1:
            raise ValueError(f"whole_background is {self.whole_background}; wanted a share from 0 to 1.")
        if self.on_miss not in ("split", "drop"):
            raise ValueError(f"on_miss is {self.on_miss!r}; wanted 'split' or 'drop'.")


class Frames(Protocol):
    """Frames of scenes by number, some with questions.

    Attributes:
        scenes: the scene (camera, screen recording) of each frame.
        orders: sort the frames of a scene; equal values: the same moment.
        asked: numbers of the frames that become rows.
    """

    scenes: list[str]
    orders: list[Any]
    asked: list[int]

    def images(self, number: int) -> list[dict]:
        """Undecoded; a frame is one image, more or none make a bad row."""
        ...

    def question(self, number: int) -> tuple[str, list[dict]]:
        """Id and messages of a frame that is asked about."""
        ...


class DatasetFrames:
    """Frames of a dataset with `images`, `messages`, `scene`, and `frame` where rows are not in order already."""

    def __init__(self, rows: Dataset):
        ordered = "frame" in rows.column_names
        self._rows = DatasetRows(rows, ("scene", "frame") if ordered else ("scene",))
        self.scenes = self._rows.column("scene")
        self.orders = self._rows.column("frame") if ordered else list(range(len(rows)))
        for name, values in (("scene", self.scenes), ("frame", self.orders)):
            if None in values:
                raise ValueError(f"Row {values.index(None)} has no {name}; wanted one in every row.")
        self.asked = list(range(len(rows)))

    def images(self, number: int) -> list[dict]:
        """The row's images, undecoded."""
        return self._rows[number : number + 1][0]["images"]

    def question(self, number: int) -> tuple[str, list[dict]]:
        """The row's id and messages."""
        row = self._rows[number : number + 1][0]
        return row["id"], row["messages"]


class FolderFrames:
    """A folder per scene, its images in the order of their names, and `metadata.jsonl` in it with the questions.

    As in an image folder of `datasets`, a line of the metadata is `{"file_name": "0007.png", "messages": [...]}`, with
    an `id` if there is one. Images that no line names serve as earlier frames only.
    """

    def __init__(self, folder: Path):
        self.scenes: list[str] = []
        self.orders: list[int] = []
        self.asked: list[int] = []
        self._paths: list[Path] = []
        self._questions: dict[int, tuple[str, list[dict]]] = {}
        for scene in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
            self._add_scene(scene)
        if not self.asked:
            raise ValueError(f"{folder} has no questions; wanted a folder per scene with {METADATA} in it.")

    def _add_scene(self, scene: Path) -> None:
        paths = sorted(path for path in scene.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        numbers = {path.name: len(self._paths) + i for i, path in enumerate(paths)}
        self._paths += paths
        self.scenes += [scene.name] * len(paths)
        self.orders += range(len(paths))
        lines = (scene / METADATA).read_text().splitlines() if (scene / METADATA).is_file() else []
        for line in filter(str.strip, lines):
            entry = json.loads(line)
            number = numbers.get(entry["file_name"])
            if number is None:
                raise ValueError(
                    f"{scene / METADATA} names {entry['file_name']!r}; wanted an image beside it."
                )
            if number in self._questions:
                raise ValueError(f"{scene / METADATA} names {entry['file_name']!r} twice; wanted once.")
            row_id = entry.get("id", f"{scene.name}/{entry['file_name']}")
            self._questions[number] = (str(row_id), entry["messages"])
            self.asked.append(number)

    def images(self, number: int) -> list[dict]:
        """The frame's file, undecoded."""
        return [{"bytes": None, "path": str(self._paths[number])}]

    def question(self, number: int) -> tuple[str, list[dict]]:
        """Id and messages that the metadata gives the frame."""
        return self._questions[number]


class PairRows:
    """Rows of frames, each with another frame of its scene, as a `Source`.

    A row has `id`, `images`, `messages`, `earlier` (images of the other frame, None where its scene has none) and
    `whole` (all patches of the other frame are the reference). Choices depend on the seed, the row's number and the
    frames of its scene, not on shards.
    """

    def __init__(self, frames: Frames, options: PairOptions):
        self._frames, self._options = frames, options
        by_scene: dict[str, list[int]] = defaultdict(list)
        for number, scene in enumerate(frames.scenes):
            by_scene[scene].append(number)
        self._by_scene = {
            scene: sorted(numbers, key=frames.orders.__getitem__) for scene, numbers in by_scene.items()
        }

    def __len__(self) -> int:
        return len(self._frames.asked)

    def __getitem__(self, rows: slice) -> list[dict]:
        return [self._row(number) for number in self._frames.asked[rows]]

    def _row(self, number: int) -> dict:
        rng = random.Random(f"pairs/{self._options.seed}/{number}")
        whole = rng.random() < self._options.whole_background
        other = self._other_frame(number, rng)
        row_id, messages = self._frames.question(number)
        return {
            "id": row_id,
            "images": self._frames.images(number),
            "messages": messages,
            "earlier": None if other is None else self._frames.images(other),
            "whole": whole,
        }

    def _other_frame(self, number: int, rng: random.Random) -> int | None:
        orders, scene = self._frames.orders, self._by_scene[self._frames.scenes[number]]
        earlier = bisect_left(scene, orders[number], key=orders.__getitem__)
        # Without a choice among later frames, they begin behind the last one.
        later = len(scene)
        if self._options.any_order:
            later = bisect_right(scene, orders[number], key=orders.__getitem__)
        candidates = earlier + len(scene) - later
        if not candidates:
            return None
        drawn = rng.randrange(candidates)
        return scene[drawn] if drawn < earlier else scene[later + drawn - earlier]


class PairWork:
    """Pairs, by the production matcher: a reference of the earlier frame, then the later frame as at inference."""

    def __init__(self, load_processor: LoadProcessor, options: PairOptions):
        self.processor = load_processor()
        self.options = options
        self.matcher = self.processor.enable_background_matching(tolerance=options.tolerance)
        self._reports: list[MatchReport] = []
        self.matcher.observer = self._reports.append

    def __call__(self, first: int, rows: list[dict]) -> Shard:
        """The rows' pairs, and counts of what the matcher did; rows with an unreadable image are named in the shard."""
        made, bad = [], []
        counts = dict.fromkeys(
            ("matched", "missed", "alone", "whole_background", "reused", "overridden", "fresh"), 0
        )
        for row in rows:
            try:
                groups, report = self._pair(row)
            except IMAGE_ERRORS as error:
                bad.append((row["id"], str(error)))
                continue
            reference = report.reference
            matched = reference is not None
            counts["matched" if matched else "alone" if row["earlier"] is None else "missed"] += 1
            if reference is not None:
                counts["whole_background"] += row["whole"]
                counts["reused"] += int((~report.fresh).sum())
                counts["overridden"] += int((report.fresh & reference.patch_mask).sum())
                counts["fresh"] += int(report.fresh.sum())
            if matched or self.options.on_miss == "split":
                images = [encoded(group, self.processor) for group in groups]
                made.append({"id": row["id"], "images": images, "messages": row["messages"]})
        return Shard({"": made}, bad, counts)

    def _pair(self, row: dict) -> tuple[list[PatchGroup], MatchReport]:
        self.matcher.clear()
        frame = _frame(row["images"])
        if row["earlier"] is not None:
            earlier = _frame(row["earlier"])
            if row["whole"]:
                pixels = self.processor.model_images([earlier])[0]
                patches = (pixels.shape[0] // self.processor.patch_size) ** 2
                self.matcher.add(pixels, np.ones(patches, dtype=bool))
            else:
                self.processor.image_groups([earlier])
        self._reports.clear()
        groups = self.processor.image_groups([frame])[0]
        return groups, self._reports[-1]


def _frame(images: list[dict]) -> Image.Image:
    """The picture of a frame."""
    if len(images) != 1:
        raise ValueError(f"a frame has {len(images)} images; wanted one")
    picture = decoded(images[0])
    if is_group(picture):
        raise ValueError("a frame is a patch group; wanted an ordinary image, to be matched")
    return picture


def pairs_recipe(
    load_processor: LoadProcessor, options: PairOptions, source_digest: str, shard_rows: int = 64
) -> Recipe:
    """Frames of scenes -> rows of a reference's background group and a later frame's fresh group."""
    processor = load_processor()
    if not processor.split:
        raise ValueError(
            "The processor has split=False; wanted one that splits: whole images are never matched."
        )
    return Recipe(
        make_work=partial(PairWork, load_processor, options),
        identity={
            "kind": "pairs",
            **processor_identity(processor),
            "source": source_digest,
            "options": asdict(options),
        },
        about=about_processor(processor),
        shard_rows=shard_rows,
    )


def pair_figures(record: dict) -> dict[str, float]:
    """Share of rows that matched, and mean patches of a matched one, from a dataset's record."""
    counts = record["counts"]
    rows = sum(counts.get(name, 0) for name in ("matched", "missed", "alone"))
    matched = counts.get("matched", 0)
    figures = {"rows": rows, "matched_share": matched / max(rows, 1)}
    for name in ("reused", "overridden", "fresh"):
        figures[f"mean_{name}_patches"] = counts.get(name, 0) / max(matched, 1)
    return figures
