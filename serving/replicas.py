"""The engines behind a gateway: which are up, and which one a background belongs to.

A background's requests go to one replica, the one that ranks highest for its key (rendezvous hashing, Thaler and
Ravishankar 1998): a replica that is lost moves its own backgrounds only, and a request that fails there goes to the
next in rank. What is lost is cache, not requests.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import httpx

logger = logging.getLogger(__name__)

# Looks in a row that may go unanswered: an engine with much to do is late, and taking it out would lose its cache.
PATIENCE = 3


@dataclass
class Replica:
    """One engine.

    Attributes:
        url: its base URL, without /v1.
        up: whether it answered last, and reads requests as they are written.
        reason: why it is not up.
        checked: it was seen to read patch groups; asked again each time it comes back.
        in_flight: requests that it is working on for us.
        late: looks in a row that it did not answer in time.
    """

    url: str
    up: bool = False
    reason: str = "not asked yet"
    checked: bool = False
    in_flight: int = 0
    late: int = 0


class Replicas:
    """Looks after the engines.

    Args:
        urls: their base URLs.
        client: for all requests to them.
        probe: asked of a replica that has come up, before requests go there; raises with the reason to keep it out.
        seconds: time between two looks.
        on_change: called with a replica whenever it goes up or down.
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

    def ranked(self, key: str) -> list[Replica]:
        """All replicas, the one that a key belongs to first; those that are down last."""

        def rank(replica: Replica) -> bytes:
            return blake2b(f"{replica.url}\0{key}".encode(), digest_size=8).digest()

        return sorted(sorted(self.replicas, key=rank, reverse=True), key=lambda replica: not replica.up)

    def least_busy(self) -> list[Replica]:
        """All replicas for a request without a background, those with the fewest in flight first, down ones last."""
        return sorted(self.replicas, key=lambda replica: (not replica.up, replica.in_flight))

    @property
    def any_up(self) -> bool:
        return any(replica.up for replica in self.replicas)

    def down(self, replica: Replica, reason: str) -> None:
        """Takes a replica out until it answers again."""
        if replica.up:
            logger.warning("replica %s is down: %s", replica.url, reason)
        changed = replica.up
        replica.up, replica.reason, replica.checked = False, reason, False
        if changed:
            self._on_change(replica)

    async def start(self) -> None:
        """Looks at every replica once, then goes on looking."""
        await self.look()
        # Each by itself: one that hangs must not keep us from seeing that another is back.
        self._tasks = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]

    async def stop(self) -> None:
        """Stops looking."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def look(self) -> None:
        """Asks all replicas for their health."""
        await asyncio.gather(*(self._look_at(replica) for replica in self.replicas))

    async def _watch(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            try:
                await self._look_at(replica)
            except Exception:  # a look that fails must not end the looking
                logger.exception("health check")

    async def _look_at(self, replica: Replica) -> None:
        try:
            answer = await self._client.get(f"{replica.url}/health", timeout=5.0)
            if answer.status_code != 200:
                return self.down(replica, f"/health answers {answer.status_code}")
            if self._probe is not None and not replica.checked:
                await self._probe(replica)
                replica.checked = True
        except httpx.HTTPError as error:
            if replica.up and isinstance(error, httpx.ReadTimeout) and replica.late + 1 < PATIENCE:
                replica.late += 1
                return None
            return self.down(
                replica, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            )
        except Exception as error:  # the probe's own reason
            if replica.reason != str(error):
                logger.error("replica %s is not used: %s", replica.url, error)
            self.down(replica, str(error))
            replica.reason = str(error)
            return
        replica.late = 0
        if not replica.up:
            replica.up, replica.reason = True, ""
            logger.info("replica %s is up", replica.url)
            self._on_change(replica)
