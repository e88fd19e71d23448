"""The files of a background folder: listed, written in one step, evicted by last use, locked between processes.

The time of a file's last modification says when it was used last. Readers take no lock: a file appears by a rename, and
is complete from then on.
"""

import contextlib
import errno
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from .folder_entry_backdrop import ENTRY_SUFFIX

LOCK_TIMEOUT = 10.0  # seconds; a write that waits longer than this is not worth waiting for
TEMPORARY_SUFFIX = ".tmp"


class FolderFile(NamedTuple):
    """One file at the time of a listing."""

    path: Path
    size: int  # bytes
    last_use: int  # nanoseconds since the epoch


class FolderFiles:
    """The files under one root, shared by any number of threads and processes.

    Args:
        root: the folder, one level of sub-folders included. It need not exist.

    Attributes:
        evictions: entries that this object has removed to make room.
        thread_lock: held by the thread that writes.
    """

    def __init__(self, root: Path):
        self.root = root
        self.evictions = 0
        self._last_use = 0
        self.restart_after_fork()

    def restart_after_fork(self) -> None:
        """New locks: a forked child has no threads that could release its parent's."""
        self.thread_lock = threading.Lock()
        self._clock = threading.Lock()

    def check_writable(self) -> None:
        """Makes the root.

        Raises:
            OSError: it cannot be made, or not be written.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps other threads and processes from writing, inside a `with` block.

        Raises:
            TimeoutError: another one has been writing for `LOCK_TIMEOUT` seconds.
            OSError: the root or the lock file cannot be made.
        """
        # Threads queue here, because waiting for the file means polling it.
        if not self.thread_lock.acquire(timeout=LOCK_TIMEOUT):
            raise TimeoutError(errno.ETIMEDOUT, f"another thread writes for more than {LOCK_TIMEOUT} s")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / ".lock", timeout=LOCK_TIMEOUT).acquire(poll_interval=0.01):
                yield
        finally:
            self.thread_lock.release()

    def scan(self) -> tuple[list[FolderFile], list[FolderFile]]:
        """(entries, temporary files) as they are now; other processes may have changed them since the last time."""
        entries, temporaries = [], []
        folders = [self.root]
        for folder in folders:
            try:
                with os.scandir(folder) as found:
                    for item in found:
                        if item.is_dir(follow_symlinks=False):
                            if folder is self.root:
                                folders.append(Path(item.path))
                            continue
                        with contextlib.suppress(FileNotFoundError):
                            stat = item.stat(follow_symlinks=False)
                            file = FolderFile(Path(item.path), stat.st_size, stat.st_mtime_ns)
                            if item.name.endswith(TEMPORARY_SUFFIX):
                                temporaries.append(file)
                            elif item.name.endswith(ENTRY_SUFFIX):
                                entries.append(file)
            except (FileNotFoundError, NotADirectoryError):
                continue
        return entries, temporaries

    def touch(self, path: Path) -> bool:
        """Marks a file as the most recently used. False if there is none."""
        # The file system's own clock ticks every few milliseconds, too coarse for the order of two uses.
        with self._clock:
            self._last_use = max(time.time_ns(), self._last_use + 1)
            now = self._last_use
        try:
            os.utime(path, ns=(now, now))
        except FileNotFoundError:
            return False
        except OSError:  # a folder that may only be read
            return os.path.exists(path)
        return True

    def write(self, path: Path, parts: Iterable) -> None:
        """Writes a file of these buffers: it appears in one step, complete, or nothing is left of it.

        Raises:
            OSError: it cannot be written.
        """
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        try:
            write_through(temporary, parts)
            self.touch(temporary)
            os.replace(temporary, path)
        except BaseException:
            remove_file(temporary)
            raise

    def evict(self, room: int, max_bytes: int) -> tuple[int, int]:
        """Makes room: removes orphaned temporary files first, then the entries used least recently.

        Called under `exclusive`.

        Args:
            room: bytes that are to be free below `max_bytes`.

        Returns:
            (bytes held afterwards, bytes freed).
        """
        entries, temporaries = self.scan()
        held = sum(file.size for file in entries + temporaries)
        freed = 0
        for file in temporaries:  # nobody else writes now, so whoever began them has died
            if remove_file(file.path):
                freed += file.size
        for file in sorted(entries, key=lambda file: (file.last_use, file.path)):
            if held - freed + room <= max_bytes:
                break
            if remove_file(file.path):
                freed += file.size
                self.evictions += 1
        return held - freed, freed


def write_through(path: Path, parts: Iterable) -> None:
    """Writes a new file of these buffers down to the disk, so that no crash leaves a name without its content.

    Raises:
        OSError: it exists, or cannot be written.
    """
    with open(path, "xb") as handle:
        for part in parts:
            handle.write(part)
        handle.flush()
        os.fsync(handle.fileno())


def remove_file(path: Path) -> bool:
    """True if the file is gone, whoever removed it."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def one_line(error: Exception) -> str:
    """What an error says in one line, without the path, which stands in every message already."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text.splitlines()[0]
