"""A gateway in front of vLLM for clients that cannot change: ordinary images in, patch groups out.

It takes chat completion requests, splits their images (with references kept per tenant), sends them to the replica that
their background belongs to, and passes the answer back. Cache salts and uuids are set here and nowhere else, so that no
tenant can reach another's entries in the engine's prefix and encoder caches.

    request -> tenant -> slot -> body -> chat request -> images -> groups -> replica -> answer
    errors:     401      429   408, 413    400, 404     400, 413, 504       502, 504

The files follow a request: `tenants`, `admission`, `request_body`, `chat` and `fields`, `request_images`, `frames`,
`engine_request`, `dispatch` and `replicas`, `streaming` and `answers`.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from backdrop.processing.processing_backdrop import BackdropProcessor

from .admission import Admission, Slot
from .answers import plain_answer, refusal
from .chat import ChatRequest, read_chat
from .client import GATEWAY_MARK
from .disconnects import unless_disconnected
from .dispatch import CONNECT_SECONDS, Dispatcher
from .engine_request import EngineRequest, engine_request
from .frames import FrameSplitter
from .image_fetching import ImageFetcher
from .metrics import GatewayMetrics
from .problems import ApiError
from .prompts import engine_probe
from .replicas import Replica, Replicas
from .request_body import parse_body, read_body
from .request_images import fetch_images, split_image
from .settings import GatewaySettings
from .streaming import AnswerStreamer
from .tenants import Tenants

logger = logging.getLogger(__name__)

# Shorter than a server keeps idle connections (uvicorn: 5): a request on a connection that the server is just closing
# would look like the replica's failure.
KEEPALIVE_SECONDS = 3.0
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; nobody reads it but the metrics


class Gateway:
    """The application's state and its handlers.

    Args:
        settings: see `GatewaySettings`.
        processor: the served model's; None: loaded from where the settings, or the engine, say.
        upstream: replaces the network between gateway and engines; for tests.
        fetcher: replaces the one that the settings ask for; for tests.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        processor: BackdropProcessor | None = None,
        upstream: httpx.AsyncBaseTransport | None = None,
        fetcher: ImageFetcher | None = None,
    ):
        self.settings, self._processor = settings, processor
        limits = settings.limits
        self.metrics = GatewayMetrics()
        self.tenants = Tenants(settings)
        self.admission = Admission(limits, self.metrics)
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
            settings.replicas, self.client, self._probe, settings.health_seconds, self._show_replica
        )
        for replica in self.replicas.replicas:  # so that the metrics name one that never comes up
            self._show_replica(replica)
        self.dispatcher = Dispatcher(settings, self.replicas, self.client, self.metrics)
        self.streamer = AnswerStreamer(self.dispatcher, limits, self.metrics)
        self._splitter: FrameSplitter | None = None
        self.model: str | None = None  # the name that clients see: the first replica's that came up
        self.workers = ThreadPoolExecutor(settings.workers, "backdrop-split")

    @property
    def processor(self) -> BackdropProcessor:
        """The served model's; a `RuntimeError` until `lifespan` has loaded it, where none was given."""
        if self._processor is None:
            raise RuntimeError("the gateway has no processor yet; wanted its lifespan to be entered first.")
        return self._processor

    @property
    def splitter(self) -> FrameSplitter:
        """Splits the images and holds all tenants' references; a `RuntimeError` until `lifespan` has made it."""
        if self._splitter is None:
            raise RuntimeError("the gateway has no splitter yet; wanted its lifespan to be entered first.")
        return self._splitter

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
            ],
            lifespan=self.lifespan,
            exception_handlers={404: _not_found, 405: _not_found},
        )

    # ---- starting and stopping

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette | None = None) -> AsyncIterator[None]:
        """Loads processor and detector and watches the replicas, until the application stops.

        Raises:
            ValueError: no processor was given, and no replica says where its model is.
        """
        try:
            if self._processor is None:
                source = self.settings.processor or await self._engine_source()
                self._processor = await self._in_thread(BackdropProcessor.from_pretrained, source)
            self._splitter = FrameSplitter(
                self.processor, fit=self.settings.fit, **self.settings.matching.model_dump()
            )
            if self.settings.split:
                await self._in_thread(self.splitter.load_detector)  # now, not within the first request
            await self.replicas.start()
            yield
        finally:
            await self.replicas.stop()
            await self.client.aclose()
            await self.fetcher.aclose()
            self.workers.shutdown(wait=False, cancel_futures=True)

    async def _engine_source(self) -> str:
        for url in self.settings.replicas:
            with contextlib.suppress(httpx.HTTPError, LookupError, TypeError, ValueError):
                return (await self.client.get(f"{url}/v1/models")).json()["data"][0]["root"]
        raise ValueError(
            "no replica says where its model is; set `processor` to the served model's folder or Hub id."
        )

    async def _probe(self, replica: Replica) -> None:
        """Raises for an engine that does not read patch groups; learns its name for the model."""
        answer = (await self.client.get(f"{replica.url}/v1/models", timeout=CONNECT_SECONDS)).json()
        name = answer["data"][0]["id"]
        body, check = engine_probe(self.processor, self.splitter, name)
        found = await self.client.post(f"{replica.url}/v1/chat/completions", json=body)
        if found.status_code != 200:
            raise ValueError(f"the engine answers a patch group with {found.status_code}: {found.text[:200]}")
        check(found.json()["usage"]["prompt_tokens"])
        replica.model = name
        self.model = self.model or name

    def _show_replica(self, replica: Replica) -> None:
        self.metrics.replica_up.labels(replica.url).set(replica.up)

    # ---- handlers

    async def health(self, request: Request) -> Response:
        """`GET /health`: the state of each replica; status 200 while one is up."""
        states = {
            replica.url: "up" if replica.up else f"down: {replica.reason}"
            for replica in self.replicas.replicas
        }
        return JSONResponse({"replicas": states}, status_code=200 if self.replicas.any_up else 503)

    async def show_metrics(self, request: Request) -> Response:
        """`GET /metrics`, in Prometheus' text format."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: the one model, marked so that `BackdropClient` leaves the splitting to the gateway."""
        try:
            self._tenant_of(request)
            model = {
                "id": self._served_model(),
                "object": "model",
                "created": 0,
                "owned_by": "backdrop",
                GATEWAY_MARK: True,
            }
        except ApiError as problem:
            return refusal(problem)
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`. Every response names its request in the header x-request-id, as the log does."""
        started = time.perf_counter()
        name = uuid.uuid4().hex
        try:
            tenant = self._tenant_of(request)
            slot = await self.admission.acquire()
            try:
                response = await self._answer(request, tenant, started, slot)
            except BaseException:
                slot.release()
                raise
        except ApiError as problem:
            response = refusal(problem)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception:
            logger.exception("request %s", name)
            response = refusal(
                ApiError(500, f"the gateway failed; its log names request {name}", "gateway_error")
            )
        response.headers["x-request-id"] = name
        self.metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def _answer(self, request: Request, tenant: str, started: float, slot: Slot) -> Response:
        """The answer to a chat request; `slot` is released when it has ended, unless this raises."""
        model = self._served_model()
        data = await read_body(request, self.settings.limits)
        chat = await self._in_thread(self._read_chat, data, model)
        del data  # as large as its images
        sent = await self._for_engine(chat, self.tenants.cache_salt(tenant), request)
        if chat.streams:
            return await self.streamer.answer(request, chat, sent, started, slot)
        answer = await unless_disconnected(request, self.dispatcher.send(sent))
        self.metrics.first_token.observe(time.perf_counter() - started)
        if answer.status_code == 200:
            self.metrics.count_usage(answer.json().get("usage"))
        slot.release()
        return plain_answer(answer)

    # ---- from the client's request to the engine's

    def _read_chat(self, data: bytes, model: str) -> ChatRequest:
        limits, tokenizer = self.settings.limits, self.processor.tokenizer
        body = parse_body(data, limits.body_values)
        special = list(tokenizer.all_special_tokens)
        special += [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        return read_chat(body, limits, tuple(dict.fromkeys(special)), model)

    async def _for_engine(self, chat: ChatRequest, cache_salt: str, request: Request) -> EngineRequest:
        """Fetches, decodes and splits the images; references are the tenant's own, by its cache salt."""
        limits, frames = self.settings.limits, []
        if chat.images:
            started = time.perf_counter()
            urls = [image.url for image in chat.images]
            fetching = fetch_images(urls, limits, self.fetcher, self._in_thread)
            for data in await unless_disconnected(request, fetching):
                splitting = split_image, data, self.splitter, cache_salt, limits, self.settings.split
                frames.append(await self._in_thread(*splitting))
            self.metrics.split.observe(time.perf_counter() - started)
            self.metrics.count_frames(frames)
        return await self._in_thread(engine_request, chat, frames, cache_salt, self.processor)

    # ---- helpers

    def _tenant_of(self, request: Request) -> str:
        tenant = self.tenants.of(request.headers.get("authorization"))
        if tenant is None:
            message = "the Authorization header has no known key; wanted Bearer KEY"
            raise ApiError(401, message, "invalid_api_key")
        return tenant

    def _served_model(self) -> str:
        if self.model is None:
            raise ApiError(503, "no replica is up", "no_replica", self.settings.health_seconds)
        return self.model

    def _in_thread(self, function: Callable, *arguments: Any) -> asyncio.Future:
        return asyncio.get_running_loop().run_in_executor(self.workers, partial(function, *arguments))


async def _not_found(request: Request, error: HTTPException) -> Response:
    return refusal(
        ApiError(
            error.status_code,
            f"{request.method} {request.url.path} is not served; wanted POST /v1/chat/completions or GET /v1/models",
            "not_found",
        )
    )


def make_app(settings: GatewaySettings, **parts: Any) -> Starlette:
    """The gateway as an ASGI application; `parts` are `Gateway`'s other arguments."""
    return Gateway(settings, **parts).app()
