"""The format of one entry of a background folder: a tuple of tensors as the bytes of a safetensors file.

The safetensors library reads these files. It neither writes nor reads them here: its writer takes no tensors that share
memory, and its reader maps the file, so that the bytes could still change after they were checked.

Tensors are named "0", "1", ... in the order of the tuple. The metadata holds the format's version, the value kind, the
key, the seconds that computing the value took, and a BLAKE2b checksum over all of this and every tensor.
"""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .cache_keys_backdrop import DIGEST_BYTES

FORMAT_VERSION = 1
VALUE_KINDS = ("tokens", "prefix")
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own bound
ENTRY_SUFFIX = ".safetensors"
ENTRY_NAME = re.compile(
    rf"({'|'.join(VALUE_KINDS)})-([0-9a-f]{{{2 * DIGEST_BYTES}}}){re.escape(ENTRY_SUFFIX)}"
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredValue:
    """A value as it was read: tensors on the CPU, and the seconds that computing them took."""

    tensors: tuple[torch.Tensor, ...]
    compute_seconds: float


def _header(
    value_kind: str, key: bytes, tensors: Sequence[torch.Tensor], compute_seconds: float, checksum: str
) -> bytes:
    """The bytes before the data: length, JSON, padding. Their number does not depend on what the tensors hold.

    Raises:
        ValueError: a tensor has a dtype that the format cannot hold.
    """
    metadata = {
        "version": str(FORMAT_VERSION),
        "kind": value_kind,
        "key": key.hex(),
        "compute_seconds": repr(float(compute_seconds)),
        "checksum": checksum,
    }
    header: dict[str, dict] = {"__metadata__": metadata}
    start = 0
    for index in _data_order(tensors):
        tensor = tensors[index]
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensor {index} is {tensor.dtype}; wanted one of {', '.join(DTYPES)}")
        stop = start + tensor.nbytes
        header[str(index)] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _data_order(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Indices of the tensors, the widest dtypes first, as safetensors does: so each tensor is aligned in the file."""
    return sorted(range(len(tensors)), key=lambda index: -tensors[index].element_size())


def entry_size(value_kind: str, key: bytes, tensors: Sequence[torch.Tensor], compute_seconds: float) -> int:
    """Exact number of bytes of the file, from shapes and dtypes alone.

    Raises:
        ValueError: a tensor has a dtype that the format cannot hold.
    """
    blank = "0" * 64
    return len(_header(value_kind, key, tensors, compute_seconds, blank)) + sum(
        tensor.nbytes for tensor in tensors
    )


def encode_entry(
    value_kind: str, key: bytes, tensors: Sequence[torch.Tensor], compute_seconds: float
) -> list:
    """The file as buffers in order: the header, then the tensors' own memory, which is not copied where it is on the CPU.

    Args:
        value_kind: "tokens" or "prefix".
        key: digest of everything the value depends on, 20 bytes.
        tensors: any shapes and devices, dtypes of `DTYPES`.
        compute_seconds: what computing them took.
    """
    buffers = [_flat_bytes(tensor).numpy() for tensor in tensors]
    dtypes = [DTYPE_NAMES[tensor.dtype] for tensor in tensors]
    shapes = [list(tensor.shape) for tensor in tensors]
    checksum = checksum_of(value_kind, key, repr(float(compute_seconds)), dtypes, shapes, buffers)
    header = _header(value_kind, key, tensors, compute_seconds, checksum)
    return [header, *(buffers[index] for index in _data_order(tensors))]


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """`[num_bytes]` uint8 on the CPU, a view where the tensor allows one. Flat first: a scalar has no view as bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def checksum_of(
    value_kind: str, key: bytes, compute_seconds: str, dtypes: list, shapes: list, buffers: Iterable
) -> str:
    """Hexadecimal BLAKE2b of what an entry says; `buffers`: each tensor's bytes, in the order of the tuple."""
    digest = hashlib.blake2b(
        f"{FORMAT_VERSION}|{value_kind}|{key.hex()}|{compute_seconds}".encode(), digest_size=32
    )
    for dtype, shape, buffer in zip(dtypes, shapes, buffers, strict=True):
        digest.update(f"|{dtype}{shape}|".encode())
        digest.update(buffer)
    return digest.hexdigest()


def read_entry(path: Path, value_kind: str, key: bytes, max_bytes: int) -> StoredValue:
    """Reads a file into memory of its own, one allocation per tensor, and checks all of it.

    Args:
        path: the file.
        value_kind, key: what it must say it is.
        max_bytes: a larger file is not read.

    Raises:
        OSError: if it cannot be read.
        MemoryError: if there is no memory for it.
        Exception: of any type if the content is not what was written (damaged bytes can make a parser raise
            anything); ValueError where it parses.
    """
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"the file has {size} bytes; wanted at most the budget's {max_bytes}")
        if size < 8:
            raise ValueError(f"the file has {size} bytes; wanted a header")
        (header_bytes,) = struct.unpack("<Q", handle.read(8))
        if header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"the header is said to have {header_bytes} bytes in a file of {size}")
        header = json.loads(handle.read(header_bytes))
        metadata = header.pop("__metadata__")
        for name, wanted in (("version", str(FORMAT_VERSION)), ("kind", value_kind), ("key", key.hex())):
            if metadata[name] != wanted:
                raise ValueError(f"the {name} is {metadata[name]!r}; wanted {wanted!r}")

        names = [str(index) for index in range(len(header))]
        dtypes = [header[name]["dtype"] for name in names]
        shapes = [header[name]["shape"] for name in names]
        offsets = [header[name]["data_offsets"] for name in names]
        end = 0
        for start, stop in sorted(offsets):
            if start != end or stop < start:
                raise ValueError(f"data_offsets are {offsets}; wanted data without holes")
            end = stop
        if 8 + header_bytes + end != size:
            raise ValueError(f"the file has {size} bytes; wanted {8 + header_bytes + end}")
        for dtype, shape, (start, stop) in zip(dtypes, shapes, offsets, strict=True):
            if math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
                raise ValueError(f"a tensor of {stop - start} bytes is said to be {dtype}{shape}")

        buffers = []
        for start, stop in offsets:
            try:
                buffer = torch.empty(stop - start, dtype=torch.uint8)
            except RuntimeError as error:
                raise MemoryError(str(error)) from error
            handle.seek(8 + header_bytes + start)
            if stop > start and handle.readinto(buffer.numpy()) != stop - start:
                raise ValueError("the file ends early")
            buffers.append(buffer)

    compute_seconds = metadata["compute_seconds"]
    arrays = [buffer.numpy() for buffer in buffers]
    if metadata["checksum"] != checksum_of(value_kind, key, compute_seconds, dtypes, shapes, arrays):
        raise ValueError("the checksum differs from the content's")
    tensors = tuple(
        buffer.view(DTYPES[dtype]).reshape(shape)
        for buffer, dtype, shape in zip(buffers, dtypes, shapes, strict=True)
    )
    return StoredValue(tensors, float(compute_seconds))
