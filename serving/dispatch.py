"""Sends a request to the replica that its background belongs to, and to the next one where that fails."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import httpx

from .engine_request import EngineRequest
from .metrics import GatewayMetrics
from .problems import ApiError
from .replicas import Replica, Replicas
from .settings import GatewaySettings

CONNECT_SECONDS = 5.0
# Status codes of a replica that cannot work; the request is sent to the next one.
REPLICA_FAILURES = (500, 502, 503, 504)


class Dispatcher:
    """Sends requests to replicas.

    Args:
        settings: limits on time, and when a client may try again.
        replicas: which are up.
        client: for all requests to them.
        metrics: are told of retries and failures.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        replicas: Replicas,
        client: httpx.AsyncClient,
        metrics: GatewayMetrics,
    ):
        self._limits, self._retry_after = settings.limits, settings.health_seconds
        self._replicas, self._client, self._metrics = replicas, client, metrics

    async def send(self, request: EngineRequest) -> httpx.Response:
        """The complete answer of the first replica that gives one.

        Raises:
            ApiError: 502, no replica could answer; 504, one was silent for too long.
        """
        try:
            async with self._answering_replica(request, {}, stream=False) as response:
                return response
        except httpx.ReadTimeout:
            raise engine_timeout(self._limits.answer_seconds) from None

    async def lines(
        self, request: EngineRequest, tried: dict[str, None]
    ) -> AsyncGenerator[bytes | httpx.Response, None]:
        """Lines of the streamed answer of the first replica that gives one; or one refusal, read to its end.

        Args:
            request: whose body asks for a stream.
            tried: URLs of the replicas asked before, in order; they are passed over. Grows.

        Raises:
            ApiError: 502, no replica could answer.
            httpx.HTTPError: the replica was lost, or silent for too long, after it had begun.
        """
        async with self._answering_replica(request, tried, stream=True) as response:
            if response.status_code != 200:
                await response.aread()
                yield response
                return
            rest = b""
            async for part in response.aiter_bytes():
                # httpx's own iterator over lines also splits at U+2028 and the like, which occur in answers.
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line := line.rstrip(b"\r"):
                        yield line
            if rest:
                yield rest

    @contextlib.asynccontextmanager
    async def _answering_replica(
        self, request: EngineRequest, tried: dict[str, None], stream: bool
    ) -> AsyncIterator[httpx.Response]:
        """The response of the first replica in rank that answers: complete, or, streaming, begun.

        Raises as `lines`. A replica that is silent may have much to do, so no other is asked in its place.
        """
        reasons = []
        for replica in self._replicas.in_order(request.background_key):
            if not replica.up or replica.url in tried:
                continue
            if tried:
                self._metrics.retries.inc()
            tried[replica.url] = None
            replica.in_flight += 1
            try:
                try:
                    response = await self._client.send(self._call(replica, request, stream), stream=stream)
                except httpx.ReadTimeout:
                    raise
                except httpx.HTTPError as error:
                    self._lost(replica, error)
                    reasons.append(type(error).__name__)
                    continue
                if response.status_code in REPLICA_FAILURES:
                    # This request may itself cause the failure: the replica stays up for the others, and the health
                    # check decides.
                    await response.aclose()
                    self._metrics.replica_errors.labels(replica.url).inc()
                    reasons.append(f"status {response.status_code}")
                    continue
                try:
                    yield response
                except httpx.ReadTimeout:
                    raise
                except httpx.HTTPError as error:
                    self._lost(replica, error)
                    raise
                finally:
                    await response.aclose()
                return
            finally:
                replica.in_flight -= 1
        why = "; ".join(reasons) or ("none is left" if tried else "none is up")
        raise ApiError(502, f"no replica could answer: {why}", "no_replica", self._retry_after)

    def _call(self, replica: Replica, request: EngineRequest, stream: bool) -> httpx.Request:
        # An answer that is not streamed is silent until all of it is there.
        silence = self._limits.first_token_seconds if stream else self._limits.answer_seconds
        return self._client.build_request(
            "POST",
            f"{replica.url}/v1/chat/completions",
            content=request.body_for(replica.served_model),
            headers={"Content-Type": "application/json"},
            timeout=httpx.Timeout(silence, connect=CONNECT_SECONDS),
        )

    def _lost(self, replica: Replica, error: httpx.HTTPError) -> None:
        self._metrics.replica_errors.labels(replica.url).inc()
        self._replicas.mark_down(replica, type(error).__name__)


def engine_timeout(seconds: float) -> ApiError:
    """The error of a replica that was silent for so many seconds."""
    return ApiError(504, f"no answer from the engine within {seconds:g} s", "engine_timeout")
