"""How long a load from a background folder takes: measured once per machine, and kept in the folder."""

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import secrets
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.utils import logging

from .cache_keys_backdrop import DIGEST_BYTES
from .folder_entry_backdrop import VALUE_KINDS, encode_entry, read_entry
from .folder_files_backdrop import TEMPORARY_SUFFIX, FolderFiles, one_line, remove_file, write_through

logger = logging.get_logger(__name__)

MEASURED_BYTES = 32 * 2**20
MIN_MEASURED_BYTES = 64 * 2**10  # below this the time is that of opening a file


class LoadSpeed(NamedTuple):
    """What a load costs: `latency` seconds, and one second for each `bytes_per_second`."""

    bytes_per_second: float
    latency: float


class FolderSpeed:
    """The speed of loads from the files of a folder. Thread-safe.

    Args:
        files: the folder's files.
        max_bytes: the folder's budget, which a measurement keeps.
    """

    def __init__(self, files: FolderFiles, max_bytes: int):
        self._files = files
        self._max_bytes = max_bytes
        self._speed: LoadSpeed | None = None
        self.restart_after_fork()

    def restart_after_fork(self) -> None:
        """A new lock: a forked child has no thread that could release its parent's."""
        self._measuring = threading.Lock()

    def seconds_to_load(self, num_bytes: int) -> float:
        """Estimate for an entry of that size, reading and checking; see `BackgroundFolder.seconds_to_load`."""
        with self._measuring:
            if self._speed is None:
                self._speed = self._find()
            speed = self._speed
        return speed.latency + num_bytes / speed.bytes_per_second

    def _find(self) -> LoadSpeed:
        """As stored, else measured, else guessed."""
        root = self._files.root
        try:
            machine = f"{platform.node()}|{root.stat().st_dev}".encode()
            path = root / f"machine-{hashlib.blake2b(machine, digest_size=8).hexdigest()}.json"
            speed = _read_speed(path)
            if speed is None:
                with self._files.exclusive():
                    speed = _read_speed(path)  # another process may have measured while this one waited
                    if speed is None:
                        speed = self._measure()
                        content = {"bytes_per_second": speed.bytes_per_second, "latency_s": speed.latency}
                        with contextlib.suppress(OSError):
                            self._files.write(path, [json.dumps(content).encode()])
            return speed
        except (OSError, RuntimeError, MemoryError) as error:
            logger.warning_once(f"{root.parent}: the speed of loads is a guess ({one_line(error)}).")
            return _guess_speed()

    def _measure(self) -> LoadSpeed:
        held, _ = self._files.evict(0, self._max_bytes)
        size = min(MEASURED_BYTES, self._max_bytes // 2, self._max_bytes - held)
        if size < MIN_MEASURED_BYTES:
            # Evicting backgrounds to find out how fast they load would cost more than a guess.
            raise OSError(errno.ENOSPC, f"{size} bytes are free for a measurement")
        header = 1024  # more than the header of an entry of one tensor
        return LoadSpeed(size / self._time_load(size - header), self._time_load(header))

    def _time_load(self, num_bytes: int) -> float:
        """Seconds to load an entry of that size which the page cache does not hold, the way a folder does."""
        # Random bytes, because some file systems compress. From the system, so that the caller's random state stays.
        noise = torch.frombuffer(bytearray(os.urandom(num_bytes)), dtype=torch.uint8)
        value_kind, key = VALUE_KINDS[0], bytes(DIGEST_BYTES)
        path = self._files.root / f"measurement.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
        try:
            write_through(path, encode_entry(value_kind, key, (noise,), 0.0))
            if hasattr(os, "posix_fadvise"):
                with open(path, "rb") as handle:
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            try:
                read_entry(path, value_kind, key, self._max_bytes)
            except (ValueError, KeyError) as error:  # the disk does not give back what was written
                raise OSError(errno.EIO, one_line(error)) from error
            return time.perf_counter() - start
        finally:
            remove_file(path)


def _read_speed(path: Path) -> LoadSpeed | None:
    try:
        content = json.loads(path.read_bytes())
        speed = LoadSpeed(float(content["bytes_per_second"]), float(content["latency_s"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return speed if all(0 < number < math.inf for number in speed) else None


def _guess_speed() -> LoadSpeed:
    """A disk three times as slow as the check of its bytes, and a seek."""
    num_bytes = 8 * 2**20
    start = time.perf_counter()
    hashlib.blake2b(bytes(num_bytes))
    return LoadSpeed(num_bytes / (time.perf_counter() - start) / 4, 0.01)
