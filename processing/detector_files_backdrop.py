"""A detector as two files: its weights (`detector.safetensors`) and a description (`detector.json`).

No pickle is read or written here, and no ultralytics is needed. Both files say what the weights' licence is: AGPL-3.0 for
everything made with ultralytics, that of their checkpoint for detectors of transformers.
"""

import json
import os
import re
import threading
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

WEIGHTS_NAME = "detector.safetensors"
DESCRIPTION_NAME = "detector.json"
DETECTOR_FILES = (WEIGHTS_NAME, DESCRIPTION_NAME)
# Prefix of each tensor's name in the file: loaders that read every *.safetensors of a folder, such as vLLM's,
# can tell the detector's tensors from the model's.
KEY_PREFIX = "detector."
DETECTOR_LICENSE = "AGPL-3.0 (made with ultralytics, https://ultralytics.com/license)"

# A description's `kind`; those of ultralytics' models, which were the first, have none.
TRANSFORMERS = "transformers"
_TRANSFORMERS_FIELDS = {"source": str, "license": str, "names": list, "config": dict, "image_processor": dict}
_ULTRALYTICS_FIELDS = {
    "source": str,
    "ultralytics": str,
    "task": str,
    "stride": int,
    "names": list,
    "architecture": dict,
    "activations": dict,
    "probe": dict,
}


def read_detector(folder: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor]]:
    """Description and weights of a saved detector.

    Args:
        folder: Holds `detector.safetensors` and `detector.json`.

    Returns:
        The description, and the weights by name (without `KEY_PREFIX`), on the CPU, as stored.

    Raises:
        FileNotFoundError: If one of the two files is not there.
        ValueError: If one of them is damaged, or the description could run code.
    """
    weights_file, description_file = (Path(folder) / name for name in DETECTOR_FILES)
    for path in (weights_file, description_file):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there; wanted a folder that holds {WEIGHTS_NAME} and {DESCRIPTION_NAME}"
            )
    try:
        description = _checked_description(json.loads(description_file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{description_file} is not a detector's description: {type(error).__name__}: {error}"
        ) from error
    try:
        weights = safetensors.torch.load_file(weights_file)
    except SafetensorError as error:
        raise ValueError(f"{weights_file} is damaged or not a safetensors file: {error}") from error
    return description, {name.removeprefix(KEY_PREFIX): value for name, value in weights.items()}


def write_detector(
    folder: str | os.PathLike, description: dict, weights: dict[str, torch.Tensor]
) -> list[str]:
    """Writes both files, each in one step, so that a reader never sees half a file.

    Args:
        folder: Made where it is not there.
        description: The detector's.
        weights: By name, in the dtype to store.

    Returns:
        The names of the two files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    licence = description.get("license", DETECTOR_LICENSE)
    _write_atomically(folder / WEIGHTS_NAME, _weights_file(weights, licence))
    _write_atomically(folder / DESCRIPTION_NAME, (json.dumps(description) + "\n").encode())
    return list(DETECTOR_FILES)


def copy_detector(source: str | os.PathLike, folder: str | os.PathLike) -> list[str]:
    """Copies a saved detector into another folder; weights saved without `KEY_PREFIX` get it.

    Returns:
        The names of the two files.
    """
    source, folder = Path(source), Path(folder)
    weights = safetensors.torch.load_file(source / WEIGHTS_NAME)
    licence = json.loads((source / DESCRIPTION_NAME).read_text(encoding="utf-8")).get(
        "license", DETECTOR_LICENSE
    )
    _write_atomically(folder / WEIGHTS_NAME, _weights_file(weights, licence))
    _write_atomically(folder / DESCRIPTION_NAME, (source / DESCRIPTION_NAME).read_bytes())
    return list(DETECTOR_FILES)


def lossless_half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in float16 where every one of them survives that exactly, else as they are.

    ultralytics turns a float16 checkpoint into float32 as it loads it, so the checkpoint's own dtype is found by
    trying.
    """
    halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    lossless = all(torch.equal(halves[name].to(value.dtype), value) for name, value in weights.items())
    return halves if lossless else weights


def _checked_description(description: dict) -> dict:
    """Refuses a description that lacks a field, or whose architecture names anything but layers.

    ultralytics evaluates some strings of an architecture as code.
    """
    of_transformers = description.get("kind") == TRANSFORMERS
    for field, kind in (_TRANSFORMERS_FIELDS if of_transformers else _ULTRALYTICS_FIELDS).items():
        if not isinstance(description.get(field), kind):
            raise ValueError(f"field {field!r} is {description.get(field)!r}; wanted {kind.__name__}")
    if of_transformers:
        return description  # its classes are looked up by name in transformers, and no remote code is taken
    if description["task"] not in ("detect", "segment", "rtdetr"):
        raise ValueError(f"task is {description['task']!r}; wanted 'detect', 'segment' or 'rtdetr'")
    architecture = description["architecture"]
    # ultralytics' layer classes are capitalised and its functions are not, with one exception.
    for layer in [layer[2] for layer in architecture["backbone"] + architecture["head"]]:
        if not re.fullmatch(r"(nn\.|torchvision\.ops\.)?[A-Z]\w*|v10Detect", layer):
            raise ValueError(f"layer {layer!r} is not the name of a module class")
    activation = architecture.get("activation")
    if activation and not re.fullmatch(r"(torch\.)?nn\.[A-Z]\w*\([\w\s.,=-]*\)", activation):
        raise ValueError(f"activation {activation!r} is not a plain module such as 'nn.SiLU()'")
    return description


def _weights_file(weights: dict[str, torch.Tensor], licence: str) -> bytes:
    named = {KEY_PREFIX + name.removeprefix(KEY_PREFIX): value for name, value in weights.items()}
    # One metadata entry only: safetensors writes several in random order, and equal detectors should be equal files.
    return safetensors.torch.save(named, {"license": licence})


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def unfit_tensors(wanted: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that a network wants and the weights lack, that are left over, or that have another shape."""
    shapes = [name for name in wanted if name in weights and wanted[name].shape != weights[name].shape]
    return sorted(wanted.keys() ^ weights.keys()) + shapes
