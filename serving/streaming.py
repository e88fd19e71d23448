"""Streamed answers: begun at another replica where the first one fails in time, and never longer than allowed."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .admission import Slot
from .answers import END_OF_STREAM, error_event, is_engine_failure, plain_answer, usage_event
from .chat import ChatRequest
from .disconnects import unless_disconnected
from .dispatch import Dispatcher, engine_timeout
from .engine_request import EngineRequest
from .metrics import GatewayMetrics
from .problems import ApiError
from .settings import Limits

logger = logging.getLogger(__name__)


class AnswerStreamer:
    """Answers requests with server-sent events.

    Args:
        dispatcher: asks the replicas.
        limits: on the engine's silence and the whole answer's time.
        metrics: are told of the first event, the usage and failures.
    """

    def __init__(self, dispatcher: Dispatcher, limits: Limits, metrics: GatewayMetrics):
        self._dispatcher, self._limits, self._metrics = dispatcher, limits, metrics

    async def answer(
        self, request: Request, chat: ChatRequest, sent: EngineRequest, started: float, slot: Slot
    ) -> Response:
        """The response, once its first event is there; or the engine's refusal.

        Args:
            request: whose client may leave.
            chat: what it asked.
            sent: the same, for the engine.
            started: `time.perf_counter()` when the request came.
            slot: released when the response has ended, whatever ends it.

        Raises:
            ApiError: 502, no replica began an answer; 504, one was silent for too long.
            ClientDisconnect: the client left before the first event.
        """
        first, lines = await self._begin(request, sent)
        if isinstance(first, httpx.Response):
            await lines.aclose()
            slot.release()
            return plain_answer(first)
        events = self._events(first, lines, chat.shows_usage, started)
        return EventStream(events, lines, slot, self._limits.answer_seconds)

    async def _begin(
        self, request: Request, sent: EngineRequest
    ) -> tuple[bytes | httpx.Response, AsyncGenerator]:
        """The first line, and the iterator over the others. Until then a replica that fails is replaced unnoticed."""
        tried: dict[str, None] = {}
        while True:
            lines = self._dispatcher.lines(sent, tried)
            try:
                first = await unless_disconnected(request, anext(lines))
            except httpx.ReadTimeout:
                raise engine_timeout(self._limits.first_token_seconds) from None
            except httpx.HTTPError:
                continue  # the dispatcher has marked its replica as down
            except StopAsyncIteration:
                raise ApiError(502, "the engine ended its answer before it began", "engine_failed") from None
            if isinstance(first, bytes) and is_engine_failure(first):
                await lines.aclose()
                self._metrics.replica_errors.labels(next(reversed(tried))).inc()
                continue
            return first, lines

    async def _events(
        self, first: bytes, lines: AsyncGenerator, shows_usage: bool, started: float
    ) -> AsyncGenerator[bytes, None]:
        """The events of an answer; the last one is an error where the engine's own end is missing."""
        self._metrics.first_token.observe(time.perf_counter() - started)
        line, last, reason = first, b"", "it ended"
        try:
            while True:
                last = line
                event = usage_event(line)
                if event is not None:
                    self._metrics.count_usage(event["usage"])
                if event is None or event.get("choices") or shows_usage:
                    yield line + b"\n\n"
                line = await anext(lines)
        except StopAsyncIteration:
            pass
        except httpx.HTTPError as error:
            reason = type(error).__name__
        finally:
            await lines.aclose()
        if last != END_OF_STREAM:
            message = f"the engine was lost during the answer ({reason})"
            yield error_event(ApiError(502, message, "engine_lost"))


class EventStream(StreamingResponse):
    """Server-sent events that release their slot even where the client left before the first one, or stops reading.

    Args:
        events: what is sent.
        lines: what the events are made of; closed with them.
        slot: released at the end.
        seconds: longest time from now to the end.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], lines: AsyncGenerator, slot: Slot, seconds: float
    ):
        super().__init__(events, media_type="text/event-stream")
        self._generators, self._slot, self._seconds = (events, lines), slot, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events; an ASGI application."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._seconds)
        except asyncio.TimeoutError:
            # The server closes the connection of an incomplete answer, by which the client sees that it was cut off.
            logger.warning("an answer was cut off after %g s", self._seconds)
        finally:
            for generator in self._generators:
                await generator.aclose()
            self._slot.release()
