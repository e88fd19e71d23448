"""The engines behind a gateway: which are up, and which one a background belongs to.

All requests about one background go to the replica that ranks highest for its key (rendezvous hashing, Thaler and
Ravishankar 1998). When a replica is lost, only its own backgrounds move, each to the next replica in its rank. That costs
cached keys and values, not requests.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import httpx

logger = logging.getLogger(__name__)

CHECK_SECONDS = 5.0  # longest time for an answer of /health
# Health checks in a row that time out before a replica counts as down: an engine with much to do answers late, and its
# cache would be lost.
TIMEOUTS_BEFORE_DOWN = 3


@dataclass
class Replica:
    """One engine.

    Attributes:
        url: its base URL, without /v1.
        model: its name for the model; None: it was never up.
        up: whether it takes requests: it answered the last health check, and the probe.
        reason: why it is not up.
        probed: whether it has passed the probe since it came up; another engine may come up at the same URL.
        in_flight: requests that it is answering for this gateway.
        timeouts: health checks in a row that it did not answer in time.
        context: tokens of its longest prompt and answer; None: it does not say.
    """

    url: str
    model: str | None = None
    up: bool = False
    reason: str = "not asked yet"
    probed: bool = False
    in_flight: int = 0
    timeouts: int = 0
    context: int | None = None

    @property
    def served_model(self) -> str:
        """`model` of a replica that has been up; a `RuntimeError` before."""
        if self.model is None:
            raise RuntimeError(f"{self.url} was never up; wanted a replica that has passed the probe.")
        return self.model


class Replicas:
    """Checks the engines' health, and ranks them for a request.

    Args:
        urls: their base URLs, without /v1.
        client: for the health checks.
        probe: awaited with a replica that has come up, before it gets requests; what it raises is the reason to keep
            the replica out.
        seconds: time between two health checks of a replica.
        on_change: called with a replica whenever it goes up or down.

    Attributes:
        replicas: one for each URL.
    """

    def __init__(
        self,
        urls: list[str],
        client: httpx.AsyncClient,
        probe: Callable | None = None,
        seconds: float = 2.0,
        on_change: Callable[[Replica], None] | None = None,
    ):
        self.replicas = [Replica(url) for url in urls]
        self._client, self._probe, self._seconds = client, probe, seconds
        self._on_change = on_change or (lambda replica: None)
        self._tasks: list[asyncio.Task] = []

    def in_order(self, key: str | None) -> list[Replica]:
        """All replicas in the order in which a request should try them: by its background's key, if it has one."""
        return self.least_busy() if key is None else self.ranked(key)

    def ranked(self, key: str) -> list[Replica]:
        """All replicas, the one that a background's key belongs to first; those that are down last."""

        def rank(replica: Replica) -> bytes:
            return blake2b(f"{replica.url}\0{key}".encode(), digest_size=8).digest()

        return sorted(sorted(self.replicas, key=rank, reverse=True), key=lambda replica: not replica.up)

    def least_busy(self) -> list[Replica]:
        """All replicas, those with the fewest requests in flight first; those that are down last."""
        return sorted(self.replicas, key=lambda replica: (not replica.up, replica.in_flight))

    @property
    def any_up(self) -> bool:
        """Whether one takes requests."""
        return any(replica.up for replica in self.replicas)

    @property
    def context(self) -> int | None:
        """Tokens of the longest prompt and answer that every replica takes; None where none says."""
        return min((r.context for r in self.replicas if r.context is not None), default=None)

    def states(self) -> dict[str, str]:
        """What is known of each replica, by its URL."""
        return {r.url: "up" if r.up else f"down: {r.reason}" for r in self.replicas}

    def mark_down(self, replica: Replica, reason: str) -> None:
        """Keeps requests from a replica until it passes a health check and the probe."""
        if replica.up:
            logger.warning("replica %s is down: %s", replica.url, reason)
        changed = replica.up
        replica.up, replica.reason, replica.probed = False, reason, False
        if changed:
            self._on_change(replica)

    async def start(self) -> None:
        """Checks every replica once, and starts a task for each that goes on checking."""
        await self.check_health()
        # A task for each, since one that hangs must not hide that another is back.
        self._tasks = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]

    async def stop(self) -> None:
        """Ends the tasks that `start` started."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def check_health(self) -> None:
        """Checks every replica once; those that have come up are probed."""
        await asyncio.gather(*(self._check(replica) for replica in self.replicas))

    async def _watch(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self._check(replica)
            except Exception:  # a check that fails must not end the task
                logger.exception("health check")

    async def _check(self, replica: Replica) -> None:
        try:
            answer = await self._client.get(f"{replica.url}/health", timeout=CHECK_SECONDS)
            if answer.status_code != 200:
                return self.mark_down(replica, f"/health answers {answer.status_code}")
            if self._probe is not None and not replica.probed:
                await self._probe(replica)
                replica.probed = True
        except httpx.HTTPError as error:
            timed_out = isinstance(error, httpx.ReadTimeout)
            if replica.up and timed_out and replica.timeouts + 1 < TIMEOUTS_BEFORE_DOWN:
                replica.timeouts += 1
                return None
            return self.mark_down(
                replica, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            )
        except Exception as error:  # the reason that the probe gives
            if replica.reason != str(error):
                logger.error("replica %s is not used: %s", replica.url, error)
            self.mark_down(replica, str(error))
            replica.reason = str(error)
            return
        replica.timeouts = 0
        if not replica.up:
            replica.up, replica.reason = True, ""
            logger.info("replica %s is up", replica.url)
            self._on_change(replica)
