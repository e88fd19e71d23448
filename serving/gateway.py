"""A gateway in front of vLLM for clients that cannot change: ordinary images in, patch groups out.

It takes chat completions requests, splits their images (with references kept per tenant), sends them to the replica that
their background belongs to, and streams the answer back. Cache salts and uuids are set here and nowhere else: a tenant's
entries in the engine's prefix and encoder caches cannot be reached by another.

    request -> place -> key -> body -> form -> images -> groups -> replica by background -> answer
                429     401    413     400     400/413/504         502 when none is left
"""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from backdrop.processing.processing_backdrop import BackdropProcessor

from .chat import ChatRequest, fetch_images, read_chat, with_images
from .client import GATEWAY_MARK
from .frames import FrameSplitter, SplitFrame
from .images import ImageFetcher, open_image
from .metrics import GatewayMetrics
from .problems import ApiError
from .prompts import engine_probe, suppressed_tokens
from .replicas import Replica, Replicas
from .settings import GatewaySettings, Limits
from .tenants import Tenants

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
# Shorter than a server's own (uvicorn: 5): a request on a connection that is just being closed would look like a death.
KEEPALIVE_SECONDS = 3.0
# What a replica answers when it cannot work; the request is sent to the next one.
REPLICA_FAILURES = (500, 502, 503, 504)


class Admission:
    """Places for requests: some in work, some waiting, the rest told to come back."""

    def __init__(self, limits: Limits, metrics: GatewayMetrics):
        self._limits, self._metrics = limits, metrics
        self._places = asyncio.Semaphore(limits.concurrent)
        self._waiting = 0

    async def take(self) -> None:
        """Waits for a place. Raises `ApiError` 429."""
        if self._places.locked():
            if self._waiting >= self._limits.waiting:
                raise ApiError(
                    429, f"{self._limits.concurrent} requests are in work and {self._waiting} wait", "busy", 1
                )
            self._waiting += 1
            self._metrics.waiting.set(self._waiting)
            try:
                await asyncio.wait_for(self._places.acquire(), self._limits.wait_seconds)
            except asyncio.TimeoutError:
                raise ApiError(
                    429, f"no place within {self._limits.wait_seconds:g} s", "busy", self._limits.wait_seconds
                ) from None
            finally:
                self._waiting -= 1
                self._metrics.waiting.set(self._waiting)
        else:
            await self._places.acquire()
        self._metrics.in_flight.inc()

    def free(self) -> None:
        """Gives the place back."""
        self._metrics.in_flight.dec()
        self._places.release()


class Gateway:
    """The application's state and its handlers.

    Args:
        settings: see `GatewaySettings`.
        processor: the served model's; None: loaded from where the settings, or the engine, say.
        upstream: of httpx, in place of the network, for tests.
        fetcher: in place of the settings' own, for tests.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        processor: BackdropProcessor | None = None,
        upstream: httpx.AsyncBaseTransport | None = None,
        fetcher: ImageFetcher | None = None,
    ):
        self.settings, self.processor = settings, processor
        self.metrics = GatewayMetrics()
        self.tenants = Tenants(settings)
        limits = settings.limits
        self.fetcher = fetcher or ImageFetcher(settings.image_hosts, limits.fetch_seconds, limits.image_bytes)
        self.client = httpx.AsyncClient(
            transport=upstream,
            trust_env=False,
            timeout=httpx.Timeout(limits.first_token_seconds, connect=CONNECT_SECONDS),
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=limits.concurrent,
                keepalive_expiry=KEEPALIVE_SECONDS,
            ),
        )
        self.replicas = Replicas(
            settings.replicas, self.client, self._probe, settings.health_seconds, self._replica_changed
        )
        for replica in self.replicas.replicas:  # one that never comes up is seen too
            self._replica_changed(replica)
        self.splitter: FrameSplitter | None = None
        self.model: str | None = None
        self._names: dict[str, str] = {}  # replica -> the model's name there
        self._threads = ThreadPoolExecutor(settings.workers, "backdrop-split")
        self._admission: Admission | None = None

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
            ],
            lifespan=self._lifespan,
            exception_handlers={404: _not_found, 405: _not_found},
        )

    # ---- starting and stopping

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._admission = Admission(self.settings.limits, self.metrics)
        try:
            if self.processor is None:
                source = self.settings.processor or await self._engine_source()
                self.processor = await self._in_thread(BackdropProcessor.from_pretrained, source)
            self.splitter = FrameSplitter(self.processor, **self.settings.matching.model_dump())
            if self.settings.split:
                # The detector is loaded now, not by the first request.
                images = self.splitter.processor
                await self._in_thread(images._detector, images._with_defaults({}))
            await self.replicas.start()
            yield
        finally:
            await self.replicas.stop()
            await self.client.aclose()
            await self.fetcher.aclose()
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _engine_source(self) -> str:
        for url in self.settings.replicas:
            with contextlib.suppress(httpx.HTTPError, LookupError, TypeError, ValueError):
                return (await self.client.get(f"{url}/v1/models")).json()["data"][0]["root"]
        raise ValueError(
            "no replica says where its model is; set `processor` to the served model's folder or Hub id."
        )

    async def _probe(self, replica: Replica) -> None:
        """Keeps out an engine that does not read patch groups."""
        answer = (await self.client.get(f"{replica.url}/v1/models", timeout=CONNECT_SECONDS)).json()
        name = answer["data"][0]["id"]
        body, check = engine_probe(self.processor, self.splitter, name)
        found = await self.client.post(f"{replica.url}/v1/chat/completions", json=body)
        if found.status_code != 200:
            raise ValueError(f"the engine answers a patch group with {found.status_code}: {found.text[:200]}")
        check(found.json()["usage"]["prompt_tokens"])
        self._names[replica.url] = name
        self.model = self.model or name

    def _replica_changed(self, replica: Replica) -> None:
        self.metrics.replica_up.labels(replica.url).set(replica.up)

    # ---- handlers

    async def health(self, request: Request) -> Response:
        """200 while one replica is up."""
        states = {
            replica.url: "up" if replica.up else f"down: {replica.reason}"
            for replica in self.replicas.replicas
        }
        return JSONResponse({"replicas": states}, status_code=200 if self.replicas.any_up else 503)

    async def show_metrics(self, request: Request) -> Response:
        """Prometheus' text."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """The one model, marked so that `BackdropClient` leaves the splitting to us."""
        if self.tenants.of(request.headers.get("authorization")) is None:
            return self._refusal(_no_key())
        if self.model is None:
            return self._refusal(
                ApiError(503, "no replica is up", "no_replica", self.settings.health_seconds)
            )
        model = {
            "id": self.model,
            "object": "model",
            "created": 0,
            "owned_by": "backdrop",
            GATEWAY_MARK: True,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        started = time.perf_counter()
        name = uuid.uuid4().hex
        try:
            tenant = self.tenants.of(request.headers.get("authorization"))
            if tenant is None:
                raise _no_key()
            await self._admission.take()
            place = contextlib.ExitStack()
            place.callback(self._admission.free)
            try:
                response = await self._chat(request, tenant, name, started, place)
            except BaseException:
                place.close()
                raise
        except ApiError as problem:
            response = self._refusal(problem)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            logger.exception("request %s", name)
            response = self._refusal(
                ApiError(500, f"the gateway failed; its log names request {name}", "gateway_error")
            )
        response.headers["x-request-id"] = name
        self.metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def _chat(self, request, tenant, name, started, place) -> Response:
        limits = self.settings.limits
        if self.model is None:
            raise ApiError(503, "no replica is up", "no_replica", self.settings.health_seconds)
        data = await _read_body(request, limits)
        chat = await self._in_thread(self._parse, data)
        del data
        body, route = await self._prepare(chat, tenant, request)
        if chat.streams:
            return await self._stream(request, chat, body, route, started, place)
        answer = await _unless_gone(request, self._send(body, route))
        self.metrics.first_token.observe(time.perf_counter() - started)
        if answer.status_code == 200:
            self._count_usage(answer.json().get("usage"))
        place.close()
        return Response(answer.content, answer.status_code, media_type="application/json")

    def _parse(self, data: bytes) -> ChatRequest:
        values = sum(data.count(mark) for mark in (b",", b"[", b"{"))
        if values > self.settings.limits.body_values:  # a few bytes of it are a hundred of memory
            raise ApiError(
                413,
                f"the body has some {values:,} JSON values; wanted at most {self.settings.limits.body_values:,}",
                "body_too_large",
            )
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON: {error}", "invalid_body") from None
        special = tuple(self.processor.tokenizer.all_special_tokens)
        special += tuple(
            t.content for t in self.processor.tokenizer.added_tokens_decoder.values() if t.special
        )
        return read_chat(body, self.settings.limits, tuple(dict.fromkeys(special)), self.model)

    async def _prepare(self, chat: ChatRequest, tenant: str, request: Request) -> tuple[bytes, str | None]:
        """The body for an engine but for the model's name, and the key that says which replica it belongs to."""
        started = time.perf_counter()
        mark = self.tenants.cache_salt(tenant)
        frames: list[SplitFrame] = []
        if chat.urls:
            fetching = fetch_images(chat, self.settings.limits, self.fetcher, self._in_thread)
            for data in await _unless_gone(request, fetching):
                frames.append(await self._in_thread(self._split, data, mark))
            self.metrics.split.observe(time.perf_counter() - started)
            self._count_frames(frames)
        body = await self._in_thread(self._body, chat, frames, mark)
        background = next((frame.background for frame in frames if frame.background is not None), None)
        return body, None if background is None else mark + background.key

    def _split(self, data: bytes, mark: str) -> SplitFrame:
        # Decoded one at a time, and forgotten: a megabyte of a request can hold a gigabyte of pixels.
        limit = self.settings.limits.image_pixels
        image = open_image(data, limit)
        if getattr(self.processor.image_processor, "do_pad", False) and max(image.size) ** 2 > 4 * limit:
            raise ApiError(
                413,
                f"an image has {image.width} x {image.height} pixels, and the model pads it to a square; wanted at most "
                f"{4 * limit:,} pixels then",
                "image_too_large",
            )
        try:
            return self.splitter.split(image, mark, self.settings.split, self.settings.split)
        except (ValueError, AttributeError, RecursionError) as error:  # a patch group that is none
            raise ApiError(400, f"an image cannot be split: {str(error):.300}", "invalid_image") from None

    def _body(self, chat: ChatRequest, frames: list[SplitFrame], mark: str) -> bytes:
        parts = [[item.part(f"{mark}-") for item in frame.items] for frame in frames]
        body = with_images(chat, parts) | {"cache_salt": mark}
        body["logit_bias"] = (chat.body.get("logit_bias") or {}) | suppressed_tokens(self.processor)
        if chat.streams:
            # For our own count; the client gets it if it asked.
            body["stream_options"] = {"include_usage": True}
        body.pop("model", None)
        try:
            return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (ValueError, RecursionError) as error:  # NaN, half a surrogate pair
            raise ApiError(400, f"the body holds what JSON does not: {error}", "invalid_body") from None

    def _route(self, key: str | None) -> list[Replica]:
        return self.replicas.least_busy() if key is None else self.replicas.ranked(key)

    async def _send(self, body: bytes, key: str | None) -> httpx.Response:
        """The answer of the first replica that gives one."""
        try:
            async with self._working_replica(body, key, {}, stream=False) as response:
                return response
        except httpx.ReadTimeout:
            raise self._no_answer(self.settings.limits.answer_seconds) from None

    @contextlib.asynccontextmanager
    async def _working_replica(
        self, body: bytes, key: str | None, tried: dict[str, None], stream: bool
    ) -> AsyncIterator[httpx.Response]:
        """The response of the first replica in rank that answers: read, or, streaming, begun.

        Args:
            tried: those asked before, which are passed over; grows.

        Raises:
            ApiError: 502, none is left.
            httpx.ReadTimeout: one is silent; it may have much to do, so no other is asked.
        """
        reasons, limits = [], self.settings.limits
        for replica in self._route(key):
            if not replica.up or replica.url in tried:
                continue
            if tried:
                self.metrics.retries.inc()
            tried[replica.url] = None
            name = json.dumps(self._names[replica.url]).encode()
            call = self.client.build_request(
                "POST",
                f"{replica.url}/v1/chat/completions",
                content=b'{"model":' + name + b"," + body[1:],
                headers={"Content-Type": "application/json"},
                # Without streaming nothing is heard until all of the answer is there.
                timeout=httpx.Timeout(
                    limits.first_token_seconds if stream else limits.answer_seconds, connect=CONNECT_SECONDS
                ),
            )
            replica.in_flight += 1
            try:
                try:
                    response = await self.client.send(call, stream=stream)
                except httpx.ReadTimeout:
                    raise
                except httpx.HTTPError as error:
                    self._lost(replica, error)
                    reasons.append(type(error).__name__)
                    continue
                if response.status_code in REPLICA_FAILURES:
                    # Perhaps the request's fault, which must not take all replicas from everybody: /health will tell.
                    await response.aclose()
                    self.metrics.replica_errors.labels(replica.url).inc()
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
        raise ApiError(502, f"no replica could answer: {why}", "no_replica", self.settings.health_seconds)

    def _lost(self, replica: Replica, error: httpx.HTTPError) -> None:
        self.metrics.replica_errors.labels(replica.url).inc()
        self.replicas.down(replica, type(error).__name__)

    def _no_answer(self, seconds: float) -> ApiError:
        return ApiError(504, f"no answer from the engine within {seconds:g} s", "engine_timeout")

    async def _stream(self, request, chat, body, key, started, place) -> Response:
        """The answer as server-sent events; a replica that fails before the first one is replaced unnoticed."""
        shows_usage = bool((chat.body.get("stream_options") or {}).get("include_usage"))
        tried: dict[str, None] = {}  # in order
        first = None
        while first is None:
            lines = self._lines(body, key, tried)
            try:
                first = await _unless_gone(request, anext(lines))
            except httpx.ReadTimeout:
                raise self._no_answer(self.settings.limits.first_token_seconds) from None
            except httpx.HTTPError:
                continue  # its replica is down now
            except StopAsyncIteration:
                raise ApiError(502, "the engine ended its answer before it began", "engine_failed") from None
            if isinstance(first, bytes) and _is_failure(first):
                # An engine whose core died says so inside a 200; nothing of an answer was sent yet.
                await lines.aclose()
                self.metrics.replica_errors.labels(next(reversed(tried))).inc()
                first = None
        if isinstance(first, httpx.Response):
            await lines.aclose()
            place.close()
            return Response(first.content, first.status_code, media_type="application/json")

        async def events() -> AsyncIterator[bytes]:
            self.metrics.first_token.observe(time.perf_counter() - started)
            line, last, reason = first, b"", "it ended"
            try:
                while True:
                    last = line
                    if not self._is_usage(line) or shows_usage:
                        yield line + b"\n\n"
                    line = await anext(lines)
            except StopAsyncIteration:
                pass
            except httpx.HTTPError as error:
                reason = type(error).__name__
            finally:
                await lines.aclose()
            if last != b"data: [DONE]":
                problem = ApiError(502, f"the engine was lost during the answer ({reason})", "engine_lost")
                yield b"data: " + json.dumps(problem.body()).encode() + b"\n\n"

        return _Events(events(), lines, place, self.settings.limits.answer_seconds)

    async def _lines(
        self, body: bytes, key: str | None, tried: dict[str, None]
    ) -> AsyncIterator[bytes | httpx.Response]:
        """Lines of a streamed answer; or one response, read, where the engine refused."""
        async with self._working_replica(body, key, tried, stream=True) as response:
            if response.status_code != 200:
                await response.aread()
                yield response
                return
            rest = b""
            async for part in response.aiter_bytes():
                # httpx's own lines end at U+2028 and the like too, which stand in answers.
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line := line.rstrip(b"\r"):
                        yield line
            if rest:
                yield rest

    # ---- helpers

    def _is_usage(self, line: bytes) -> bool:
        """Whether a line carries the usage and nothing else; counts it."""
        if not line.startswith(b"data: {") or b'"usage"' not in line:
            return False
        with contextlib.suppress(ValueError):
            chunk = json.loads(line[len(b"data: ") :])
            if chunk.get("usage"):
                self._count_usage(chunk["usage"])
                return not chunk.get("choices")
        return False

    def _count_usage(self, usage: dict | None) -> None:
        if not usage:
            return
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.metrics.prompt_tokens.labels("cached").inc(cached)
        self.metrics.prompt_tokens.labels("computed").inc(max(0, usage.get("prompt_tokens", 0) - cached))

    def _count_frames(self, frames: list[SplitFrame]) -> None:
        for frame in frames:
            self.metrics.images.labels("known" if frame.reused else "new").inc()
            self.metrics.patches.labels("reused").inc(frame.reused)
            self.metrics.patches.labels("fresh").inc(frame.total - frame.reused)

    def _in_thread(self, function, *arguments):
        return asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments))

    def _refusal(self, problem: ApiError) -> Response:
        return JSONResponse(problem.body(), problem.status, problem.headers())


def _no_key() -> ApiError:
    return ApiError(401, "the Authorization header has no known key; wanted Bearer KEY", "invalid_api_key")


async def _not_found(request: Request, error) -> Response:
    problem = ApiError(
        error.status_code,
        f"{request.method} {request.url.path} is not served; wanted POST /v1/chat/completions or GET /v1/models",
        "not_found",
    )
    return JSONResponse(problem.body(), problem.status)


async def _read_body(request: Request, limits: Limits) -> bytes:
    """The body, as long as it is within its bounds; what is beyond is not read."""
    too_long = ApiError(413, f"the body has more than {limits.body_bytes:,} bytes", "body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limits.body_bytes:
        raise too_long

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limits.body_bytes:
                raise too_long
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), limits.read_seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {limits.read_seconds:g} s", "body_too_slow"
        ) from None


async def _unless_gone(request: Request, work):
    """Awaits work, and gives it up when the client has left."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _is_failure(line: bytes) -> bool:
    """Whether a streamed line is the engine's own error and not one of the request."""
    if not line.startswith(b'data: {"error"'):
        return False
    with contextlib.suppress(ValueError):
        error = json.loads(line[len(b"data: ") :])["error"]
        code = error.get("code") if isinstance(error, dict) else None
        return not isinstance(code, int) or code >= 500
    return True


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Events(StreamingResponse):
    """Server-sent events whose place is freed even where the client left before the first one, or reads no further."""

    def __init__(
        self,
        events: AsyncIterator[bytes],
        lines: AsyncIterator,
        place: contextlib.ExitStack,
        seconds: float,
    ):
        super().__init__(events, media_type="text/event-stream")
        self._generators, self._place, self._seconds = (events, lines), place, seconds

    async def __call__(self, scope, receive, send) -> None:
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._seconds)
        except asyncio.TimeoutError:
            # The server closes a connection whose answer is not complete: the client sees that it was cut off.
            logger.warning("an answer was cut off after %g s", self._seconds)
        finally:
            for generator in self._generators:
                await generator.aclose()
            self._place.close()


def make_app(settings: GatewaySettings, **parts) -> Starlette:
    """The gateway as an ASGI application; `parts` are `Gateway`'s other arguments."""
    return Gateway(settings, **parts).app()
