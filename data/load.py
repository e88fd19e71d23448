"""Loads public data sets as examples and as training rows; bad rows are found before training.

    backdrop data vqav2 data/vqav2 --split train --images data/coco --limit 1000 --show 3
    backdrop data llava_instruct liuhaotian/LLaVA-Instruct-150K --images data --out runs/mix

A source is a folder with the set's original files, one such file, local files with the columns of a Hub mirror, or a
Hub id; `backdrop.data.sources` says for each set which. `--out` keeps the rows (`save_to_disk`): the images are
decoded once, and the folder is read back as the data set "rows".
"""

import atexit
import json
import os
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow.compute as compute
from datasets import Dataset, Features, Image, IterableDataset, List, config
from datasets.exceptions import DatasetGenerationError
from tqdm import tqdm

from .files import columns, open_rows, stored_rows
from .images import check_image
from .request import Request
from .rows import TRAINING_FEATURES, BadRowError, BadRows, Example
from .sources import SOURCES, read_source
from .stored import COLUMNS, STRUCTURED_FEATURES, checked_row, row_example, stored_columns, structured

NAMES: tuple[str, ...] = ("rows", *SOURCES)
IMAGE_POSITIONS = ("first", "in_place")
_AHEAD = 8  # rows that a checking thread may be ahead of the reader
BAD_ROWS = "bad_rows.json"


def examples(
    name: str,
    source: str,
    *,
    split: str = "train",
    images: str | Path | None = None,
    streaming: bool = False,
    bad_rows: BadRows | None = None,
    limit: int | None = None,
    check_images: bool = True,
    ocr_tokens: bool = False,
) -> Iterator[Example]:
    """The examples of a data set, read as they are asked for.

    Args:
        name: one of `NAMES`; "rows" are rows that have messages and images already, as TRL takes them.
        source: a folder, a file or a Hub id.
        split: "train", "validation", ...; other names of it ("val", "training") are found too. "all" takes
            Flickr30k's token file, which has no splits.
        images: the folder that image files lie in, where that is not the source's own.
        streaming: read a Hub id over the network; else it is downloaded first.
        bad_rows: takes down the rows that are left out; None: the first is raised.
        limit: at most so many examples.
        check_images: decode every image; else a file that exists is believed.
        ocr_tokens: TextVQA with "Reference OCR token: ..." where there are tokens.

    Raises:
        ValueError: an unknown name; a missing file, split or column.
        BadRowError: a bad row that nothing takes down.
    """
    request = _request(name, source, split, images, streaming, ocr_tokens)
    found: Iterable[Example | BadRowError]
    if name == "rows":
        found = (
            row if isinstance(row, BadRowError) else row_example(row)
            for row in _checked_rows(_open_stored(request), request)
        )
    else:
        found = read_source(name, request)
    bad_rows = BadRows("raise") if bad_rows is None else bad_rows
    return islice(_good(found, bad_rows, check_images), limit)


def load_rows(
    name: str,
    source: str,
    *,
    split: str = "train",
    images: str | Path | None = None,
    streaming: bool = False,
    on_bad_row: str = "skip",
    limit: int | None = None,
    check_images: bool = True,
    image_position: str = "first",
    ocr_tokens: bool = False,
) -> tuple[Dataset | IterableDataset, BadRows]:
    """Training rows (`TRAINING_FEATURES`, or `STRUCTURED_FEATURES` in place) and the bad rows among them.

    The rows are read anew by every call and lie in a folder that goes when the process ends: what was skipped is
    always known. Keep them with `save_to_disk`. A caption set gives one row for each caption. Rows without an image
    (LLaVA's mix has some) have `images` [] and train beside the others.

    Args:
        streaming: rows come as they are asked for, and the bad rows of an iteration are known when it ends. With
            workers in a `DataLoader` they are counted there and not here.
        on_bad_row: "skip" or "raise".
        image_position: "first": contents are text, and TRL puts the images before the first question. "in_place":
            contents are parts in the order that the set's own prompt has them in.
        others: see `examples`.

    Raises:
        ValueError: as `examples`; not one good row.
        BadRowError: a bad row, with "raise".
    """
    if image_position not in IMAGE_POSITIONS:
        raise ValueError(f"image_position is {image_position!r}; wanted one of {', '.join(IMAGE_POSITIONS)}.")
    request = _request(name, source, split, images, streaming, ocr_tokens)
    bad_rows = BadRows(on_bad_row)
    features = STRUCTURED_FEATURES if image_position == "in_place" else TRAINING_FEATURES
    if name == "rows":
        stored = _open_stored(request)
        if _as_they_stand(stored, request, features):
            return _select_good(stored, request, bad_rows, limit, check_images), bad_rows
        features = STRUCTURED_FEATURES if _has_parts(stored) else features
    else:
        read_source(name, request)  # what is missing is an error here, not at a stream's first row
    rows = partial(_training_rows, name, request, bad_rows, limit, check_images, features)
    if streaming:
        return IterableDataset.from_generator(rows, features=features), bad_rows
    return _write_rows(rows, features), bad_rows


def _request(
    name: str, source: str, split: str, images: str | Path | None, streaming: bool, ocr_tokens: bool
) -> Request:
    if name not in NAMES:
        raise ValueError(f"data set is {name!r}; wanted one of {', '.join(NAMES)}.")
    if ocr_tokens and name != "textvqa":
        raise ValueError(f"ocr_tokens is for textvqa, not {name}.")
    folder = Path(images) if images is not None else None
    if folder is not None and not folder.is_dir():
        raise ValueError(f"images: {folder} is no folder.")
    return Request(str(source), split, folder, streaming, ocr_tokens)


# ---- good and bad


def _good(found: Iterable, bad_rows: BadRows, check_images: bool) -> Iterator:
    """What is good of `found` (examples or rows, or the errors in their place), in order."""
    for item in _each_in_threads(_with_images, found) if check_images else found:
        if isinstance(item, BadRowError):
            bad_rows.add(item)
        else:
            yield item


def _with_images(item: Example | dict | BadRowError) -> Example | dict | BadRowError:
    """The item, or the error of the first of its images that cannot be decoded."""
    if isinstance(item, BadRowError):
        return item
    row_id, images = (item["id"], item["images"]) if isinstance(item, dict) else (item.id, item.images)
    try:
        for image in images:
            check_image(row_id, image)
    except BadRowError as error:
        return error
    return item


def _each_in_threads(call: Callable, items: Iterable) -> Iterator:
    """`call` of each item, in order, a few ahead of the reader: PIL decodes without holding the interpreter."""
    threads = os.cpu_count() or 1
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(call, item))
                if len(waiting) > threads * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _training_rows(
    name: str, request: Request, bad_rows: BadRows, limit: int | None, check_images: bool, features: Features
) -> Iterator[dict]:
    """Rows of `features`; the bad rows of an earlier iteration are forgotten.

    Raises:
        ValueError: there is none.
    """
    bad_rows.rows.clear()
    count = 0
    for row in islice(_unlimited_rows(name, request, bad_rows, check_images, features), limit):
        count += 1
        yield row
    if not count:
        raise ValueError(
            f"{request.source} has no good row of {name} for {request.split!r}: {bad_rows.summary()}."
        )


def _unlimited_rows(
    name: str, request: Request, bad_rows: BadRows, check_images: bool, features: Features
) -> Iterator[dict]:
    in_parts = features == STRUCTURED_FEATURES
    if name == "rows":
        for row in _good(_checked_rows(_open_stored(request), request), bad_rows, check_images):
            if in_parts and isinstance(row["messages"][0]["content"], str):
                row["messages"] = structured(row["messages"], len(row["images"]))
            yield row
        return
    captions = SOURCES[name].captions
    for example in _good(read_source(name, request), bad_rows, check_images):
        for each in _each_caption(example) if captions else [example]:
            row = each.row()
            if in_parts:
                row["messages"] = structured(row["messages"], len(each.images), each.image_at)
            yield row


def _each_caption(example: Example) -> Iterator[Example]:
    ((prompt, _),) = example.turns
    for number, caption in enumerate(example.answers):
        yield replace(example, id=f"{example.id}#{number}", turns=[(prompt, caption)])


def _write_rows(rows: Callable[[], Iterator[dict]], features: Features) -> Dataset:
    """The rows on disk, in a folder of this process."""
    # Neither `datasets`' cache nor a fingerprint of the arguments: the files behind them may have changed, and rows
    # from a cache would have no account of the bad ones.
    cache = Path(config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix="backdrop-rows-", dir=cache)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return Dataset.from_generator(rows, features=features, cache_dir=folder, fingerprint=uuid.uuid4().hex)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


# ---- rows that have messages and images


def _open_stored(request: Request) -> Dataset | IterableDataset:
    path = request.path
    if not path.exists() and request.source.count("/") != 1:
        raise ValueError(f"{request.source} does not exist.")
    rows = open_rows(request.source, request.split, streaming=request.streaming, json_too=True)
    stored_columns(columns(rows), request.source)
    return rows


def _checked_rows(rows: Dataset | IterableDataset, request: Request) -> Iterator[dict | BadRowError]:
    folder = request.images or (request.folder if request.path.exists() else None)
    names = stored_columns(columns(rows), request.source)
    for number, row in enumerate(stored_rows(rows, names)):
        try:
            yield checked_row(number, row, folder)
        except BadRowError as error:
            yield error


def _has_parts(rows: Dataset | IterableDataset) -> bool:
    name = "messages" if "messages" in columns(rows) else "prompt"
    first = next(stored_rows(rows, [name]), {}).get(name) or [{}]
    return isinstance(first, list) and isinstance(first[0].get("content"), list)


def _as_they_stand(rows: Dataset | IterableDataset, request: Request, features: Features) -> bool:
    """Whether the good rows can be taken out of `rows` without writing any."""
    if not isinstance(rows, Dataset) or request.images or rows.features.get("images") != List(Image()):
        return False
    return rows.features.get("messages") in (features["messages"], STRUCTURED_FEATURES["messages"])


def _select_good(
    rows: Dataset, request: Request, bad_rows: BadRows, limit: int | None, check_images: bool
) -> Dataset:
    numbered = (
        row if isinstance(row, BadRowError) else {**row, "number": number}
        for number, row in enumerate(_checked_rows(rows, request))
    )
    good = _good(numbered, bad_rows, check_images)
    kept = [
        row["number"] for row in tqdm(islice(good, limit), desc=f"checking {request.source}", unit=" rows")
    ]
    if not kept:
        raise ValueError(f"{request.source} has no good row: {bad_rows.summary()}.")
    if rows.features.get("id") != TRAINING_FEATURES["id"]:
        ids = rows["id"] if "id" in rows.column_names else range(len(rows))
        rows = rows.select_columns(["images", "messages"]).add_column("id", [str(value) for value in ids])
    return rows.select_columns(COLUMNS).select(kept)


# ---- command


def save_rows(rows: Dataset, bad_rows: BadRows, folder: Path) -> None:
    """Writes the rows, and beside them the account of the bad ones; the folder is there whole or not at all."""
    if folder.exists():
        raise ValueError(f"{folder} exists; wanted a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        rows.save_to_disk(part)
        (part / BAD_ROWS).write_text(json.dumps(list(bad_rows), indent=1), encoding="utf-8")
        part.chmod(0o755)  # mkdtemp makes it private
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def without_image(rows: Dataset) -> int:
    """How many rows have no image."""
    tables = rows.select_columns(["images"]).with_format("arrow").iter(batch_size=1000)
    return sum(
        compute.sum(compute.equal(compute.list_value_length(table["images"]), 0)).as_py() for table in tables
    )


def describe_row(row: dict) -> str:
    """A row in words: its id and images' sizes, then each message on a line."""
    pictures = (
        ", ".join(f"{image.width} x {image.height} {image.mode}" for image in row["images"]) or "no image"
    )
    lines = [f"{row['id']}: {pictures}"]
    for message in row["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = " ".join("<image>" if part["type"] == "image" else part["text"] for part in content)
        lines.append(f"  {message['role']}: {content}")
    return "\n".join(lines)
