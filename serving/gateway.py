"""A gateway in front of vLLM for clients that cannot change: ordinary images in, patch groups out.

It takes chat completion requests, splits their images (with references kept per tenant), sends them to the replica that
their background belongs to, and passes the answer back. Cache salts and uuids are set here and nowhere else, so that no
tenant can reach another's entries in the engine's prefix and encoder caches.

    request -> tenant -> slot -> body -> chat request -> images -> groups -> prompt -> replica -> answer
    errors:     401      429   408, 413    400, 404     400, 413, 504         400    502, 504

The files follow a request: `tenants`, `admission`, `request_body`, `responses_api`, `chat` (with `fields`, `content`,
`control` and `special_tokens`), `request_images`, `frames`, `engine_request` and `prompts`, `dispatch` and `replicas`,
`streaming`, `answers` and `sight`. Beside them stands `admin`.
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
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from backdrop.processing.processing_backdrop import BackdropProcessor

from .admin import Admin
from .admission import Admission, Slot
from .answers import plain_answer, refusal
from .chat import ChatRequest, read_chat
from .client import GATEWAY_MARK
from .control import Control, header_control
from .disconnects import unless_disconnected
from .dispatch import CONNECT_SECONDS, Dispatcher
from .engine_request import EngineRequest, engine_request, too_long
from .frames import FrameSplitter, SplitFrame
from .image_fetching import ImageFetcher
from .metrics import GatewayMetrics
from .problems import ApiError
from .prompts import Context, engine_probe, item_tokens
from .replicas import Replica, Replicas
from .request_body import parse_body, read_body
from .request_images import fetch_images, split_image
from .responses_api import ResponsesRequest
from .settings import GatewaySettings
from .sight import Sight
from .special_tokens import SpecialTokens
from .streaming import AnswerStreamer
from .tenants import EVERYBODY, Tenants

logger = logging.getLogger(__name__)

# Shorter than a server keeps idle connections (uvicorn: 5): a request on a connection that the server is just closing
# would look like the replica's failure.
KEEPALIVE_SECONDS = 3.0
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that left; nobody reads it but the metrics
OWN_HEADERS = [
    "x-request-id",
    "server-timing",
    *(
        f"x-backdrop-{name}"
        for name in ("reference", "ignored", "patches-reused", "patches-fresh", "patches-stale")
    ),
]  # which pages of other origins may read


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
        self.admin = Admin(settings, self.tenants, self.replicas, lambda: self.splitter.matcher)
        self._splitter: FrameSplitter | None = None
        self._special: SpecialTokens | None = None
        self._context: Context | None = None
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
        """The ASGI application. Its paths are there with and without /v1, as clients' base URLs are."""
        api = [
            ("/chat/completions", self.chat, "POST"),
            ("/responses", self.responses, "POST"),
            ("/completions", self.completions, "POST"),
            ("/models", self.models, "GET"),
            ("/models/{name:path}", self.one_model, "GET"),
        ]
        origins = self.settings.cors_origins
        cors = Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=OWN_HEADERS,
        )
        return Starlette(
            routes=[
                *(
                    Route(base + path, handler, methods=[method])
                    for base in ("/v1", "")
                    for path, handler, method in api
                ),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
                *self.admin.routes(),
            ],
            middleware=[cors] if origins else [],
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
            self._special = SpecialTokens(self.processor.tokenizer)
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
        context = answer["data"][0].get("max_model_len")
        body, check = engine_probe(self.processor, self.splitter, name)
        found = await self.client.post(f"{replica.url}/v1/chat/completions", json=body)
        if found.status_code != 200:
            raise ValueError(f"the engine answers a patch group with {found.status_code}: {found.text[:200]}")
        check(found.json()["usage"]["prompt_tokens"])
        replica.model = name
        replica.context = context if isinstance(context, int) and context > 0 else None
        self.model = self.model or name

    def _show_replica(self, replica: Replica) -> None:
        self.metrics.replica_up.labels(replica.url).set(replica.up)

    # ---- handlers

    async def health(self, request: Request) -> Response:
        """`GET /health`: status 200 while a replica is up. Which ones there are is told to keepers only."""
        up = self.replicas.any_up
        state: dict[str, Any] = {"status": "ok" if up else "no replica is up"}
        if self.tenants.keeper(request.headers.get("authorization")) == EVERYBODY:
            state["replicas"] = self.replicas.states()
        return JSONResponse(state, status_code=200 if up else 503)

    async def show_metrics(self, request: Request) -> Response:
        """`GET /metrics`, in Prometheus' text format."""
        authorization = request.headers.get("authorization")
        if self.settings.admin_keys and self.tenants.keeper(authorization) != EVERYBODY:
            return refusal(ApiError(401, "the Authorization header has no key of /admin", "invalid_api_key"))
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: the one model, marked so that `BackdropClient` leaves the splitting to the gateway."""
        try:
            return JSONResponse({"object": "list", "data": [self._model_card(request)]})
        except ApiError as problem:
            return refusal(problem)

    async def one_model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        try:
            model, name = self._model_card(request), request.path_params["name"]
            if name != model["id"]:
                message = f"the model {name!r:.200} is not served; wanted {model['id']!r}"
                raise ApiError(404, message, "model_not_found")
            return JSONResponse(model)
        except ApiError as problem:
            return refusal(problem)

    def _model_card(self, request: Request) -> dict:
        self._tenant_of(request)
        card = {
            "id": self._served_model(),
            "object": "model",
            "created": 0,
            "owned_by": "backdrop",
            GATEWAY_MARK: True,
        }
        context = self.replicas.context
        return card if context is None else card | {"max_model_len": context}

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`, which has no place for images. A 404 would have proxies take the server for dead."""
        message = (
            "texts without a chat are not completed here; wanted POST /v1/chat/completions with messages"
        )
        return refusal(ApiError(400, message, "not_served"))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`. Every response names its request in the header x-request-id, as the log does."""
        return await self._handle(request, None)

    async def responses(self, request: Request) -> Response:
        """`POST /v1/responses`, read as a chat."""
        return await self._handle(request, ResponsesRequest)

    async def _handle(self, request: Request, form: type[ResponsesRequest] | None) -> Response:
        started = time.perf_counter()
        name = uuid.uuid4().hex
        try:
            tenant = self._tenant_of(request)
            control = header_control(request.headers)
            sight = Sight(self.tenants.cache_salt(tenant), started=started)
            slot = await self.admission.acquire()
            sight.lap("wait")
            try:
                response = await self._answer(request, form, tenant, control, sight, slot)
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

    async def _answer(
        self,
        request: Request,
        form: type[ResponsesRequest] | None,
        tenant: str,
        control: Control,
        sight: Sight,
        slot: Slot,
    ) -> Response:
        """The answer to a request; `slot` is released when it has ended, unless this raises."""
        model = self._served_model()
        data = await read_body(request, self.settings.limits)
        chat, asked = await self._in_thread(self._read, data, form, model)
        del data  # as large as its images
        sight.ignored = chat.ignored
        sent = await self._for_engine(chat, control.over(chat.control), sight, request)
        self.tenants.count(tenant, requests=1, images=len(sight.frames), **_prefixed(sight.patches()))
        if chat.streams:
            response = await self.streamer.answer(request, chat, sent, sight, slot)
        else:
            answer = await unless_disconnected(request, self.dispatcher.send(sent))
            sight.lap("first_token")
            self.metrics.first_token.observe(sight.seconds["first_token"])
            if answer.status_code == 200:
                self.metrics.count_usage(answer.json().get("usage"))
            slot.release()
            response = plain_answer(answer, sight)
        return response if asked is None else asked.answer(response)

    # ---- from the client's request to the engine's

    def _read(
        self, data: bytes, form: type[ResponsesRequest] | None, model: str
    ) -> tuple[ChatRequest, ResponsesRequest | None]:
        """The chat that a body asks for, and, where it came by another API, what writes its answer."""
        body = parse_body(data, self.settings.limits.body_values)
        asked = None if form is None else form(body)
        if asked is not None:
            body = asked.chat()
        if self._special is None:
            raise RuntimeError("the gateway has no tokenizer yet; wanted its lifespan to be entered first.")
        chat = read_chat(body, self.settings.limits, self._special, model, self.settings.camera_from_user)
        chat.shows_usage |= asked is not None
        return chat, asked

    async def _for_engine(
        self, chat: ChatRequest, control: Control, sight: Sight, request: Request
    ) -> EngineRequest:
        """Fetches, decodes and splits the images; references are the tenant's own, by its cache salt."""
        limits, context = self.settings.limits, await self._in_thread(self._known_context)
        if chat.images:
            started = time.perf_counter()
            urls, tokens = [image.url for image in chat.images], 0
            fetching = fetch_images(urls, limits, self.fetcher, self._in_thread)
            for data in await unless_disconnected(request, fetching):
                frame = await self._in_thread(self._split, data, control, sight.salt)
                sight.frames.append(frame)
                tokens += sum(item_tokens(self.processor, item) for item in frame.items)
                if context is not None and tokens >= context.tokens:  # the other images need not be split
                    raise too_long(tokens, len(urls), context)
            sight.lap("images", started)
            self.metrics.split.observe(sight.seconds["images"])
            self.metrics.count_frames(sight.frames)
        return await self._in_thread(engine_request, chat, sight.frames, sight.salt, self.processor, context)

    def _split(self, data: bytes, control: Control, salt: str) -> SplitFrame:
        return split_image(
            data,
            self.splitter,
            control.namespace(salt),
            self.settings.limits,
            split=self.settings.split,
            match=control.matches,
            tolerance=control.limit,
        )

    def _known_context(self) -> Context | None:
        """The replicas' context; made anew only when it has changed."""
        tokens = self.replicas.context
        if tokens is None:
            return None
        if self._context is None or self._context.tokens != tokens:
            self._context = Context.of(self.processor, tokens)
        return self._context

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


def _prefixed(patches: dict[str, int]) -> dict[str, int]:
    return {f"patches_{name}": count for name, count in patches.items()}


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
