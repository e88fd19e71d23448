"""Makes datasets in shards, in several processes. A run that was killed at any moment can be resumed.

A shard is a run of source rows and the Arrow file of what became of them. It is written under a temporary name, its
report last of all: a shard is finished where its report is. Shards collect in `OUT.partial`, which carries the
identity of everything the rows depend on; a restart keeps the finished ones if the identity is the same and refuses
otherwise. When the last is done the folder becomes what `datasets.load_from_disk` reads, without another copy of the
data, and is renamed to `OUT`.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import torch
from datasets import (
    Dataset,
    Features,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets.config import (
    DATASET_INFO_FILENAME,
    DATASET_STATE_JSON_FILENAME,
    DATASETDICT_JSON_FILENAME,
)
from filelock import FileLock, Timeout
from tqdm import tqdm

from backdrop.data.atomic import write_atomically
from backdrop.data.rows import TRAINING_FEATURES, BadRowError, BadRows

RECORD = "derived.json"  # beside the data: what it was made from, with what, and what came of it
REPORTS = "reports"
DIGEST_ROWS = 256


class Source(Protocol):
    """Rows to derive from; a slice of it is a list of rows that can be sent to another process."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> list[dict]: ...


@dataclass(frozen=True)
class Shard:
    """What became of a run of source rows.

    Attributes:
        rows: new rows by split; the only split of an undivided dataset is "".
        bad: (id, reason) of source rows that could not be used.
        counts: sums for the record.
    """

    rows: dict[str, list[dict]]
    bad: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


# Takes the number of the first source row and the rows of one shard.
Work = Callable[[int, list[dict]], Shard]


@dataclass(frozen=True)
class Recipe:
    """A dataset to be made.

    Attributes:
        make_work: gives the work; called once in each process, so it must pickle where there are several.
        identity: everything the rows depend on, as JSON; a run with another one is refused.
        about: recorded beside the data.
        splits: names of the result's splits; ("",): one undivided dataset.
        shard_rows: source rows in a shard.
    """

    make_work: Callable[[], Work]
    identity: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    splits: tuple[str, ...] = ("",)
    features: Features = field(default_factory=lambda: TRAINING_FEATURES)
    shard_rows: int = 64


def derive(source: Source, recipe: Recipe, out: Path, *, workers: int = 1, on_bad_row: str = "skip") -> dict:
    """Makes the dataset, or finishes it, or does nothing if it is there already.

    Args:
        source: the rows to derive from.
        out: folder of the result.
        workers: processes; 0 or 1: this one. The result does not depend on it.
        on_bad_row: "skip" counts rows that cannot be used, "raise" stops at the first shard that has one.

    Returns:
        The record, as written beside the data: `identity`, `about`, `rows` by split, `counts`, `bad_rows`.

    Raises:
        ValueError: another identity was found, another run is at work there, or the source is empty.
        BadRowError: with on_bad_row="raise".
    """
    if len(source) == 0:
        raise ValueError("There are no rows to derive from.")
    out = Path(out)
    identity = {**recipe.identity, "source_rows": len(source), "shard_rows": recipe.shard_rows}
    if out.exists():
        record = _checked_record(out, identity)
        _note_bad(BadRows(on_bad_row), record["bad_rows"])
        return record
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with _only_run(partial):
        if (partial / RECORD).exists():
            _checked_record(partial, identity)
        else:
            _write_json(partial / RECORD, {"identity": identity})
        for left in partial.rglob("*.tmp"):
            left.unlink()
        for folder in (REPORTS, *recipe.splits):
            (partial / folder).mkdir(exist_ok=True)
        reports = _all_reports(source, recipe, partial, workers, on_bad_row)
        counts: Counter[str] = Counter()
        for report in reports:
            counts.update(report["counts"])
        record = {
            "identity": identity,
            "about": recipe.about,
            "rows": {split: sum(report["rows"][split] for report in reports) for split in recipe.splits},
            "counts": dict(counts),
            "bad_rows": [bad for report in reports for bad in report["bad"]],
        }
        _complete(partial, recipe, len(reports), record)
        os.replace(partial, out)
        shutil.rmtree(out / REPORTS)
    return record


def _all_reports(source: Source, recipe: Recipe, partial: Path, workers: int, on_bad_row: str) -> list[dict]:
    """The report of every shard in order, of finished ones as found, of the others as they get made."""
    starts = range(0, len(source), recipe.shard_rows)
    paths = [_report_path(partial, number) for number in range(len(starts))]
    reports = {n: json.loads(path.read_text()) for n, path in enumerate(paths) if path.exists()}
    bad_rows = BadRows(on_bad_row)
    for report in reports.values():
        _note_bad(bad_rows, report["bad"])
    missing = [number for number in range(len(starts)) if number not in reports]
    tasks = (
        (
            partial,
            recipe.features,
            number,
            len(starts),
            starts[number],
            source[starts[number] : starts[number] + recipe.shard_rows],
            on_bad_row,
        )
        for number in missing
    )
    run = _in_workers if workers > 1 and len(missing) > 1 else _in_this_process
    remaining = sum(min(recipe.shard_rows, len(source) - starts[number]) for number in missing)
    with tqdm(total=len(source), initial=len(source) - remaining, desc=partial.stem, unit="row") as progress:
        for number, report in run(tasks, recipe.make_work, min(workers, len(missing))):
            _note_bad(bad_rows, report["bad"])
            reports[number] = report
            progress.update(min(recipe.shard_rows, len(source) - starts[number]))
    return [reports[number] for number in range(len(starts))]


def _note_bad(bad_rows: BadRows, found: list) -> None:
    for row_id, reason in found:
        bad_rows.add(BadRowError(row_id, reason))


# ---- processes


def _in_this_process(
    tasks: Iterable[tuple], make_work: Callable[[], Work], workers: int
) -> Iterator[tuple[int, dict]]:
    work = None
    with _one_torch_thread():
        for task in tasks:
            work = work or make_work()
            yield _make_shard(work, *task)


def _in_workers(
    tasks: Iterable[tuple], make_work: Callable[[], Work], workers: int
) -> Iterator[tuple[int, dict]]:
    # Spawned: a fork of a process whose torch threads have run may hang.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(make_work,)
    )
    pending: set[Future] = set()
    try:
        for task in tasks:
            if len(pending) == 2 * workers:  # rows wait in memory
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
            pending.add(pool.submit(_make_shard_in_worker, task))
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died (its own message is above; without one, memory may have run out: use fewer "
            "--workers). Finished shards are kept: run the same command again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_work: Work | None = None  # of a worker process, from its start to its end


def _start_worker(make_work: Callable[[], Work]) -> None:
    global _worker_work
    # A pool's workers do not notice that their parent was killed, and would wait for work forever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker_work = make_work()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:  # always, in a worker
        parent.join()
    os._exit(1)


def _make_shard_in_worker(task: tuple) -> tuple[int, dict]:
    if _worker_work is None:
        raise RuntimeError(
            "no work was made in this process; wanted a worker that `_start_worker` has started."
        )
    return _make_shard(_worker_work, *task)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """As in a worker: sums in another order could move a box by a pixel."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _make_shard(
    work: Work,
    partial: Path,
    features: Features,
    number: int,
    shards: int,
    first: int,
    rows: list[dict],
    on_bad_row: str,
) -> tuple[int, dict]:
    """Number and report of a shard, now on disk; with a bad row that must not be skipped it is not written."""
    shard = work(first, rows)
    report = {
        "rows": {split: len(made) for split, made in shard.rows.items()},
        "bad": [list(bad) for bad in shard.bad],
        "counts": shard.counts,
    }
    if not (shard.bad and on_bad_row == "raise"):
        for split, made in shard.rows.items():
            _write_arrow(partial / split / _data_name(number, shards), made, features)
        _write_json(_report_path(partial, number), report)
    return number, report


# ---- files


def _data_name(number: int, shards: int) -> str:
    return f"data-{number:05d}-of-{shards:05d}.arrow"


def _report_path(partial: Path, number: int) -> Path:
    return partial / REPORTS / f"{number:05d}.json"


def _write_arrow(path: Path, rows: list[dict], features: Features) -> None:
    """Rows as an Arrow stream, the form of `save_to_disk`."""
    columns = {name: [row[name] for row in rows] for name in features}
    table = Dataset.from_dict(columns, features=features).with_format("arrow")[:]
    stream = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(stream, features.arrow_schema) as writer:
        writer.write_table(table)
    write_atomically(path, memoryview(stream.getvalue()))


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def _only_run(partial: Path) -> Iterator[None]:
    lock = FileLock(partial.with_name(f".{partial.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{partial}: another run is making this dataset.") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _checked_record(folder: Path, identity: dict) -> dict:
    """The record of a dataset, finished or begun, if it is the one that is to be made."""
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder} exists and has no {RECORD}; wanted a folder that is not there yet.")
    record = json.loads(path.read_text())
    found, wanted = record["identity"], json.loads(json.dumps(identity))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder} was made with another {name}: {_short(found.get(name))}, now {_short(wanted.get(name))}; "
                "remove that folder or choose another --out."
            )
    return record


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _complete(partial: Path, recipe: Recipe, shards: int, record: dict) -> None:
    """Adds to the shards what `load_from_disk` reads."""
    names = [_data_name(number, shards) for number in range(shards)]
    for split in recipe.splits:
        info, state = _layout(recipe.features)
        state["_data_files"] = [{"filename": name} for name in names]
        state["_fingerprint"] = json_digest([record["identity"], split])[:16]
        _write_json(partial / split / DATASET_INFO_FILENAME, info)
        _write_json(partial / split / DATASET_STATE_JSON_FILENAME, state)
    if recipe.splits != ("",):
        _write_json(partial / DATASETDICT_JSON_FILENAME, {"splits": list(recipe.splits)})
    _write_json(partial / RECORD, record)


def _layout(features: Features) -> tuple[dict, dict]:
    """Contents of the two JSON files that `save_to_disk` writes for an empty dataset with these features."""
    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as folder:
            Dataset.from_dict({name: [] for name in features}, features=features).save_to_disk(folder)
            return tuple(
                json.loads(Path(folder, name).read_text())
                for name in (DATASET_INFO_FILENAME, DATASET_STATE_JSON_FILENAME)
            )
    finally:
        if not silent:
            enable_progress_bars()


# ---- digests


def json_digest(value: Any) -> str:
    """sha256 of a value as JSON, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def source_digest(source: Source) -> str:
    """sha256 over all rows. Of an image in a file it sees path, size and time of change, not the contents."""
    digest = hashlib.sha256()
    for start in range(0, len(source), DIGEST_ROWS):
        for row in source[start : start + DIGEST_ROWS]:
            digest.update(json_digest(_stamped(row)).encode())
    return digest.hexdigest()


def _stamped(value: Any) -> Any:
    """A row with every undecoded image replaced by what identifies it."""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            return _image_stamp(value)
        return {name: _stamped(item) for name, item in value.items()}
    return [_stamped(item) for item in value] if isinstance(value, list | tuple) else value


def _image_stamp(image: dict) -> list:
    if image["bytes"] is not None:
        return [hashlib.sha256(image["bytes"]).hexdigest()]
    try:
        found = os.stat(image["path"])
    except OSError:
        return [image["path"], "missing"]
    return [image["path"], found.st_size, found.st_mtime_ns]
