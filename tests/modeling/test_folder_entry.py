"""An entry of a background folder: what goes in comes out bit for bit, and no damage gives a wrong value."""

import errno
import json
import logging
import struct
from pathlib import Path

import pytest
import torch
from folder_values import MIB, bits, files_in, key_of, value_of
from safetensors import safe_open
from safetensors.torch import load_file

from backdrop.modeling import folder_entry_backdrop
from backdrop.modeling.background_folder_backdrop import BackgroundFolder


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
