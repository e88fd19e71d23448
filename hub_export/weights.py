"""Files and tensors of a checkpoint, in a folder or on the Hub, read without running what they hold."""

import contextlib
import json
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file, logging

from backdrop.modeling.strict_loading_backdrop import counted_names

# Buffers that older versions of transformers saved, and newer ones compute.
COMPUTED = re.compile(r"(position_ids|rotary_emb\.inv_freq|\.masked_bias)$")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def find_file(source: str | Path, name: str, hub_kwargs: Mapping[str, Any]) -> Path | None:
    """A file of a folder, or of a repository on the Hub or in its cache; None where it has none of that name."""
    found = cached_file(
        str(source),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_kwargs,
    )
    return None if found is None else Path(found)


def of_other_repositories(hub_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Options for the repositories that a checkpoint names: a revision is the checkpoint's own."""
    return {name: value for name, value in hub_kwargs.items() if name != "revision"}


def read_json(source: str | Path, name: str, hub_kwargs: Mapping[str, Any]) -> dict | None:
    """A JSON file of a checkpoint, None where there is none."""
    path = find_file(source, name, hub_kwargs)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a `.bin` file, mapped into memory where its format allows; nothing that it says is executed.

    Raises:
        ValueError: the file holds anything but tensors by name.
    """
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: not a zip file
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"{path.name} holds more than tensors, or is damaged; wanted what torch.load(weights_only=True) reads."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path.name} holds no tensors by name; wanted a state dict.")
    return found


def read_tensors(
    source: str | Path, pattern: str, hub_kwargs: Mapping[str, Any], files: Iterable[str] = WEIGHT_FILES
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose whole name matches a regular expression.

    Args:
        source: folder or Hub id.
        pattern: over the names in the files.
        hub_kwargs: `revision`, `token`, ...
        files: names of weight files, the first that is there counts; each may be in shards with an index.

    Raises:
        ValueError: there is none of these files.
    """
    wanted = re.compile(pattern)
    for name in files:
        index = read_json(source, f"{name}.index.json", hub_kwargs)
        if index is not None:
            shards = sorted({shard for key, shard in index["weight_map"].items() if wanted.fullmatch(key)})
        elif find_file(source, name, hub_kwargs) is not None:
            shards = [name]
        else:
            continue
        found: dict[str, torch.Tensor] = {}
        for shard in shards:
            path = find_file(source, shard, hub_kwargs)
            if path is None:
                raise ValueError(f"{str(source)!r} holds no {shard}, which its index names.")
            found |= _matching(path, wanted)
        return found
    raise ValueError(f"{str(source)!r} holds no weights; wanted one of {', '.join(files)}.")


def _matching(path: Path, wanted: re.Pattern) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted.fullmatch(name)}  # noqa: SIM118
    return {name: value for name, value in read_pickled(path).items() if wanted.fullmatch(name)}


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps transformers from listing names that are missing or left over: here every one of them is checked."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_names(what: str, missing: Iterable[str], left_over: Iterable[str]) -> None:
    """Refuses a checkpoint whose weights are not exactly those of the model.

    Raises:
        ValueError: names what is missing and what is left over.
    """
    problems = []
    for title, names in (("missing", missing), ("left over", left_over)):
        names = sorted(name for name in names if not COMPUTED.search(name))
        if names:
            problems.append(counted_names(title, names))
    if problems:
        raise ValueError(
            f"The weights of {what} do not fit: {'; '.join(problems)}. No weight is ever left at random silently."
        )
