"""Writing to a background folder behind the answer's back: a bounded queue and one thread that empties it."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

MAX_PENDING_BYTES = 256 * 2**20


class _PendingValue(NamedTuple):
    tensors: tuple[torch.Tensor, ...]
    compute_seconds: float
    num_bytes: int


class FolderWriter:
    """Values that wait to be written, in order of arrival. Thread-safe.

    The thread lives while something waits, so that an idle folder holds none and can be collected.

    Args:
        write: called on the thread with (value_kind, key, tensors, compute_seconds); must not raise.
        max_pending_bytes: bound on what waits; a single value may exceed it, alone.

    Attributes:
        state: guards the queue and wakes those who wait for it.
        pending_bytes: of the values that wait or are being written.
    """

    def __init__(
        self,
        write: Callable[[str, bytes, tuple[torch.Tensor, ...], float], None],
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ):
        self._write = write
        self.max_pending_bytes = max_pending_bytes
        self.restart_after_fork()

    def restart_after_fork(self) -> None:
        """An empty queue with new locks: a forked child does not have its parent's thread."""
        self.state = threading.Condition()
        self.pending_bytes = 0
        self._waiting: OrderedDict[tuple[str, bytes], _PendingValue] = OrderedDict()
        self._in_flight: tuple[str, bytes] | None = None
        self._thread: threading.Thread | None = None

    def submit(
        self,
        value_kind: str,
        key: bytes,
        tensors: Iterable[torch.Tensor],
        compute_seconds: float,
        num_bytes: int,
    ) -> bool:
        """Queues a value of `num_bytes` on the disk; one that waits already is not queued again. False: no room.

        Tensors on other devices are copied to the CPU here, so that no device memory is held. Tensors on the CPU are
        not copied: nobody may write to them.

        Raises:
            RuntimeError, MemoryError: there is no memory for the copy, or no thread to be had.
        """
        name = (value_kind, key)
        with self.state:
            if name in self._waiting or name == self._in_flight:
                return True
            if self.pending_bytes and self.pending_bytes + num_bytes > self.max_pending_bytes:
                return False
            # Counted before the copy, so that copies made at the same time stay within the bound too.
            self.pending_bytes += num_bytes
        try:
            copies = tuple(tensor.cpu() for tensor in tensors)
            with self.state:
                if name in self._waiting:  # another thread was faster
                    self._uncount(num_bytes)
                    return True
                if self._thread is None or not self._thread.is_alive():
                    thread = threading.Thread(target=self._run, name="background-folder", daemon=True)
                    thread.start()
                    self._thread = thread
                self._waiting[name] = _PendingValue(copies, compute_seconds, num_bytes)
        except (RuntimeError, MemoryError):
            self._uncount(num_bytes)
            raise
        return True

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until nothing waits to be written. False if that took longer than `timeout` seconds."""
        with self.state:
            return self.state.wait_for(lambda: self.pending_bytes == 0, timeout)

    def discard(self) -> None:
        """Forgets what waits, and returns once the value that is being written has landed."""
        with self.state:
            for value in self._waiting.values():
                self._uncount(value.num_bytes)
            self._waiting.clear()
            started = self._in_flight
            self.state.wait_for(lambda: self._in_flight is None or self._in_flight is not started)

    def _run(self) -> None:
        while True:
            with self.state:
                if not self._waiting:
                    self._thread = None
                    return
                self._in_flight, value = self._waiting.popitem(last=False)
                value_kind, key = self._in_flight
            num_bytes = value.num_bytes
            try:
                self._write(value_kind, key, value.tensors, value.compute_seconds)
            finally:
                del value  # an idle queue holds no tensors
                with self.state:
                    self._in_flight = None
                    self._uncount(num_bytes)

    def _uncount(self, num_bytes: int) -> None:
        with self.state:
            self.pending_bytes -= num_bytes
            self.state.notify_all()
