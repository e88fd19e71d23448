"""Options of the background cache and of captured reuse: sizes as text, and one line for a wrong type."""

import os

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_inputs import batch

from backdrop.modeling.background_folder_backdrop import BackgroundFolder
from backdrop.modeling.cache_options_backdrop import byte_count

SIZES = {
    "2GB": 2 * 10**9,
    "512MiB": 512 * 2**20,
    "1.5 GB": 1_500_000_000,
    "1.5GiB": 3 * 2**29,
    "100": 100,
    " 7 kb ": 7000,
    "7KiB": 7168,
    ".5 mb": 500_000,
    "3 TB": 3 * 10**12,
    "12B": 12,
}
NO_SIZES = [
    "",
    "2 G",
    "GB",
    "2GB!",
    "-1GB",
    "1e9",
    "two",
    "1,5 GB",
    "nan",
    None,
    True,
    float("nan"),
    float("inf"),
    [1],
    -1,
]


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes_are_taken_as_text(text, size, tmp_path):
    model = tiny.backdrop_model()
    cache = model.enable_background_cache(text, host_max_bytes=text, folder=tmp_path, folder_max_bytes=text)
    assert cache.max_bytes == cache.host_tier.max_bytes == cache.folder.max_bytes == size
    assert model.compile_reuse(max_bytes=text, capture=False).options["max_bytes"] == size


@given(st.integers(0, 10**15), st.sampled_from(["", "B", "kB", "KiB", "MB", "MiB", "GB", "GiB", "TB", "TiB"]))
def test_whole_numbers_of_any_unit_are_exact(number, unit):
    power = {"": 0, "B": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}["B" if unit in ("", "B") else unit[0]]
    assert byte_count("n", f"{number} {unit}") == number * (1024 if "i" in unit else 1000) ** power
    assert byte_count("n", number) == byte_count("n", float(number)) == number


@pytest.mark.parametrize("value", NO_SIZES, ids=repr)
@pytest.mark.parametrize("name", ["max_bytes", "host_max_bytes", "folder_max_bytes"])
def test_what_is_no_size_is_named(name, value, tmp_path):
    model = tiny.backdrop_model()
    with pytest.raises(ValueError) as error:
        model.enable_background_cache(**{"folder": tmp_path / "f", name: value})
    assert str(error.value).startswith(f"{name} is {value!r}; wanted ") and "\n" not in str(error.value)
    assert model.background_cache is None and not (tmp_path / "f").exists()


@pytest.mark.parametrize("folder", ["", 3, b"", ["a"], True], ids=repr)
def test_what_is_no_folder_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder is .*; wanted the path of a folder, or None"):
        tiny.backdrop_model().enable_background_cache(folder=folder)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("value", ["yes", 1, None], ids=repr)
def test_what_is_no_flag_is_named(value):
    model = tiny.backdrop_model()
    with pytest.raises(ValueError, match=f"prefixes is {value!r}; wanted True or False"):
        model.enable_background_cache(prefixes=value)
    with pytest.raises(ValueError, match=f"capture is {value!r}; wanted True or False"):
        model.compile_reuse(capture=value)


@pytest.mark.parametrize("name", ["bucket", "max_graphs", "max_batch"])
@pytest.mark.parametrize("value", ["8", 0, 1.5, True, None], ids=repr)
def test_what_is_no_whole_number_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; wanted a whole number, 1 or more"):
        tiny.backdrop_model().compile_reuse(**{name: value})


def test_a_folder_is_pruned_to_a_size_as_text(tmp_path):
    folder = BackgroundFolder(tmp_path, "1MB")
    folder.put("tokens", b"a" * 20, (torch.zeros(100),), 1.0)
    assert folder.prune("1 kB") == 0 and folder.prune("0B") > 0
    with pytest.raises(ValueError, match="max_bytes is 'all'; wanted 0 or more bytes"):
        folder.prune("all")


@pytest.mark.parametrize("cached", [False, True])
def test_no_groups_at_all_are_named(cached):
    model = tiny.backdrop_model()
    if cached:
        model.enable_background_cache("1MB")
    inputs = {"input_ids": torch.tensor([[1, 3, 4]]), "pixel_values": batch(model)["pixel_values"][:0]}
    for call in (model.generate, model.prepare_prefill, model.forward):
        with pytest.raises(ValueError, match="pixel_values has 0 groups; wanted at least one"):
            call(**inputs)
