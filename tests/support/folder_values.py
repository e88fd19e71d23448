"""Keys and values for tests of the background folder, and what lies in the folder."""

import functools
import tempfile
from pathlib import Path

import torch

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
