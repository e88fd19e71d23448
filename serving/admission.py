"""A bounded number of requests in progress, a bounded queue in front of them; further ones are told to come back."""

import asyncio

from .metrics import GatewayMetrics
from .problems import ApiError
from .settings import Limits


class Slot:
    """The right of one request to be in progress, until it is released."""

    def __init__(self, admission: "Admission"):
        self._admission: Admission | None = admission

    def release(self) -> None:
        """Lets the next request in. Idempotent."""
        if self._admission is not None:
            self._admission.release()
            self._admission = None


class Admission:
    """Hands out slots.

    Args:
        limits: `concurrent` slots; `waiting` requests wait at most `wait_seconds` for one.
        metrics: are told how many requests wait and how many are in progress.

    Attributes:
        slots: counts those that are free.
        waiting: requests in the queue.
    """

    def __init__(self, limits: Limits, metrics: GatewayMetrics):
        self._limits, self._metrics = limits, metrics
        self.slots = asyncio.Semaphore(limits.concurrent)
        self.waiting = 0

    async def acquire(self) -> Slot:
        """Waits for a free slot.

        Raises:
            ApiError: 429, the queue is full or the wait was too long.
        """
        if self.slots.locked():
            await self._wait()
        else:
            await self.slots.acquire()
        self._metrics.in_flight.inc()
        return Slot(self)

    def release(self) -> None:
        """Frees one slot; for `Slot`, which does so once."""
        self._metrics.in_flight.dec()
        self.slots.release()

    async def _wait(self) -> None:
        limits = self._limits
        if self.waiting >= limits.waiting:
            message = f"{limits.concurrent} requests are in progress and {self.waiting} are waiting"
            raise ApiError(429, message, "busy", 1)
        self.waiting += 1
        self._metrics.waiting.set(self.waiting)
        try:
            await asyncio.wait_for(self.slots.acquire(), limits.wait_seconds)
        except asyncio.TimeoutError:
            message = f"no other request ended within {limits.wait_seconds:g} s"
            raise ApiError(429, message, "busy", limits.wait_seconds) from None
        finally:
            self.waiting -= 1
            self._metrics.waiting.set(self.waiting)
