"""The memo's disk tier: what was computed for backgrounds, kept in a folder across restarts and processes.

One safetensors file per value at `<folder>/v1/<two hex digits>/<kind>-<key>.safetensors`. A key is a digest of everything
the value depends on, and a file is checked in full before its tensors are handed out. So an entry that is lost, evicted,
cut short or damaged costs time, never an answer, and neither `get` nor `put` raises because of the disk.

Other versions of the format live in folders of their own (`v<N>`) and are never read, counted or removed from here.
"""

import atexit
import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import struct
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from transformers.utils import logging

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
DIGEST_BYTES = 20
KINDS = ("tokens", "prefix")
MAX_PENDING_BYTES = 256 * 2**20
LOCK_TIMEOUT = 10.0  # seconds; a write that waits longer than this is not worth waiting for
EXIT_TIMEOUT = 30.0  # seconds that waiting writes may hold up the end of the process
MEASURED_BYTES = 32 * 2**20
MIN_MEASURED_BYTES = 64 * 2**10  # below this the time is that of opening a file
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own bound
ENTRY_SUFFIX = ".safetensors"
TEMPORARY_SUFFIX = ".tmp"
ENTRY_NAME = re.compile(rf"({'|'.join(KINDS)})-([0-9a-f]{{{2 * DIGEST_BYTES}}}){re.escape(ENTRY_SUFFIX)}")
# What the process lacks, not what the file lacks: such a read fails without telling anything about the entry.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

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
    """Tensors on the CPU, and the seconds that computing them took."""

    tensors: tuple[torch.Tensor, ...]
    compute_seconds: float


class BackgroundFolder:
    """Least-recently-used store of tensor tuples in a folder, under a byte budget that holds at every moment.

    Any number of threads may share one object, and any number of processes one folder; the smallest of their budgets is
    the one that counts. The budget covers entries and temporary files. The lock file and the measurements of
    `seconds_to_load` (a few hundred bytes) come on top. What a folder holds beyond it goes with the next write.

    Args:
        folder: made if missing. One that cannot be made or written is read from, and otherwise reported once.
        max_bytes: upper bound of the files' bytes; a value that is larger alone is not stored.

    Raises:
        ValueError: if `max_bytes` is not positive or `folder` is a file.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int):
        if max_bytes <= 0:
            raise ValueError(f"max_bytes is {max_bytes}; wanted a positive number of bytes.")
        # Absolute: a later change of the working directory does not move the memo.
        self.folder = Path(folder).expanduser().absolute()
        if os.path.exists(self.folder) and not os.path.isdir(self.folder):
            raise ValueError(f"{self.folder} is a file; wanted a folder.")
        self.max_bytes = int(max_bytes)
        self.max_pending_bytes = min(MAX_PENDING_BYTES, self.max_bytes)
        self._root = self.folder / f"v{FORMAT_VERSION}"
        self._counts: dict[str, int] = {}
        self._last_use = 0
        self._speed: tuple[float, float] | None = None
        self._start_threading()
        _FOLDERS.add(self)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            if not os.access(self._root, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            logger.warning_once(
                f"{self.folder} cannot be written ({_reason(error)}); backgrounds are only read there."
            )

    def _start_threading(self) -> None:
        """Locks and the queue of waiting writes; a forked child starts over, since its parent's writer is not there."""
        self._state = threading.Condition()  # guards everything below and the counters
        self._exclusive_thread = threading.Lock()
        self._measuring = threading.Lock()
        self._waiting: OrderedDict[tuple[str, bytes], tuple[tuple[torch.Tensor, ...], float, int]] = (
            OrderedDict()
        )
        self._in_flight: tuple[str, bytes] | None = None
        self._pending_bytes = 0
        self._writer: threading.Thread | None = None

    # Threads and locks cannot be copied; a copied model works on the same folder.
    def __reduce__(self):
        return BackgroundFolder, (str(self.folder), self.max_bytes)

    # ---- reading

    def get(self, kind: str, key: bytes) -> StoredValue | None:
        """The stored value, checked in full, or None. A damaged entry is logged and deleted. Takes no lock."""
        path = self._path(kind, key)
        value = None
        try:
            value = _read_entry(path, kind, key, self.max_bytes)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # there is no list of what damaged bytes make a parser raise
            if not _is_shortage(error):
                self._count("corrupt")
                logger.warning(f"{path}: {_reason(error)}; dropped, it will be computed again.")
                _remove(path)
        self._count("misses" if value is None else "hits")
        if value is not None:
            self._touch(path)
        return value

    def size_of(self, kind: str, key: bytes) -> int | None:
        """Bytes of an entry's file, None where there is none."""
        try:
            return self._path(kind, key).stat().st_size
        except OSError:
            return None

    def verify(self) -> list[str]:
        """Reads and checks every entry. One line per bad one, "path in the folder: what is wrong"; deletes nothing."""
        problems = []
        for file in sorted(self._scan()[0], key=lambda file: file.path):
            try:
                match = ENTRY_NAME.fullmatch(file.path.name)
                if match is None or match[2][:2] != file.path.parent.name:
                    raise ValueError("the name is not that of an entry in its place")
                _read_entry(file.path, match[1], bytes.fromhex(match[2]), self.max_bytes)
            except FileNotFoundError:
                continue  # evicted meanwhile
            except Exception as error:
                problems.append(f"{file.path.relative_to(self.folder).as_posix()}: {_reason(error)}")
        return problems

    # ---- writing

    def put(self, kind: str, key: bytes, tensors: Iterable[torch.Tensor], compute_seconds: float) -> bool:
        """Writes a value; one that is there already is only marked as used. False if it is not stored.

        Args:
            kind: "tokens" or "prefix".
            key: digest of everything the value depends on, 20 bytes.
            tensors: any shapes and devices.
            compute_seconds: what computing them took.
        """
        path = self._path(kind, key)
        if self._touch(path):
            return True
        tensors = tuple(tensors)
        try:
            size = _entry_size(kind, key, tensors, compute_seconds)
            if size > self.max_bytes:
                self._count("too_large")
                return False
            parts = _encode(kind, key, tensors, compute_seconds)
            with self._exclusive():
                if self._touch(path):
                    return True
                held, _ = self._evict(size, self.max_bytes)
                if held + size > self.max_bytes:
                    raise OSError(errno.ENOSPC, f"{held} bytes cannot be removed")
                self._write(path, parts)
        except (OSError, RuntimeError, MemoryError, ValueError) as error:
            self._fail(error)
            return False
        return True

    def put_soon(
        self, kind: str, key: bytes, tensors: Iterable[torch.Tensor], compute_seconds: float
    ) -> bool:
        """Like `put`, on a thread of its own. False if the value will not be written.

        Tensors on other devices are copied to the CPU here, so that no device memory is held. Tensors on the CPU are
        not copied: nobody may write to them. At most `max_pending_bytes` wait at a time, but a single value may wait
        alone whatever its size: the keys and values of a long prefix are larger than any bound worth setting.
        """
        path = self._path(kind, key)
        if self._touch(path):
            return True
        name = (kind, key)
        tensors = tuple(tensor.detach() for tensor in tensors)
        try:
            size = _entry_size(kind, key, tensors, compute_seconds)
        except ValueError as error:
            self._fail(error)
            return False
        if size > self.max_bytes:
            self._count("too_large")
            return False
        with self._state:
            if name in self._waiting or name == self._in_flight:
                return True
            if self._pending_bytes and self._pending_bytes + size > self.max_pending_bytes:
                self._count("skipped_busy")
                return False
            self._pending_bytes += (
                size  # before the copy, so that copies made at once stay within the bound too
            )
        try:
            tensors = tuple(tensor.cpu() for tensor in tensors)
            with self._state:
                if name in self._waiting:  # another thread was faster
                    self._release(size)
                    return True
                if self._writer is None or not self._writer.is_alive():
                    # Ends when nothing waits, so an idle folder holds no thread and can be collected.
                    writer = threading.Thread(
                        target=self._write_waiting, name="background-folder", daemon=True
                    )
                    writer.start()
                    self._writer = writer
                self._waiting[name] = (tensors, compute_seconds, size)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            self._release(size)
            self._fail(error)
            return False
        return True

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until nothing waits to be written. False if that took longer than `timeout` seconds."""
        with self._state:
            return self._state.wait_for(lambda: self._pending_bytes == 0, timeout)

    def clear(self) -> None:
        """Removes every entry and forgets the waiting writes; counters and other versions' entries stay.

        Raises:
            OSError: if an entry cannot be removed. Who clears relies on it, so this one is not quiet.
        """
        with self._state:
            for _, _, size in self._waiting.values():
                self._release(size)
            self._waiting.clear()
            # What is being written right now would otherwise land after the clearing.
            started = self._in_flight
            self._state.wait_for(lambda: self._in_flight is None or self._in_flight is not started)
        with contextlib.ExitStack() as stack:
            # The lock spares other writers a failure. Clearing goes on without it.
            with contextlib.suppress(OSError, RuntimeError):
                stack.enter_context(self._exclusive())
            entries, temporaries = self._scan()
            for file in entries + temporaries:
                with contextlib.suppress(FileNotFoundError):
                    file.path.unlink()

    def prune(self, max_bytes: int | None = None) -> int:
        """Evicts the least recently used until `max_bytes` (by default the budget) hold; removes orphaned files.

        Returns:
            The bytes freed.

        Raises:
            ValueError: if `max_bytes` is negative.
            OSError: if the folder cannot be locked.
        """
        if max_bytes is None:
            max_bytes = self.max_bytes
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}; wanted zero or more bytes.")
        with self._exclusive():
            _, freed = self._evict(0, max_bytes)
        return freed

    def _write_waiting(self) -> None:
        while True:
            with self._state:
                if not self._waiting:
                    self._writer = None
                    return
                self._in_flight, (tensors, compute_seconds, size) = self._waiting.popitem(last=False)
                kind, key = self._in_flight
            try:
                self.put(kind, key, tensors, compute_seconds)
            except Exception as error:  # one value must not keep the others waiting
                self._fail(error)
            finally:
                del tensors
                with self._state:
                    self._in_flight = None
                    self._release(size)

    def _release(self, size: int) -> None:
        with self._state:
            self._pending_bytes -= size
            self._state.notify_all()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keeps other threads and processes from writing. TimeoutError after `LOCK_TIMEOUT` seconds."""
        # Threads queue here, since waiting for the file means polling.
        if not self._exclusive_thread.acquire(timeout=LOCK_TIMEOUT):
            raise TimeoutError(errno.ETIMEDOUT, f"another thread writes for more than {LOCK_TIMEOUT} s")
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with FileLock(self._root / ".lock", timeout=LOCK_TIMEOUT).acquire(poll_interval=0.01):
                yield
        finally:
            self._exclusive_thread.release()

    def _evict(self, room: int, max_bytes: int) -> tuple[int, int]:
        """Makes room under the lock: first orphans, then the least recently used. Returns (bytes held, bytes freed)."""
        entries, temporaries = self._scan()
        held = sum(file.size for file in entries + temporaries)
        freed = 0
        for file in temporaries:  # nobody else writes now, so their writers are dead
            if _remove(file.path):
                freed += file.size
        for file in sorted(entries, key=lambda file: (file.last_use, file.path)):
            if held - freed + room <= max_bytes:
                break
            if _remove(file.path):
                freed += file.size
                self._count("evictions")
        return held - freed, freed

    def _write(self, path: Path, parts: Sequence) -> None:
        """Puts a file in place in one step; on failure nothing is left."""
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        try:
            _write_through(temporary, parts)
            self._touch(temporary)
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise

    # ---- the folder

    def stats(self) -> dict[str, int]:
        """Entries and bytes of the folder now, bytes waiting to be written, and counters since the object was made.

        Every `get` is a hit or a miss; "corrupt" ones are among the misses. `bytes` includes temporary files.
        """
        entries, temporaries = [], []
        with contextlib.suppress(OSError):
            entries, temporaries = self._scan()
        names = ("hits", "misses", "corrupt", "write_failures", "too_large", "skipped_busy", "evictions")
        with self._state:
            return {
                "entries": len(entries),
                "bytes": sum(file.size for file in entries + temporaries),
                "max_bytes": self.max_bytes,
                "pending_bytes": self._pending_bytes,
                **{name: self._counts.get(name, 0) for name in names},
            }

    def _path(self, kind: str, key: bytes) -> Path:
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; wanted one of {', '.join(KINDS)}.")
        if len(key) != DIGEST_BYTES:
            raise ValueError(f"key has {len(key)} bytes; wanted a digest of {DIGEST_BYTES} bytes.")
        return self._root / key.hex()[:2] / f"{kind}-{key.hex()}{ENTRY_SUFFIX}"

    def _scan(self) -> "tuple[list[_File], list[_File]]":
        """(entries, temporary files) as they are now; other processes may have changed them since the last time."""
        entries, temporaries = [], []
        folders = [self._root]
        for folder in folders:
            try:
                with os.scandir(folder) as found:
                    for item in found:
                        if item.is_dir(follow_symlinks=False):
                            if folder is self._root:
                                folders.append(Path(item.path))
                            continue
                        with contextlib.suppress(FileNotFoundError):
                            stat = item.stat(follow_symlinks=False)
                            file = _File(Path(item.path), stat.st_size, stat.st_mtime_ns)
                            if item.name.endswith(TEMPORARY_SUFFIX):
                                temporaries.append(file)
                            elif item.name.endswith(ENTRY_SUFFIX):
                                entries.append(file)
            except (FileNotFoundError, NotADirectoryError):
                continue
        return entries, temporaries

    def _touch(self, path: Path) -> bool:
        """Marks a file as the most recently used. False if there is none."""
        # The file system's own clock ticks every few milliseconds: too coarse for the order of two uses.
        with self._state:
            self._last_use = max(time.time_ns(), self._last_use + 1)
            now = self._last_use
        try:
            os.utime(path, ns=(now, now))
        except FileNotFoundError:
            return False
        except OSError:  # a folder that is only read
            return os.path.exists(path)
        return True

    def _count(self, name: str) -> None:
        with self._state:
            self._counts[name] = self._counts.get(name, 0) + 1

    def _fail(self, error: Exception) -> None:
        self._count("write_failures")
        logger.warning_once(f"{self.folder}: a background was not stored ({_reason(error)}).")

    # ---- how long a load takes

    def seconds_to_load(self, num_bytes: int) -> float:
        """Estimate of what `get` takes for an entry of that size, reading and checking.

        Measured at the first call on a machine (up to 32 MiB of free room are written, read back and deleted) and kept
        in `v1/machine-<digest>.json`. Where that is impossible, a guess on the safe side.
        """
        with self._measuring:
            if self._speed is None:
                self._speed = self._find_speed()
            bytes_per_second, latency = self._speed
        return latency + num_bytes / bytes_per_second

    def _find_speed(self) -> tuple[float, float]:
        """(bytes per second, seconds of latency): as stored, else measured, else guessed."""
        try:
            machine = f"{platform.node()}|{self._root.stat().st_dev}".encode()
            path = self._root / f"machine-{hashlib.blake2b(machine, digest_size=8).hexdigest()}.json"
            speed = _read_speed(path)
            if speed is None:
                with self._exclusive():
                    speed = _read_speed(path)  # another process may have measured while this one waited
                    if speed is None:
                        speed = self._measure_speed()
                        content = {"bytes_per_second": speed[0], "latency_s": speed[1]}
                        with contextlib.suppress(OSError):
                            self._write(path, [json.dumps(content).encode()])
            return speed
        except (OSError, RuntimeError, MemoryError) as error:
            logger.warning_once(f"{self.folder}: the speed of loads is a guess ({_reason(error)}).")
            return _guess_speed()

    def _measure_speed(self) -> tuple[float, float]:
        held, _ = self._evict(0, self.max_bytes)
        size = min(MEASURED_BYTES, self.max_bytes // 2, self.max_bytes - held)
        if size < MIN_MEASURED_BYTES:
            # Evicting backgrounds to find out how fast they load would cost more than a guess.
            raise OSError(errno.ENOSPC, f"{size} bytes are free for a measurement")
        header = 1024  # more than the header of an entry of one tensor
        return size / self._time_load(size - header), self._time_load(header)

    def _time_load(self, num_bytes: int) -> float:
        """Seconds to load an entry of that size which the page cache does not hold, the way `get` does."""
        # Random bytes: some file systems compress. From the system: the caller's random numbers stay as they are.
        noise = torch.frombuffer(bytearray(os.urandom(num_bytes)), dtype=torch.uint8)
        kind, key = KINDS[0], bytes(DIGEST_BYTES)
        path = self._root / f"measurement.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
        try:
            _write_through(path, _encode(kind, key, (noise,), 0.0))
            if hasattr(os, "posix_fadvise"):
                with open(path, "rb") as handle:
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            try:
                _read_entry(path, kind, key, self.max_bytes)
            except (ValueError, KeyError) as error:  # the disk does not give back what was written
                raise OSError(errno.EIO, _reason(error)) from error
            return time.perf_counter() - start
        finally:
            _remove(path)

    def __repr__(self) -> str:
        return f"BackgroundFolder({str(self.folder)!r}, {self.max_bytes / 2**20:.1f} MiB)"


class _File(NamedTuple):
    path: Path
    size: int
    last_use: int  # nanoseconds


# ---- one entry as bytes
#
# The format is safetensors', and its library reads these files. It does not write or read them here: its writer takes
# no tensors that share memory and its reader maps the file, so bytes could still change after they were checked.


def _header(
    kind: str, key: bytes, tensors: Sequence[torch.Tensor], compute_seconds: float, checksum: str
) -> bytes:
    """Length, JSON and padding up to the data. Its size does not depend on values. ValueError for an unknown dtype."""
    metadata = {
        "version": str(FORMAT_VERSION),
        "kind": kind,
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
        stop = start + _num_bytes(tensor)
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
    """The widest dtypes first, as safetensors does, so that every tensor is aligned in the file."""
    return sorted(range(len(tensors)), key=lambda index: -tensors[index].element_size())


def _entry_size(kind: str, key: bytes, tensors: Sequence[torch.Tensor], compute_seconds: float) -> int:
    """Exact bytes of the file, from shapes and dtypes alone."""
    blank = "0" * 64
    return len(_header(kind, key, tensors, compute_seconds, blank)) + sum(map(_num_bytes, tensors))


def _encode(kind: str, key: bytes, tensors: Sequence[torch.Tensor], compute_seconds: float) -> list:
    """The file as buffers in order: the header, then the tensors' own memory."""
    buffers = [_flat_bytes(tensor).numpy() for tensor in tensors]
    dtypes = [DTYPE_NAMES[tensor.dtype] for tensor in tensors]
    shapes = [list(tensor.shape) for tensor in tensors]
    checksum = _checksum(kind, key, repr(float(compute_seconds)), dtypes, shapes, buffers)
    header = _header(kind, key, tensors, compute_seconds, checksum)
    return [header, *(buffers[index] for index in _data_order(tensors))]


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """`[num_bytes]` uint8 on the CPU; a view where the tensor allows one. Flat first: no view of a scalar as bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _checksum(
    kind: str, key: bytes, compute_seconds: str, dtypes: list, shapes: list, buffers: Iterable
) -> str:
    digest = hashlib.blake2b(
        f"{FORMAT_VERSION}|{kind}|{key.hex()}|{compute_seconds}".encode(), digest_size=32
    )
    for dtype, shape, buffer in zip(dtypes, shapes, buffers, strict=True):
        digest.update(f"|{dtype}{shape}|".encode())
        digest.update(buffer)
    return digest.hexdigest()


def _read_entry(path: Path, kind: str, key: bytes, max_bytes: int) -> StoredValue:
    """Reads a file into memory of its own, one allocation per tensor, and checks all of it.

    Raises:
        OSError: if it cannot be read.
        MemoryError: if there is no memory for it.
        Exception: of any type if the content is not what was written; ValueError where it parses.
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
        for name, wanted in (("version", str(FORMAT_VERSION)), ("kind", kind), ("key", key.hex())):
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
    if metadata["checksum"] != _checksum(kind, key, compute_seconds, dtypes, shapes, arrays):
        raise ValueError("the checksum differs from the content's")
    tensors = tuple(
        buffer.view(DTYPES[dtype]).reshape(shape)
        for buffer, dtype, shape in zip(buffers, dtypes, shapes, strict=True)
    )
    return StoredValue(tensors, float(compute_seconds))


def _write_through(path: Path, parts: Iterable) -> None:
    """Writes a new file down to the disk, so that no crash leaves a name without its content."""
    with open(path, "xb") as handle:
        for part in parts:
            handle.write(part)
        handle.flush()
        os.fsync(handle.fileno())


def _remove(path: Path) -> bool:
    """True if the file is gone, whoever removed it."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_shortage(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SHORTAGES)


def _reason(error: Exception) -> str:
    """One line without the path, which is in every message already."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.splitlines()[0]


def _read_speed(path: Path) -> tuple[float, float] | None:
    try:
        content = json.loads(path.read_bytes())
        speed = float(content["bytes_per_second"]), float(content["latency_s"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return speed if all(0 < number < math.inf for number in speed) else None


def _guess_speed() -> tuple[float, float]:
    """A disk three times as slow as the check of its bytes, and a seek."""
    num_bytes = 8 * 2**20
    start = time.perf_counter()
    hashlib.blake2b(bytes(num_bytes))
    return num_bytes / (time.perf_counter() - start) / 4, 0.01


# ---- the end of the process, and its children

_FOLDERS: "weakref.WeakSet[BackgroundFolder]" = weakref.WeakSet()


def _flush_all() -> None:
    deadline = time.monotonic() + EXIT_TIMEOUT
    for folder in list(_FOLDERS):
        folder.flush(max(0.0, deadline - time.monotonic()))


def _start_over_in_child() -> None:
    for folder in list(_FOLDERS):
        folder._start_threading()


atexit.register(_flush_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over_in_child)
