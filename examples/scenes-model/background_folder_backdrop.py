"""The background cache's tier on disk: what was computed for backgrounds, kept in a folder across restarts and processes.

One safetensors file per value at `<folder>/v1/<two hex digits>/<value kind>-<key>.safetensors`. A key is a digest of
everything the value depends on, and a file is checked in full before its tensors are handed out. So an entry that is lost,
evicted, cut short or damaged costs time, never an answer, and neither `get` nor `put` raises because of the disk.

Other versions of the format live in folders of their own (`v<N>`) and are never read, counted or removed from here.
"""

import atexit
import contextlib
import errno
import os
import threading
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers.utils import logging

from .cache_keys_backdrop import DIGEST_BYTES
from .cache_options_backdrop import byte_count
from .folder_entry_backdrop import (
    ENTRY_NAME,
    ENTRY_SUFFIX,
    FORMAT_VERSION,
    VALUE_KINDS,
    StoredValue,
    encode_entry,
    entry_size,
    read_entry,
)
from .folder_files_backdrop import FolderFiles, one_line, remove_file
from .folder_speed_backdrop import FolderSpeed
from .folder_writer_backdrop import MAX_PENDING_BYTES, FolderWriter

logger = logging.get_logger(__name__)

EXIT_TIMEOUT = 30.0  # seconds that waiting writes may hold up the end of the process
# What the process lacks, not what the file lacks: a read that fails so tells nothing about the entry.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class BackgroundFolder:
    """Tensor tuples in a folder, evicted by last use, under a byte budget that holds at every moment.

    Any number of threads may share one object, and any number of processes one folder; the smallest of their budgets is
    the one that counts. The budget covers entries and temporary files. The lock file and the measurements of
    `seconds_to_load` (a few hundred bytes) come on top. What a folder holds beyond it goes with the next write.

    Args:
        folder: made if missing. One that cannot be made or written is read from, and otherwise reported once.
        max_bytes: upper bound of the files' bytes; a value that is larger alone is not stored.

    Attributes:
        files: the files as such, entries or not.
        writer: the queue of `put_soon`.

    Raises:
        ValueError: if `max_bytes` is not a positive size, or `folder` no path or a file.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int | str):
        self.max_bytes = byte_count("folder_max_bytes", max_bytes, 1)
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise ValueError(f"folder is {folder!r}; wanted the path of a folder, or None.")
        # Absolute, so that a later change of the working directory does not move the folder.
        self.folder = Path(folder).expanduser().absolute()
        if os.path.exists(self.folder) and not os.path.isdir(self.folder):
            raise ValueError(f"{self.folder} is a file; wanted a folder.")
        self.files = FolderFiles(self.folder / f"v{FORMAT_VERSION}")
        self.writer = FolderWriter(self._write_queued, min(MAX_PENDING_BYTES, self.max_bytes))
        self._speed = FolderSpeed(self.files, self.max_bytes)
        self._counts: dict[str, int] = {}
        self._counting = threading.Lock()
        _FOLDERS.add(self)
        try:
            self.files.check_writable()
        except OSError as error:
            logger.warning_once(
                f"{self.folder} cannot be written ({one_line(error)}); backgrounds are only read there."
            )

    def restart_after_fork(self) -> None:
        """New locks and an empty queue: a forked child has none of its parent's threads."""
        self.files.restart_after_fork()
        self.writer.restart_after_fork()
        self._speed.restart_after_fork()
        self._counting = threading.Lock()

    # Threads and locks cannot be copied; a copied model works on the same folder.
    def __reduce__(self):
        return BackgroundFolder, (str(self.folder), self.max_bytes)

    def __repr__(self) -> str:
        return f"BackgroundFolder({str(self.folder)!r}, {self.max_bytes / 2**20:.1f} MiB)"

    # ---- reading

    def get(self, value_kind: str, key: bytes) -> StoredValue | None:
        """The stored value, checked in full, or None. A damaged entry is logged and deleted. Takes no lock.

        Args:
            value_kind: "tokens" or "prefix".
            key: digest of everything the value depends on, 20 bytes.

        Raises:
            ValueError: `value_kind` is neither of the two, or `key` has another length.
        """
        path = self.path_of(value_kind, key)
        value = None
        try:
            value = read_entry(path, value_kind, key, self.max_bytes)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # there is no list of what damaged bytes make a parser raise
            if not _is_shortage(error):
                self._count("corrupt")
                logger.warning(f"{path}: {one_line(error)}; dropped, it will be computed again.")
                remove_file(path)
        self._count("misses" if value is None else "hits")
        if value is not None:
            self.files.touch(path)
        return value

    def path_of(self, value_kind: str, key: bytes) -> Path:
        """The file of an entry, whether it is there or not.

        Raises:
            ValueError: `value_kind` is neither of the two, or `key` has another length.
        """
        if value_kind not in VALUE_KINDS:
            raise ValueError(f"value_kind is {value_kind!r}; wanted one of {', '.join(VALUE_KINDS)}.")
        if len(key) != DIGEST_BYTES:
            raise ValueError(f"key has {len(key)} bytes; wanted a digest of {DIGEST_BYTES} bytes.")
        return self.files.root / key.hex()[:2] / f"{value_kind}-{key.hex()}{ENTRY_SUFFIX}"

    def size_of(self, value_kind: str, key: bytes) -> int | None:
        """Bytes of an entry's file, None where there is none."""
        try:
            return self.path_of(value_kind, key).stat().st_size
        except OSError:
            return None

    def seconds_to_load(self, num_bytes: int) -> float:
        """Estimate of what `get` takes for an entry of that size, reading and checking.

        Measured at the first call on a machine (up to 32 MiB of free room are written, read back and deleted) and kept
        in `v1/machine-<digest>.json`. Where that is impossible, a guess on the safe side.
        """
        return self._speed.seconds_to_load(num_bytes)

    def verify(self) -> list[str]:
        """Reads and checks every entry. One line per bad one, "path in the folder: what is wrong"; deletes nothing."""
        problems = []
        for file in sorted(self.files.scan()[0], key=lambda file: file.path):
            try:
                match = ENTRY_NAME.fullmatch(file.path.name)
                if match is None or match[2][:2] != file.path.parent.name:
                    raise ValueError("the name is not that of an entry in its place")
                read_entry(file.path, match[1], bytes.fromhex(match[2]), self.max_bytes)
            except FileNotFoundError:
                continue  # evicted meanwhile
            except Exception as error:
                problems.append(f"{file.path.relative_to(self.folder).as_posix()}: {one_line(error)}")
        return problems

    def stats(self) -> dict[str, int]:
        """Entries and bytes of the folder now, bytes waiting to be written, and counters since the object was made.

        Every `get` is a hit or a miss; "corrupt" ones are among the misses. `bytes` includes temporary files.
        """
        entries, temporaries = [], []
        with contextlib.suppress(OSError):
            entries, temporaries = self.files.scan()
        names = ("hits", "misses", "corrupt", "write_failures", "too_large", "skipped_busy")
        with self._counting:
            counts = {name: self._counts.get(name, 0) for name in names}
        return {
            "entries": len(entries),
            "bytes": sum(file.size for file in entries + temporaries),
            "max_bytes": self.max_bytes,
            "pending_bytes": self.writer.pending_bytes,
            **counts,
            "evictions": self.files.evictions,
        }

    # ---- writing

    def put(
        self, value_kind: str, key: bytes, tensors: Iterable[torch.Tensor], compute_seconds: float
    ) -> bool:
        """Writes a value; one that is there already is only marked as used. False if it is not stored.

        Args:
            value_kind: "tokens" or "prefix".
            key: digest of everything the value depends on, 20 bytes.
            tensors: any shapes and devices.
            compute_seconds: what computing them took.

        Raises:
            ValueError: `value_kind` is neither of the two, or `key` has another length.
        """
        path = self.path_of(value_kind, key)
        if self.files.touch(path):
            return True
        tensors = tuple(tensors)
        try:
            size = entry_size(value_kind, key, tensors, compute_seconds)
            if size > self.max_bytes:
                self._count("too_large")
                return False
            parts = encode_entry(value_kind, key, tensors, compute_seconds)
            with self.files.exclusive():
                if self.files.touch(path):
                    return True
                held, _ = self.files.evict(size, self.max_bytes)
                if held + size > self.max_bytes:
                    raise OSError(errno.ENOSPC, f"{held} bytes cannot be removed")
                self.files.write(path, parts)
        except (OSError, RuntimeError, MemoryError, ValueError) as error:
            self._count_failure(error)
            return False
        return True

    def put_soon(
        self, value_kind: str, key: bytes, tensors: Iterable[torch.Tensor], compute_seconds: float
    ) -> bool:
        """Like `put`, on a thread of its own. False if the value will not be written.

        Tensors on other devices are copied to the CPU here, so that no device memory is held. Tensors on the CPU are
        not copied: nobody may write to them. At most `writer.max_pending_bytes` wait at a time, but a single value may
        wait alone whatever its size: the keys and values of a long prefix are larger than any bound worth setting.
        """
        if self.files.touch(self.path_of(value_kind, key)):
            return True
        tensors = tuple(tensor.detach() for tensor in tensors)
        try:
            size = entry_size(value_kind, key, tensors, compute_seconds)
            if size > self.max_bytes:
                self._count("too_large")
                return False
            queued = self.writer.submit(value_kind, key, tensors, compute_seconds, size)
        except (RuntimeError, MemoryError, ValueError) as error:  # torch.OutOfMemoryError is a RuntimeError
            self._count_failure(error)
            return False
        if not queued:
            self._count("skipped_busy")
        return queued

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until nothing waits to be written. False if that took longer than `timeout` seconds."""
        return self.writer.flush(timeout)

    def clear(self) -> None:
        """Removes every entry and forgets the waiting writes; counters and other versions' entries stay.

        Raises:
            OSError: if an entry cannot be removed. Who clears relies on it, so this one is not quiet.
        """
        # Waits for the value that is being written: it would otherwise land after the clearing.
        self.writer.discard()
        with contextlib.ExitStack() as stack:
            # The lock spares other writers a failure. Clearing goes on without it.
            with contextlib.suppress(OSError, RuntimeError):
                stack.enter_context(self.files.exclusive())
            entries, temporaries = self.files.scan()
            for file in entries + temporaries:
                with contextlib.suppress(FileNotFoundError):
                    file.path.unlink()

    def prune(self, max_bytes: int | str | None = None) -> int:
        """Evicts the least recently used until `max_bytes` (by default the budget) hold; removes orphaned files.

        Returns:
            The bytes freed.

        Raises:
            ValueError: if `max_bytes` is negative.
            OSError: if the folder cannot be locked.
        """
        max_bytes = self.max_bytes if max_bytes is None else byte_count("max_bytes", max_bytes)
        with self.files.exclusive():
            _, freed = self.files.evict(0, max_bytes)
        return freed

    def _write_queued(
        self, value_kind: str, key: bytes, tensors: tuple[torch.Tensor, ...], compute_seconds: float
    ) -> None:
        try:
            self.put(value_kind, key, tensors, compute_seconds)
        except Exception as error:  # one value must not keep the others waiting
            self._count_failure(error)

    def _count(self, name: str) -> None:
        with self._counting:
            self._counts[name] = self._counts.get(name, 0) + 1

    def _count_failure(self, error: Exception) -> None:
        self._count("write_failures")
        logger.warning_once(f"{self.folder}: a background was not stored ({one_line(error)}).")


def _is_shortage(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SHORTAGES)


# ---- the end of the process, and its children
#
# State of the module, because Python offers these two hooks per process and never takes one back. A second copy of this
# module (from a Hub folder) has a set and hooks of its own, for its own objects.

_FOLDERS: "weakref.WeakSet[BackgroundFolder]" = weakref.WeakSet()


def _flush_all() -> None:
    deadline = time.monotonic() + EXIT_TIMEOUT
    for folder in list(_FOLDERS):
        folder.flush(max(0.0, deadline - time.monotonic()))


def _restart_all_in_child() -> None:
    for folder in list(_FOLDERS):
        folder.restart_after_fork()


atexit.register(_flush_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restart_all_in_child)
