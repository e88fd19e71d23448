"""The background folder: the budget holds at every moment, and a bad disk costs time, never an answer."""

import copy
import errno
import os
import pickle
import tempfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from folder_values import MIB, bits, bytes_in, file_size, files_in, key_of, value_of
from hypothesis import given, settings
from hypothesis import strategies as st

from backdrop.modeling import folder_files_backdrop
from backdrop.modeling.background_folder_backdrop import BackgroundFolder


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
