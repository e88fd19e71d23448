"""Captions: COCO and Flickr30k.

Each set has two readers. The one of files reads what the set's authors publish (the layout is in its docstring), the one
of rows reads a Hub id or local files with the columns of the mirror named there.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from datasets import Dataset, IterableDataset

from .files import (
    choose_split,
    columns,
    csv_rows,
    json_items,
    matching,
    one_file,
    require_columns,
    split_names,
    stored_rows,
    text_lines,
)
from .images import stored_image
from .prompts import checked_list, checked_text
from .request import Parsed, Request, caption_example, parsed
from .rows import BadRowError, Example


def coco_files(request: Request) -> Parsed:
    """captions_{train,val}{2014,2017}.json: `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`)."""
    path = request.file("captions_{split}*.json")
    year = path.stem.removeprefix("captions_")

    def read() -> Parsed:
        captions: dict[int, list] = {}
        for row in json_items(path, "annotations.item"):
            captions.setdefault(row.get("image_id"), []).append(row.get("caption"))

        def parse(row: dict) -> Example:
            row_id, name = str(row["id"]), row["file_name"]
            if row["id"] not in captions:
                raise BadRowError(row_id, "has no caption")
            return caption_example(row_id, request.image(row_id, name, f"{year}/{name}"), captions[row["id"]])

        yield from parsed(json_items(path, "images.item"), parse)

    return read()


def coco_rows(request: Request) -> Parsed:
    """jxie/coco_captions (a row a caption, those of an image together), or lmms-lab/COCO-Caption2017 (a row an image,
    captions in `answer`)."""
    rows = request.open(["image"])
    if "answer" in columns(rows):
        wanted = ["image", "question_id", "answer"]
        require_columns(rows, wanted, request.source)

        def parse(row: dict) -> Example:
            row_id = str(row["question_id"])
            return caption_example(row_id, stored_image(row_id, row["image"], request.images), row["answer"])

        return parsed(stored_rows(rows, wanted), parse)

    wanted = ["image", "cocoid", "caption"]
    require_columns(rows, wanted, request.source)
    seen = set()

    def gathered() -> Iterator[dict]:
        for cocoid, neighbours in groupby(stored_rows(rows, wanted), key=lambda row: row["cocoid"]):
            group = list(neighbours)
            yield {
                "cocoid": cocoid,
                "image": group[0]["image"],
                "captions": [row["caption"] for row in group],
            }

    def parse_group(row: dict) -> Example:
        row_id = str(row["cocoid"])
        if row_id in seen:
            raise BadRowError(row_id, "the captions of the image do not stand together")
        seen.add(row_id)
        return caption_example(row_id, stored_image(row_id, row["image"], request.images), row["captions"])

    return parsed(gathered(), parse_group)


def flickr_files(request: Request) -> Parsed:
    """Karpathy's dataset_flickr30k.json (`images`: `filename`, `split`, `sentences` with `raw`), or
    flickr_annotations_30k.csv (`raw` is a JSON list), or results_20130124.token (`1000092795.jpg#0<TAB>caption`),
    which has no splits; images in flickr30k-images/."""
    path = request.path
    if path.is_dir():
        kinds = ["dataset_flickr30k.json", "flickr_annotations_30k.csv", "results*.token"]
        path = one_file(path, next((([kind]) for kind in kinds if next(matching(path, kind), None)), kinds))
    if path.suffix == ".token":
        if request.split != "all":
            raise ValueError(
                f"{path} has no splits; wanted split 'all' for its {request.split!r}, or dataset_flickr30k.json beside it."
            )
        rows = _flickr_tokens(path)
    else:
        rows = _flickr_csv(path) if path.suffix == ".csv" else json_items(path, "images.item")
        rows = _of_split(rows, request.split)

    def parse(row: dict) -> Example:
        name = row["filename"]
        row_id = Path(checked_text("?", "filename", name)).stem
        captions = [sentence["raw"] for sentence in checked_list(row_id, "sentences", row["sentences"])]
        return caption_example(
            row_id,
            request.image(row_id, name, f"flickr30k-images/{name}", f"flickr30k_images/{name}"),
            captions,
        )

    return parsed(rows, parse)


def _of_split(rows: Iterable[dict], split: str) -> Iterator[dict]:
    """The rows whose `split` is `split`; none at all is an error that names those there are."""
    seen, any_found = set(), False
    for row in rows:
        seen.add(row.get("split"))
        if row.get("split") in split_names(split):
            any_found = True
            yield row
    if not any_found:
        choose_split(split, {str(name) for name in seen}, "the column split")


def _flickr_csv(path: Path) -> Iterator[dict]:
    csv.field_size_limit(1 << 24)
    for row in csv_rows(path):
        try:
            raw = json.loads(row["raw"])
        except (json.JSONDecodeError, TypeError):
            raw = []
        yield {**row, "sentences": [{"raw": caption} for caption in raw]}


def _flickr_tokens(path: Path) -> Iterator[dict]:
    def entry(line: str) -> tuple[str, str]:
        place, _, caption = line.partition("\t")
        return place.rpartition("#")[0], caption

    for name, group in groupby(map(entry, text_lines(path)), key=lambda pair: pair[0]):
        yield {"filename": name, "sentences": [{"raw": caption} for _, caption in group]}


def flickr_rows(request: Request) -> Parsed:
    """lmms-lab/flickr30k, all of it in "test"; local rows with a column `split` are told apart by that."""
    wanted = ["image", "filename", "caption"]
    rows = _flickr_open(request, wanted)
    if "split" in columns(rows):
        found = _of_split(stored_rows(rows, [*wanted, "split"]), request.split)
    else:
        found = stored_rows(rows, wanted)

    def parse(row: dict) -> Example:
        row_id = Path(checked_text("?", "filename", row["filename"])).stem
        return caption_example(row_id, stored_image(row_id, row["image"], request.images), row["caption"])

    return parsed(found, parse)


def _flickr_open(request: Request, wanted: list[str]) -> Dataset | IterableDataset:
    try:
        return request.open(wanted)
    except ValueError:
        rows = replace(request, split="test").open(wanted)
        if "split" not in columns(rows):
            raise
        return rows
