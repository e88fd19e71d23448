"""Reads datasets' files row by row: original JSON, text and CSV, and rows that `datasets` loads.

JSON is parsed as it is read (ijson): LLaVA's mix is 1 GB and GQA's questions are more, several times that as objects.
"""

import contextlib
import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import ijson
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    List,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from huggingface_hub import hf_hub_download

# Names of a split in file names and on the Hub; ADE20K says training, OCR-VQA's Hub form and others validation.
ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "dev"),
    "test": ("test",),
    "testdev": ("testdev",),
}
# JSON files that lie beside rows: the account of bad ones, and what `datasets` notes of a repository.
_NO_ROWS = ("bad_rows.json", "dataset_infos.json")
# Hub repositories that hold a loading script alone -> what holds the same rows as parquet.
PARQUET_MIRRORS = {
    "HuggingFaceM4/VQAv2": "lmms-lab/VQAv2 (validation, no train)",
    "nlphuji/flickr30k": "lmms-lab/flickr30k (one split, test)",
    "facebook/textvqa": "lmms-lab/textvqa",
}
_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def split_names(split: str) -> tuple[str, ...]:
    """The names that files and Hub repositories know `split` under, itself first."""
    for names in ALIASES.values():
        if split in names:
            return (split, *(name for name in names if name != split))
    return (split,)


def choose_split(split: str, available: Collection[str], where: str) -> str:
    """The one of `available` that is `split` under one of its names."""
    for name in split_names(split):
        if name in available:
            return name
    raise ValueError(f"{where} has no split {split!r}; it has {', '.join(sorted(available)) or 'none'}.")


# ---- original files


def json_items(path: Path, prefix: str = "item") -> Iterator:
    """The elements of an array in a JSON file: of the file itself, or of the field in `prefix` ("data.item")."""
    with open(path, "rb") as file:
        yield from _named(path, ijson.items(file, prefix, use_float=True))


def json_entries(path: Path) -> Iterator[tuple[str, object]]:
    """(key, value) of a JSON file that is one object."""
    with open(path, "rb") as file:
        yield from _named(path, ijson.kvitems(file, "", use_float=True))


def _named(path: Path, parsed: Iterator) -> Iterator:
    try:
        yield from parsed
    except ijson.JSONError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def json_lines(path: Path) -> Iterator:
    """The values of a file with one JSON value a line; a line that is none is yielded as text."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    yield line


def csv_rows(path: Path) -> Iterator[dict]:
    """The rows of a CSV file, each a dictionary by the names in its first line."""
    with open(path, newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file without their ends; empty ones are left out."""
    with open(path, encoding="utf-8") as file:
        yield from (line.rstrip("\n") for line in file if line.strip())


def matching(folder: Path, pattern: str) -> Iterator[Path]:
    """Files in the folder or one folder below; not all below, where millions of images may lie."""
    yield from folder.glob(pattern)
    yield from folder.glob(f"*/{pattern}")


def one_file(folder: Path, patterns: list[str]) -> Path:
    """The one file in `folder`, or one folder below, that any of the patterns matches."""
    found = sorted({path for pattern in patterns for path in matching(folder, pattern)})
    if not found:
        raise ValueError(f"{folder} has no file {' or '.join(patterns)}.")
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise ValueError(
            f"{folder} has several such files ({names}); give the one that is meant as the source."
        )
    return found[0]


def hub_file(repo: str, name: str) -> Path:
    """A file of a Hub dataset, downloaded once."""
    return Path(hf_hub_download(repo, name, repo_type="dataset"))


# ---- rows that `datasets` loads


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def row_files(folder: Path, json_too: bool = False) -> list[Path]:
    """Parquet files in the folder and below it, or else, if wanted, JSON files in the folder itself."""
    found = sorted(folder.rglob("*.parquet"))
    return found or sorted(
        path
        for path in folder.iterdir()
        if json_too and path.suffix in (".json", ".jsonl") and path.name not in _NO_ROWS
    )


def open_rows(
    source: str,
    split: str,
    *,
    config: str | None = None,
    streaming: bool,
    json_too: bool = False,
) -> Dataset | IterableDataset:
    """The rows of a folder from `save_to_disk`, of parquet (or JSON) files, or of a Hub id.

    Local files are told apart by split through their names ("train-00000-of-00002.parquet") or their folder's
    ("validation/0000.parquet"); files that name none are "train". `config` is a sub-folder of a local folder.
    """
    path = Path(source)
    if path.is_file():
        return _load_files([path], split, streaming)
    if path.is_dir():
        folder = path / config if config else path
        if not folder.is_dir():
            raise ValueError(f"{path} has no folder {config}.")
        if is_saved(folder):
            rows = load_from_disk(folder)
            return rows[choose_split(split, rows, str(folder))] if isinstance(rows, DatasetDict) else rows
        files = row_files(folder, json_too)
        if not files:
            raise ValueError(f"{folder} has no parquet{' or JSON' if json_too else ''} file.")
        if len(files) == 1 and _split_of(files[0]) is None:  # as where the file itself is named
            return _load_files(files, split, streaming)
        by_split: dict[str, list[Path]] = {}
        for file in files:
            by_split.setdefault(_split_of(file) or "train", []).append(file)
        found = _configured(config, by_split) or choose_split(split, by_split, str(folder))
        return _load_files(by_split[found], split, streaming)
    with _one_line(source):
        available = get_dataset_split_names(source, config)
        found = _configured(config, available) or choose_split(split, available, source)
        return load_dataset(source, config, split=found, streaming=streaming)


@contextlib.contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Errors of `datasets` and of the Hub's client as a `ValueError` of one line that names the source."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(source):  # ours
            raise
        raise ValueError(_reason(source, error)) from error
    except Exception as error:
        raise ValueError(_reason(source, error)) from error


def _reason(source: str, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "scripts are no longer supported" in text:
        known = PARQUET_MIRRORS.get(source)
        return (
            f"{source} holds a loading script, which `datasets` no longer runs, and no files of rows; wanted "
            + (f"{known}, or " if known else "a mirror in parquet, or ")
            + "the dataset's original files in a folder (docs/guides/data.md)."
        )
    return f"{source} cannot be loaded: {text[:300]}"


def _configured(config: str | None, available: Collection[str]) -> str | None:
    """A configuration that is one split (GQA's "val_balanced_images") names it; whatever its only split is called."""
    return next(iter(available)) if config and len(available) == 1 else None


def _split_of(file: Path) -> str | None:
    known = [name for names in ALIASES.values() for name in names]
    for name in (file.stem.split("-")[0], file.parent.name):
        if name in known:
            return name
    return None


def _load_files(files: list[Path], split: str, streaming: bool) -> Dataset | IterableDataset:
    kind = _FORMATS.get(files[0].suffix)
    if kind is None:
        raise ValueError(f"{files[0]} is no file of rows; wanted {', '.join(_FORMATS)}.")
    with _one_line(str(files[0])):
        return load_dataset(
            kind, data_files={split: [str(file) for file in files]}, split=split, streaming=streaming
        )


def columns(rows: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; of a stream of JSON, those of its first row."""
    # A stream of JSON does not know its columns before its first row.
    return rows.column_names or list(next(iter(rows), {}))


def require_columns(rows: Dataset | IterableDataset, wanted: list[str], where: str) -> None:
    """Refuses rows without one of the wanted columns: a `ValueError` that names `where` they come from."""
    found = columns(rows)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{where} has columns {', '.join(found)}; it lacks {', '.join(missing)}.")


def stored_rows(rows: Dataset | IterableDataset, names: list[str]) -> Iterator[dict]:
    """The rows' columns `names`, images undecoded, as `{"bytes", "path"}`."""
    rows = rows.select_columns(names)
    if rows.features is None:  # a stream of JSON: nothing in it would be decoded
        yield from rows
        return
    features = Features({name: _undecoded(feature) for name, feature in rows.features.items()})
    for table in rows.with_format("arrow"):
        for row in table.to_pylist():
            yield features.decode_example(row)


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, List):
        return List(_undecoded(feature.feature))
    return Image(decode=False) if isinstance(feature, Image) else feature
