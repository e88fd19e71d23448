"""The disk tier: a bad disk costs time, never an answer, and the budget holds at every moment."""

import copy
import errno
import functools
import gc
import json
import logging
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from backdrop.modeling import background_folder_backdrop as module
from backdrop.modeling import folder_entry_backdrop, folder_files_backdrop, folder_speed_backdrop
from backdrop.modeling.background_folder_backdrop import BackgroundFolder

MIB = 2**20


def key_of(number: int) -> bytes:
    return bytes([number]) * 20


def value_of(number: int, num_bytes: int = 1000) -> tuple[torch.Tensor]:
    """A value that only this key can have."""
    generator = torch.Generator().manual_seed(number)
    return (torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8),)


def bits(tensors) -> list:
    """What makes tensors equal bit for bit, NaN or not."""
    return [(t.dtype, t.shape, t.contiguous().reshape(-1).view(torch.uint8).tolist()) for t in tensors]


def files_in(folder: Path) -> list[Path]:
    """Every file that the budget covers."""
    return [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".tmp")]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_in(folder))


@functools.cache
def file_size(num_bytes: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        BackgroundFolder(folder, MIB).put("tokens", key_of(0), value_of(0, num_bytes), 0.5)
        return bytes_in(Path(folder))


# ---- what goes in comes out


def test_all_dtypes_come_back_bit_for_bit_in_a_new_object(tmp_path):
    torch.manual_seed(1)
    noise = torch.randn(3, 5)
    tensors = [noise.to(dtype) for dtype in folder_entry_backdrop.DTYPE_NAMES]
    tensors += [
        torch.tensor(True),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.zeros(0, 7),
        torch.zeros(2, 0),
    ]
    tensors += [torch.tensor([float("nan"), -0.0, float("inf")]), noise.T, noise[:, ::2], noise, noise]
    tensors += [torch.randn(2, requires_grad=True)]
    assert BackgroundFolder(tmp_path, MIB).put("prefix", key_of(1), iter(tensors), 0.1)
    found = BackgroundFolder(tmp_path, MIB).get("prefix", key_of(1))
    assert bits(found.tensors) == bits(tensors) and found.compute_seconds == 0.1
    for tensor in found.tensors:  # each owns just its bytes, or a budget in memory would count wrongly
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert BackgroundFolder(tmp_path, MIB).get("tokens", key_of(1)) is None
    assert BackgroundFolder(tmp_path, MIB).get("prefix", key_of(2)) is None


def test_a_value_without_tensors_comes_back(tmp_path):
    folder = BackgroundFolder(tmp_path, MIB)
    assert folder.put("tokens", key_of(1), (), 0) and folder.get("tokens", key_of(1)).tensors == ()


def test_the_files_are_what_the_safetensors_library_reads(tmp_path):
    tensors = (torch.tensor([True]), torch.randn(2, 3), torch.arange(3, dtype=torch.int16))
    BackgroundFolder(tmp_path, MIB).put("tokens", key_of(0xAB), tensors, 2)
    path = tmp_path / "v1" / "ab" / f"tokens-{'ab' * 20}.safetensors"
    assert bits(load_file(path)[str(index)] for index in range(3)) == bits(tensors)
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    for index, tensor in enumerate(tensors):  # readers that map the file need aligned tensors
        assert (start + header[str(index)]["data_offsets"][0]) % tensor.element_size() == 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (
        metadata["version"] == "1" and metadata["key"] == "ab" * 20 and metadata["compute_seconds"] == "2.0"
    )


def test_a_value_that_was_checked_does_not_change_with_its_file(tmp_path):
    folder = BackgroundFolder(tmp_path, MIB)
    folder.put("tokens", key_of(1), value_of(1, 100_000), 1)
    found = folder.get("tokens", key_of(1))
    with open(files_in(tmp_path)[0], "r+b") as file:
        file.write(bytes(100_000))
    assert bits(found.tensors) == bits(value_of(1, 100_000))


def test_a_put_of_what_is_there_writes_nothing(tmp_path, monkeypatch):
    folder = BackgroundFolder(tmp_path, MIB)
    assert folder.put("tokens", key_of(1), value_of(1), 1)
    monkeypatch.setattr(os, "replace", None)
    assert folder.put("tokens", key_of(1), value_of(1), 1) and folder.put_soon(
        "tokens", key_of(1), value_of(1), 1
    )
    assert folder.stats()["write_failures"] == 0


def test_copies_work_on_the_same_folder(tmp_path):
    folder = BackgroundFolder(tmp_path, 12345)
    folder.put("tokens", key_of(1), value_of(1), 1)
    for other in (copy.deepcopy(folder), pickle.loads(pickle.dumps(folder))):
        assert other.max_bytes == 12345 and other.get("tokens", key_of(1)) is not None
        assert other.stats()["hits"] == 1


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = BackgroundFolder("here", MIB)
    monkeypatch.chdir("/")
    assert folder.put("tokens", key_of(1), value_of(1), 1) and files_in(tmp_path / "here")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: BackgroundFolder(path, 0), "max_bytes is 0"),
        (lambda path: BackgroundFolder(path / "file", MIB), "is a file; wanted a folder"),
        (lambda path: BackgroundFolder(path, MIB).get("../up", key_of(1)), "kind is '../up'"),
        (lambda path: BackgroundFolder(path, MIB).put("tokens", b"short", (), 1), "key has 5 bytes"),
        (lambda path: BackgroundFolder(path, MIB).prune(-1), "max_bytes is -1"),
    ],
)
def test_bad_arguments_are_named(tmp_path, call, message):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


# ---- the budget


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 3500), min_size=6, max_size=6),
    history=st.lists(st.tuples(st.sampled_from(["put", "put", "get"]), st.integers(0, 5)), max_size=30),
)
def test_any_history_keeps_the_budget_and_the_order_of_use(sizes, history):
    """Against a plain dict: what is there, what was evicted, and the bytes on the disk, after every step."""
    budget = 4000
    model: OrderedDict[int, int] = OrderedDict()
    with tempfile.TemporaryDirectory() as path:
        folder = BackgroundFolder(path, budget)
        for step, number in history:
            size, value = file_size(sizes[number]), value_of(number, sizes[number])
            if number in model:
                model.move_to_end(number)
            if step == "get":
                found = folder.get("tokens", key_of(number))
                assert (found is not None) == (number in model)
                assert found is None or bits(found.tensors) == bits(value)
            else:
                assert folder.put("tokens", key_of(number), value, 0.5) == (size <= budget)
                if size <= budget and number not in model:
                    while sum(model.values()) + size > budget:
                        model.popitem(last=False)
                    model[number] = size
            names = {f"tokens-{key_of(kept).hex()}.safetensors" for kept in model}
            assert {file.name for file in files_in(Path(path))} == names
            assert bytes_in(Path(path)) == sum(model.values()) == folder.stats()["bytes"]


def test_room_is_made_before_writing(tmp_path, monkeypatch):
    """At its fullest, with the temporary file complete, the folder is within the budget."""
    folder = BackgroundFolder(tmp_path, 2 * file_size(1000))
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (seen.append(bytes_in(tmp_path)), replace(*paths)))
    for number in range(4):
        assert folder.put("tokens", key_of(number), value_of(number), 0.5)
    assert seen == [file_size(1000)] + 3 * [2 * file_size(1000)]
    assert folder.stats()["evictions"] == 2


def test_a_value_larger_than_the_budget_evicts_nothing(tmp_path):
    folder = BackgroundFolder(tmp_path, 2 * file_size(1000))
    folder.put("tokens", key_of(1), value_of(1), 0.5)
    for put in (folder.put, folder.put_soon):
        assert not put("tokens", key_of(2), value_of(2, 5000), 0.5)
    stats = folder.stats()
    assert stats["too_large"] == 2 and stats["entries"] == 1 and stats["write_failures"] == 0
    exact = BackgroundFolder(tmp_path / "exact", file_size(1000))
    assert exact.put("tokens", key_of(1), value_of(1), 0.5)


def test_prune_evicts_the_least_recently_used_and_orphans(tmp_path):
    folder = BackgroundFolder(tmp_path, MIB)
    for number in range(4):
        folder.put("tokens", key_of(number), value_of(number), 0.5)
    folder.get("tokens", key_of(0))
    (tmp_path / "v1" / "00" / "orphan.tmp").write_bytes(bytes(77))
    (tmp_path / "v1" / "orphan.tmp").write_bytes(bytes(23))
    assert folder.stats()["bytes"] == 4 * file_size(1000) + 100
    assert folder.prune() == 100 and folder.stats()["entries"] == 4
    assert folder.prune(2 * file_size(1000) + 1) == 2 * file_size(1000)
    assert [folder.get("tokens", key_of(number)) is not None for number in range(4)] == [
        True,
        False,
        False,
        True,
    ]
    assert BackgroundFolder(tmp_path, file_size(1000)).prune() == file_size(1000)
    assert folder.prune(0) == file_size(1000) and not files_in(tmp_path)


def test_other_versions_and_other_files_are_left_alone(tmp_path):
    others = [tmp_path / "v2" / "00" / "tokens-00.safetensors", tmp_path / "v1" / "00" / "notes.txt"]
    for other in others:
        other.parent.mkdir(parents=True)
        other.write_bytes(bytes(5000))
    folder = BackgroundFolder(tmp_path, 2000)
    assert folder.put("tokens", key_of(0), value_of(0), 1)
    folder.prune(0)
    folder.clear()
    assert folder.stats()["bytes"] == 0 and folder.verify() == []
    assert all(other.exists() for other in others)


# ---- damage


@pytest.fixture
def entry(tmp_path) -> tuple[BackgroundFolder, Path, bytes, list]:
    """A folder with one small entry: the folder, the file, its content, its value's bits."""
    folder = BackgroundFolder(tmp_path, MIB)
    tensors = (
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8),
    )
    folder.put("prefix", key_of(7), tensors, 0.25)
    (path,) = files_in(tmp_path)
    return folder, path, path.read_bytes(), bits(tensors)


def test_an_entry_cut_short_anywhere_is_refused(entry, caplog):
    folder, path, content, _ = entry
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert folder.get("prefix", key_of(7)) is None and not path.exists(), length
    path.write_bytes(content + b"\0")
    assert folder.get("prefix", key_of(7)) is None
    stats = folder.stats()
    assert stats["corrupt"] == stats["misses"] == len(content) + 1
    assert all(record.levelno == logging.WARNING and str(path) in record.message for record in caplog.records)
    assert len(caplog.records) == len(content) + 1


def test_no_flipped_bit_or_byte_gives_a_wrong_value(entry):
    folder, path, content, value = entry
    masks = [1 << bit for bit in range(8)] + [0xFF]
    accepted = 0
    for position in range(len(content)):
        for mask in masks:
            damaged = bytearray(content)
            damaged[position] ^= mask
            path.write_bytes(damaged)
            found = folder.get("prefix", key_of(7))
            if found is not None:  # only where the byte means nothing
                assert bits(found.tensors) == value and found.compute_seconds == 0.25
                accepted += 1
    padding = content[: 8 + struct.unpack("<Q", content[:8])[0]]
    assert accepted <= len(masks) * (len(padding) - len(padding.rstrip()))
    path.write_bytes(content)
    assert bits(folder.get("prefix", key_of(7)).tensors) == value


def test_headers_that_lie_are_refused(entry):
    folder, path, content, _ = entry
    size = 8 + struct.unpack("<Q", content[:8])[0]
    good = json.loads(content[8:size])
    lies = [
        [],
        {},
        {**good, "__metadata__": {}},
        {**good, "0": {**good["0"], "shape": [2**62, 2**62]}},
        {**good, "0": {**good["0"], "shape": [-1, -2]}},
        {**good, "0": {**good["0"], "dtype": "F99"}},
        {**good, "0": {**good["0"], "data_offsets": [0, 2**62]}},
        {**good, "0": good["1"]},
        {**good, "1": good["0"]},
        {"__metadata__": good["__metadata__"]},
        {**good, "__metadata__": {**good["__metadata__"], "version": "2"}},
        {**good, "__metadata__": {**good["__metadata__"], "compute_seconds": "0.75"}},
    ]
    for number, lie in enumerate(lies):
        text = json.dumps(lie).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[size:])
        assert folder.get("prefix", key_of(7)) is None, lie
        assert folder.stats()["corrupt"] == number + 1 and not path.exists()
    for length in (2**63, 2**64 - 1, len(content)):
        path.write_bytes(struct.pack("<Q", length) + content[8:])
        assert folder.get("prefix", key_of(7)) is None
    nested = b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(nested)) + nested)
    assert folder.get("prefix", key_of(7)) is None


def test_an_entry_under_another_name_is_refused(entry):
    folder, path, content, _ = entry
    other = folder.path_of("prefix", key_of(8))
    for target, name in (
        (other, ("prefix", key_of(8))),
        (folder.path_of("tokens", key_of(7)), ("tokens", key_of(7))),
    ):
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
        assert folder.get(*name) is None and not target.exists()
    assert folder.get("prefix", key_of(7)) is not None


def test_a_file_beyond_the_budget_is_not_read(entry, monkeypatch):
    folder, path, content, _ = entry
    monkeypatch.setattr(json, "loads", None)
    small = BackgroundFolder(folder.folder, len(content) - 1)
    assert "wanted at most the budget's" in small.verify()[0]


def test_verify_names_bad_entries_and_keeps_them(entry):
    folder, path, content, _ = entry
    folder.put("tokens", key_of(9), value_of(9), 1)
    assert folder.verify() == []
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    stray = path.with_name("stray.safetensors")
    misplaced = path.parent.parent / "09" / path.name
    for copied in (stray, misplaced):
        copied.write_bytes(content)
    lines = folder.verify()
    assert lines == [
        f"v1/07/{path.name}: the checksum differs from the content's",
        "v1/07/stray.safetensors: the name is not that of an entry in its place",
        f"v1/09/{path.name}: the name is not that of an entry in its place",
    ]
    assert path.exists() and folder.stats()["corrupt"] == 0


def test_a_dropped_entry_can_be_stored_again(entry):
    folder, path, content, value = entry
    path.write_bytes(content[:-1])
    assert folder.get("prefix", key_of(7)) is None
    assert folder.put("prefix", key_of(7), (torch.ones(2),), 1)
    assert bits(folder.get("prefix", key_of(7)).tensors) == bits([torch.ones(2)])


@pytest.mark.parametrize("where", ["memory", "files"])
def test_a_shortage_in_the_process_drops_no_entry(entry, monkeypatch, where):
    folder, path, _, value = entry

    def fail(*args, **kwargs):
        raise (
            RuntimeError("can't allocate memory")
            if where == "memory"
            else OSError(errno.EMFILE, "too many files")
        )

    with monkeypatch.context() as patch:
        if where == "memory":
            patch.setattr(torch, "empty", fail)
        else:
            patch.setattr(folder_entry_backdrop, "open", fail, raising=False)
        assert folder.get("prefix", key_of(7)) is None
    assert folder.stats()["corrupt"] == 0 and bits(folder.get("prefix", key_of(7)).tensors) == value


# ---- disks that do not take what they are given


class FullFile:
    """An open file on a disk that takes half of what it is given."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        self.file.write(bytes(content)[: len(content) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["open", "write", "fsync", "replace"])
def test_a_full_disk_costs_the_entry_and_leaves_nothing(tmp_path, monkeypatch, where):
    folder = BackgroundFolder(tmp_path, MIB)
    folder.put("tokens", key_of(1), value_of(1), 1)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path, mode):
        if mode == "rb":
            return open(path, mode)
        return fail() if where == "open" else FullFile(open(path, mode))

    with monkeypatch.context() as patch:
        if where in ("open", "write"):
            patch.setattr(folder_files_backdrop, "open", opened, raising=False)
        else:
            patch.setattr(os, where, fail)
        assert not folder.put("tokens", key_of(2), value_of(2), 1)
        assert folder.put_soon("tokens", key_of(3), value_of(3), 1) and folder.flush(10)
        assert folder.get("tokens", key_of(3)) is None
        assert bits(folder.get("tokens", key_of(1)).tensors) == bits(value_of(1))
    assert folder.stats()["write_failures"] == 2 and len(files_in(tmp_path)) == 1
    assert folder.put("tokens", key_of(2), value_of(2), 1)


def test_a_read_only_folder_is_read_and_reported_once(tmp_path, monkeypatch, caplog):
    """Root may write anywhere, so what a read-only folder refuses is refused here by hand."""
    BackgroundFolder(tmp_path, MIB).put("tokens", key_of(1), value_of(1), 1)
    (damaged,) = files_in(tmp_path)
    content = damaged.read_bytes()

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("utime", "replace", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(os, "access", lambda *args: False)
    monkeypatch.setattr(folder_files_backdrop, "FileLock", refuse)
    for _ in range(2):
        folder = BackgroundFolder(tmp_path, MIB)
    assert sum("backgrounds are only read there" in record.message for record in caplog.records) == 1
    assert bits(folder.get("tokens", key_of(1)).tensors) == bits(value_of(1))
    assert folder.put("tokens", key_of(1), value_of(1), 1)  # it is there
    assert not folder.put("tokens", key_of(2), value_of(2), 1)
    assert folder.put_soon("tokens", key_of(2), value_of(2), 1) and folder.flush(10)
    assert folder.stats()["write_failures"] == 2
    assert folder.seconds_to_load(2000) > folder.seconds_to_load(1000) > 0
    with pytest.raises(PermissionError):
        folder.clear()
    damaged.write_bytes(content[:-1])
    assert folder.get("tokens", key_of(1)) is None and folder.get("tokens", key_of(1)) is None


def test_a_folder_that_cannot_be_made_is_an_empty_one(tmp_path, caplog):
    (tmp_path / "file").touch()
    folder = BackgroundFolder(tmp_path / "file" / "under", MIB)
    assert "cannot be written (Not a directory)" in caplog.text
    assert folder.get("tokens", key_of(1)) is None and not folder.put("tokens", key_of(1), value_of(1), 1)
    assert folder.seconds_to_load(1) > 0 and folder.verify() == []
    folder.clear()
    stats = folder.stats()
    assert stats["entries"] == 0 and stats["write_failures"] == 1 and stats["misses"] == 1
    with pytest.raises(OSError):
        folder.prune()


def test_a_folder_removed_meanwhile_is_made_again(tmp_path):
    folder = BackgroundFolder(tmp_path / "cache", MIB)
    folder.files.root.rmdir()
    assert folder.get("tokens", key_of(1)) is None and folder.stats()["entries"] == 0
    assert folder.put("tokens", key_of(1), value_of(1), 1) and folder.get("tokens", key_of(1)) is not None


def test_files_that_vanish_under_the_scan_are_no_error(tmp_path, monkeypatch):
    """Another process evicts between this one's listing and its own eviction."""
    folder = BackgroundFolder(tmp_path, 2 * file_size(1000))
    for number in range(2):
        folder.put("tokens", key_of(number), value_of(number), 0.5)
    scan = folder.files.scan

    def stale():
        entries, temporaries = scan()
        for file in entries[:1]:
            file.path.unlink()
        return entries, temporaries

    monkeypatch.setattr(folder.files, "scan", stale)
    assert folder.put("tokens", key_of(3), value_of(3), 0.5)
    assert len(folder.verify()) == 0


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [(torch.zeros(2, dtype=torch.complex64), "complex64"), (torch.zeros(2, device="meta"), "meta")],
)
def test_tensors_that_cannot_be_written_are_not_stored(tmp_path, caplog, tensor, reason):
    """A meta tensor fails at the copy to the CPU, as one does that finds no memory there."""
    folder = BackgroundFolder(tmp_path, MIB)
    assert not folder.put("tokens", key_of(1), (tensor,), 1)
    assert not folder.put_soon("tokens", key_of(1), (tensor,), 1)
    assert folder.stats()["write_failures"] == 2 and folder.stats()["pending_bytes"] == 0
    assert folder.flush(0) and reason in caplog.text


# ---- writing later


@pytest.fixture
def gate(monkeypatch):
    """Holds every write before its last step until it is set; `reached` tells that one waits."""
    replace, opened = os.replace, threading.Event()
    opened.reached = threading.Event()

    def wait(*paths):
        opened.reached.set()
        assert opened.wait(10)
        replace(*paths)

    monkeypatch.setattr(os, "replace", wait)
    yield opened
    opened.set()


def test_put_soon_writes_within_its_bound(tmp_path, gate):
    folder = BackgroundFolder(tmp_path, MIB)
    folder.writer.max_pending_bytes = 2 * file_size(1000)
    assert folder.put_soon("tokens", key_of(1), value_of(1), 0.5)
    assert gate.reached.wait(10)
    assert folder.put_soon("tokens", key_of(2), value_of(2), 0.5)
    assert folder.put_soon("tokens", key_of(2), value_of(2), 0.5)  # waits already, and counts once
    assert folder.put_soon("tokens", key_of(1), value_of(1), 0.5)  # is being written
    assert folder.stats()["pending_bytes"] == 2 * file_size(1000)
    assert not folder.put_soon("tokens", key_of(3), value_of(3, 0), 0.5)
    assert folder.stats()["skipped_busy"] == 1
    assert not folder.flush(0.01)
    gate.set()
    assert folder.flush() and folder.stats()["pending_bytes"] == 0
    assert [folder.get("tokens", key_of(number)) is not None for number in (1, 2, 3)] == [True, True, False]
    # The keys and values of one long prefix alone may be more than the bound.
    assert folder.put_soon("tokens", key_of(4), value_of(4, 9000), 0.5) and folder.flush(10)
    assert bits(folder.get("tokens", key_of(4)).tensors) == bits(value_of(4, 9000))


def test_the_default_bound_is_never_more_than_the_budget(tmp_path):
    assert BackgroundFolder(tmp_path, 1000).writer.max_pending_bytes == 1000
    assert BackgroundFolder(tmp_path, 2**40).writer.max_pending_bytes == 256 * MIB


@pytest.mark.parametrize(
    ("where", "stage"), [(module, "encode_entry"), (folder_files_backdrop, "write_through")]
)
def test_clear_reaches_writes_that_wait_and_one_under_way(tmp_path, monkeypatch, where, stage):
    """One under way may hold the lock already, or not yet."""
    folder = BackgroundFolder(tmp_path, MIB)
    original, gate, reached = getattr(where, stage), threading.Event(), threading.Event()

    def wait(*arguments):
        reached.set()
        assert gate.wait(10)
        return original(*arguments)

    monkeypatch.setattr(where, stage, wait)
    for number in range(3):
        assert folder.put_soon("tokens", key_of(number), value_of(number), 1)
    assert reached.wait(10)
    clearing = threading.Thread(target=folder.clear)
    clearing.start()
    time.sleep(0.05)
    assert clearing.is_alive()
    gate.set()
    clearing.join(10)
    assert folder.flush(10) and not files_in(tmp_path) and folder.stats()["pending_bytes"] == 0
    assert folder.put_soon("tokens", key_of(1), value_of(1), 1) and folder.flush(10)
    assert folder.get("tokens", key_of(1)) is not None


def test_an_error_nobody_thought_of_does_not_stop_the_writer(tmp_path, monkeypatch):
    folder = BackgroundFolder(tmp_path, MIB)
    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_entry", None)
        assert folder.put_soon("tokens", key_of(1), value_of(1), 1) and folder.flush(10)
    assert folder.stats()["write_failures"] == 1
    assert folder.put_soon("tokens", key_of(1), value_of(1), 1) and folder.flush(10)
    assert folder.get("tokens", key_of(1)) is not None


def test_an_idle_folder_can_be_collected(tmp_path):
    folder = BackgroundFolder(tmp_path, MIB)
    assert folder.put_soon("tokens", key_of(1), value_of(1), 1) and folder.flush(10)
    reference = weakref.ref(folder)
    del folder
    deadline = time.monotonic() + 5
    while reference() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert reference() is None


# ---- threads and processes


def test_threads_never_see_a_wrong_value(tmp_path):
    folder = BackgroundFolder(tmp_path, 5 * file_size(1000))
    values = {number: value_of(number) for number in range(8)}
    expected = {number: bits(value) for number, value in values.items()}
    failures, hits = [], []

    def work(seed: int):
        choice = random.Random(seed)
        try:
            for _ in range(25):
                number = choice.randrange(8)
                step = choice.choices(["get", "put", "put_soon", "clear", "stats"], [8, 4, 2, 0.3, 1])[0]
                if step == "get":
                    found = folder.get("tokens", key_of(number))
                    if found is not None:
                        hits.append(number)
                        assert bits(found.tensors) == expected[number]
                elif step in ("put", "put_soon"):
                    getattr(folder, step)("tokens", key_of(number), values[number], 0.5)
                elif step == "clear":
                    folder.clear()
                else:
                    assert folder.stats()["bytes"] >= 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert folder.flush(10) and not failures and hits
    stats = folder.stats()
    assert stats["corrupt"] == stats["write_failures"] == 0 and stats["pending_bytes"] == 0
    assert stats["bytes"] == bytes_in(tmp_path) <= folder.max_bytes and folder.verify() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_wait_for_its_parents_threads(tmp_path, gate):
    folder = BackgroundFolder(tmp_path, MIB)
    gate.set()
    value = value_of(1)
    with folder.files.thread_lock, folder.writer.state:
        folder.writer.pending_bytes = 1
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(20)
                code = 0 if folder.flush(0) and folder.put("tokens", key_of(1), value, 1) else 2
            finally:
                os._exit(code)
        folder.writer.pending_bytes = 0
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert folder.get("tokens", key_of(1)) is not None


# Loads the file and its siblings without their package, which would import transformers' models.
PREAMBLE = """
import importlib, os, random, sys, time, types
from pathlib import Path
package = types.ModuleType("package")
package.__path__ = [str(Path(sys.argv[1]).parent)]
sys.modules["package"] = package
module = importlib.import_module("package." + Path(sys.argv[1]).stem)
import torch
"""


def start(script: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", PREAMBLE + script, module.__file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


HANG = """
def replace(*paths):
    print("ready", flush=True)
    time.sleep(60)
folder = module.BackgroundFolder(sys.argv[2], 2**20)
os.replace = replace
folder.put("tokens", bytes([2]) * 20, (torch.ones(1000),), 1)
"""


def test_a_writer_that_hangs_holds_nobody_and_one_that_is_killed_leaves_nothing(tmp_path, monkeypatch):
    folder = BackgroundFolder(tmp_path, MIB)
    folder.put("tokens", key_of(1), value_of(1), 1)
    writer = start(HANG, tmp_path)
    try:
        assert writer.stdout.readline() == "ready\n"
        monkeypatch.setattr(folder_files_backdrop, "LOCK_TIMEOUT", 0.2)
        began = time.monotonic()
        assert not folder.put("tokens", key_of(3), value_of(3), 1)
        assert 0.2 <= time.monotonic() - began < 2
        assert folder.stats()["write_failures"] == 1
        assert folder.get("tokens", key_of(1)) is not None  # readers take no lock
        with pytest.raises(TimeoutError):
            folder.prune()
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    assert folder.get("tokens", key_of(2)) is None and folder.stats()["corrupt"] == 0
    (orphan,) = [path for path in files_in(tmp_path) if path.suffix == ".tmp"]
    assert folder.stats()["bytes"] == bytes_in(tmp_path) > 4000 and folder.stats()["entries"] == 1
    assert folder.put("tokens", key_of(2), value_of(2), 1)
    assert not orphan.exists() and len(files_in(tmp_path)) == 2 and folder.verify() == []


WRITE = """
seed, budget = int(sys.argv[3]), int(sys.argv[4])
choice = random.Random(seed)
folder = module.BackgroundFolder(sys.argv[2], budget)
print("ready", flush=True)
while not os.path.exists(os.path.join(sys.argv[2], "go")):
    time.sleep(0.001)
for _ in range(150):
    number = choice.randrange(30)
    value = (torch.full((500 + 250 * number,), number, dtype=torch.uint8),)
    found = folder.get("tokens", bytes([number]) * 20)
    assert found is None or torch.equal(found.tensors[0], value[0])
    assert found is not None or folder.put("tokens", bytes([number]) * 20, value, 1)
assert folder.stats()["corrupt"] == 0
open(os.path.join(sys.argv[2], f"done-{seed}"), "w").close()
while not os.path.exists(os.path.join(sys.argv[2], f"done-{3 - seed}")):
    time.sleep(0.001)
# Nobody waits for this one: the end of the process does.
assert folder.put_soon("prefix", bytes([seed]) * 20, value, 1)
"""


def test_two_writing_processes_share_one_budget(tmp_path):
    budget = 20_000
    totals, done = [], threading.Event()

    def listing() -> dict:
        found = {}
        for path in files_in(tmp_path):
            try:
                stat = path.stat()
            except FileNotFoundError:
                return {}
            found[path] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return found

    def sample():
        # Files that two listings in a row show alike were all there at once, between the two.
        while not done.is_set():
            first = listing()
            if first and first == listing():
                totals.append(sum(size for _, size, _ in first.values()))

    writers = [start(WRITE, tmp_path, seed, budget) for seed in (1, 2)]
    sampler = threading.Thread(target=sample)
    try:
        assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
        sampler.start()
        (tmp_path / "go").touch()
        assert [writer.wait(60) for writer in writers] == [0, 0]
    finally:
        done.set()
        for writer in writers:
            writer.kill()
            writer.stdout.close()
        sampler.join()
    assert len(totals) > 20 and max(totals) > budget / 2
    assert max(totals) <= budget and bytes_in(tmp_path) <= budget
    folder = BackgroundFolder(tmp_path, budget)
    assert folder.verify() == [] and not [path for path in files_in(tmp_path) if path.suffix == ".tmp"]
    assert all(folder.get("prefix", key_of(seed)) is not None for seed in (1, 2))


# ---- how long a load takes


def test_the_speed_is_measured_once_per_machine(tmp_path, monkeypatch):
    budget = 2 * MIB
    folder = BackgroundFolder(tmp_path, budget)
    folder.put("tokens", key_of(1), value_of(1), 1)
    largest = []
    read_entry = folder_speed_backdrop.read_entry
    monkeypatch.setattr(
        folder_speed_backdrop,
        "read_entry",
        lambda *args: (largest.append(bytes_in(tmp_path)), read_entry(*args))[1],
    )
    state = torch.get_rng_state()
    one, two = folder.seconds_to_load(MIB), folder.seconds_to_load(100 * MIB)
    assert 0 < one < two < 1000
    assert len(largest) == 2 and MIB <= max(largest) <= budget
    assert torch.equal(torch.get_rng_state(), state)
    assert len(files_in(tmp_path)) == 1 and folder.stats()["evictions"] == 0
    other = BackgroundFolder(tmp_path, budget)
    assert other.seconds_to_load(MIB) == one and other.seconds_to_load(100 * MIB) == two
    assert len(largest) == 2
    folder.clear()  # the machine stays what it is
    assert BackgroundFolder(tmp_path, budget).seconds_to_load(MIB) == one and len(largest) == 2
    monkeypatch.setattr(folder_speed_backdrop.platform, "node", lambda: "another")
    assert BackgroundFolder(tmp_path, budget).seconds_to_load(MIB) > 0 and len(largest) == 4
    for machine in tmp_path.glob("v1/machine-*.json"):
        machine.write_text('{"bytes_per_second": 0, "latency_s": 1}')
    assert BackgroundFolder(tmp_path, budget).seconds_to_load(MIB) > 0 and len(largest) == 6


def test_a_folder_without_room_evicts_nothing_to_measure(tmp_path):
    folder = BackgroundFolder(tmp_path, 100_000)
    for number in range(9):
        folder.put("tokens", key_of(number), value_of(number, 10_000), 1)
    assert folder.seconds_to_load(2000) > folder.seconds_to_load(1000) > 0
    assert folder.stats()["entries"] == 9 and not list(tmp_path.glob("v1/machine-*"))


def test_a_disk_that_lies_gives_a_guess(tmp_path, monkeypatch):
    folder = BackgroundFolder(tmp_path, MIB)
    monkeypatch.setattr(folder_entry_backdrop, "checksum_of", lambda *args: str(time.perf_counter_ns()))
    assert folder.seconds_to_load(1000) > 0 and not files_in(tmp_path)
