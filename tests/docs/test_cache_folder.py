"""The page about the cache folder's format says what is written."""

import json
import struct

import torch
from paths import ROOT

from backdrop.modeling.background_folder_backdrop import BackgroundFolder

PAGE = (ROOT / "docs" / "reference" / "cache-folder.md").read_text(encoding="utf-8")
KEY = bytes(range(20))


def test_an_entry_is_where_and_what_the_page_says(tmp_path):
    folder = BackgroundFolder(tmp_path, 2**20)
    tensors = (torch.zeros(2, 3), torch.ones(4, dtype=torch.float16))
    assert folder.put("prefix", KEY, tensors, 1.5)
    folder.seconds_to_load(1)

    entry = tmp_path / "v1" / KEY.hex()[:2] / f"prefix-{KEY.hex()}.safetensors"
    data = entry.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert set(header) == {"0", "1"}
    assert metadata["version"] == "1" and metadata["kind"] == "prefix" and metadata["key"] == KEY.hex()
    assert len(metadata["checksum"]) == 64
    assert set(metadata) == {"version", "kind", "key", "compute_seconds", "checksum"}
    for name in metadata:
        assert f"`{name}`" in PAGE
    (machine,) = (tmp_path / "v1").glob("machine-*.json")
    assert len(machine.stem) == len("machine-") + 16


def test_the_page_names_the_parts_of_the_folder():
    for part in ("v1/", ".lock", "machine-<16 hex>.json", "tokens-", "prefix-", "*.tmp", "20 bytes"):
        assert part in PAGE
