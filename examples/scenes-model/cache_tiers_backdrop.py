"""What the background cache keeps in memory: entries under a byte budget, and leases that keep them from eviction."""

import threading
import time
from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass
class CacheEntry:
    """One stored value. Its tensors are never written."""

    tensors: tuple[torch.Tensor, ...]
    num_bytes: int
    seconds: float  # what computing it took, 0: unknown
    pins: int = 0  # leases that hold it

    @classmethod
    def of(cls, tensors: tuple[torch.Tensor, ...], seconds: float) -> "CacheEntry":
        """An entry of these tensors, its bytes counted."""
        return cls(tensors, sum(tensor.nbytes for tensor in tensors), seconds)

    def is_cheaper_than(self, fetching: float) -> bool:
        """Whether computing the value again takes less than `fetching` seconds, as far as that is known."""
        return 0 < self.seconds < fetching


class CacheTier:
    """Entries by (value kind, key) under a byte budget, the least recently used first. Not thread-safe by itself.

    Args:
        max_bytes: the budget; 0: nothing is kept.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.entries: OrderedDict[tuple[str, bytes], CacheEntry] = OrderedDict()
        self.num_bytes = 0

    def pop(self, name: tuple[str, bytes]) -> CacheEntry | None:
        """Removes an entry, pinned or not; None if it is not there."""
        entry = self.entries.pop(name, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes
        return entry

    def insert(
        self, name: tuple[str, bytes], entry: CacheEntry
    ) -> list[tuple[tuple[str, bytes], CacheEntry]] | None:
        """Adds an entry that is not there. Returns what was evicted for it, None if pinned entries leave no room."""
        pinned = sum(kept.num_bytes for kept in self.entries.values() if kept.pins)
        if pinned + entry.num_bytes > self.max_bytes:
            return None
        evicted = []
        for candidate in list(self.entries):
            if self.num_bytes + entry.num_bytes <= self.max_bytes:
                break
            if not self.entries[candidate].pins:
                evicted.append((candidate, self.pop(candidate)))
        self.entries[name] = entry
        self.num_bytes += entry.num_bytes
        return evicted

    def drop_unpinned(self) -> None:
        """Removes every entry that no lease holds."""
        for name in [name for name, entry in self.entries.items() if not entry.pins]:
            self.pop(name)


class Lease:
    """Entries in use: they are not evicted until `release`, so that the budget counts memory that is really held.

    It travels with the keys and values that a generation shares with the cache; a copy of these shares nothing, so that a
    copied or unpickled lease holds no entry and no lock of the cache's.

    Args:
        lock: the cache's; None: one of its own.
    """

    def __init__(self, lock: AbstractContextManager | None = None):
        self._lock = threading.RLock() if lock is None else lock
        self._entries: list[CacheEntry] = []

    def __deepcopy__(self, memo) -> "Lease":
        return Lease()

    def __reduce__(self):
        return Lease, ()

    def pin(self, entry: CacheEntry) -> None:
        """Holds an entry. Called under the cache's lock."""
        entry.pins += 1
        self._entries.append(entry)

    def release(self) -> None:
        """Gives every entry up. Idempotent."""
        with self._lock:
            while self._entries:
                self._entries.pop().pins -= 1


class TransferSpeed:
    """How long copies from the host's memory to a device take, measured once for each device."""

    def __init__(self):
        self._seconds_per_byte: dict[torch.device, float] = {}

    def seconds(self, device: torch.device, num_bytes: int) -> float:
        """Estimate for one copy of that size; 0 where the device is the host."""
        if device.type == "cpu":
            return 0.0
        if device not in self._seconds_per_byte:
            self._seconds_per_byte[device] = _measure_transfer(device)
        return self._seconds_per_byte[device] * num_bytes


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, detached, in a storage that holds nothing else, so that the budget counts what is kept."""
    tensor = tensor.detach()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def synchronized_clock(device: torch.device) -> float:
    """Seconds on a monotonic clock, read after everything that is queued on the device has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _measure_transfer(device: torch.device) -> float:
    """Seconds per byte of a copy from pageable host memory."""
    block = torch.zeros(2**24, dtype=torch.uint8)
    block.to(device).sum().item()  # warm-up; `item` waits for the device
    started = time.perf_counter()
    block.to(device)[-1].item()
    return (time.perf_counter() - started) / block.numel()
