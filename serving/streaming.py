"""Streamed answers: begun at another replica where the first one fails in time, and never longer than allowed."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import TypeAlias

import httpx
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .admission import Slot
from .answers import (
    COMMENT,
    END_OF_STREAM,
    error_event,
    event_line,
    is_engine_failure,
    plain_answer,
    refusal_event,
    usage_event,
)
from .chat import ChatRequest
from .disconnects import unless_disconnected
from .dispatch import Dispatcher, engine_timeout
from .engine_request import EngineRequest
from .metrics import GatewayMetrics
from .problems import ApiError
from .settings import Limits
from .sight import Sight

logger = logging.getLogger(__name__)


# Proxies may neither keep a stream nor hand it on in pieces of their own size.
STREAM_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}

_Begun: TypeAlias = tuple[bytes | httpx.Response, AsyncGenerator]


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
        self, request: Request, chat: ChatRequest, sent: EngineRequest, sight: Sight, slot: Slot
    ) -> Response:
        """The response, once its first event is there or `headers_seconds` are over; or the engine's refusal before.

        Args:
            request: whose client may leave.
            chat: what it asked.
            sent: the same, for the engine.
            sight: the request's figures; its usage gets them.
            slot: released when the response has ended, whatever ends it.

        Raises:
            ApiError: 502, no replica began an answer; 504, one was silent for too long.
            ClientDisconnect: the client left before the headers.
        """
        beginning = asyncio.ensure_future(self._begin(sent))
        try:
            waiting = asyncio.wait({beginning}, timeout=self._limits.headers_seconds)
            await unless_disconnected(request, waiting)
            if beginning.done():
                first, lines = beginning.result()
                if isinstance(first, httpx.Response):
                    await lines.aclose()
                    slot.release()
                    return plain_answer(first, sight)
                sight.lap("first_token")
        except BaseException:
            await _given_up(beginning)
            raise
        events = self._events(beginning, chat.shows_usage, sight)
        return EventStream(events, beginning, slot, self._limits.answer_seconds, sight.headers())

    async def _begin(self, sent: EngineRequest) -> _Begun:
        """The first line, and the iterator over the others. Until then a replica that fails is replaced unnoticed."""
        tried: dict[str, None] = {}
        while True:
            lines = self._dispatcher.lines(sent, tried)
            try:
                first = await anext(lines)
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
        self, beginning: asyncio.Future[_Begun], shows_usage: bool, sight: Sight
    ) -> AsyncGenerator[bytes, None]:
        """The events of an answer; the last one is an error where the engine's own end is missing."""
        while not beginning.done():
            yield COMMENT
            await asyncio.wait({beginning}, timeout=self._limits.comment_seconds)
        try:
            first, lines = beginning.result()
        except ApiError as problem:
            yield error_event(problem)
            return
        if isinstance(first, httpx.Response):
            yield refusal_event(first)
            return
        if "first_token" not in sight.seconds:
            sight.lap("first_token")
        self._metrics.first_token.observe(sight.seconds["first_token"])
        line, last, reason = first, b"", "it ended"
        try:
            while True:
                last = line
                event = usage_event(line)
                if event is not None:
                    self._metrics.count_usage(event["usage"])
                    sight.lap("answer")
                    event["usage"]["backdrop"] = sight.usage()
                    line = event_line(event)
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


async def _given_up(beginning: asyncio.Future[_Begun]) -> None:
    """Ends what was begun, or is still beginning."""
    beginning.cancel()
    await asyncio.wait({beginning})
    if not beginning.cancelled() and beginning.exception() is None:
        await beginning.result()[1].aclose()


class EventStream(StreamingResponse):
    """Server-sent events that release their slot even where the client left before the first one, or stops reading.

    Args:
        events: what is sent.
        beginning: what the events are made of; ended with them.
        slot: released at the end.
        seconds: longest time from now to the end.
        headers: beside those of every stream.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        beginning: asyncio.Future[_Begun],
        slot: Slot,
        seconds: float,
        headers: dict[str, str],
    ):
        super().__init__(events, headers=STREAM_HEADERS | headers, media_type="text/event-stream")
        self.events, self._beginning, self._slot, self._seconds = events, beginning, slot, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events; an ASGI application."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._seconds)
        except asyncio.TimeoutError:
            # The server closes the connection of an incomplete answer, by which the client sees that it was cut off.
            logger.warning("an answer was cut off after %g s", self._seconds)
        finally:
            await self.events.aclose()
            await _given_up(self._beginning)
            self._slot.release()
