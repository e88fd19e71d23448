"""A stand-in for vLLM's OpenAI server on an exported folder, and a thread that runs any ASGI application on loopback.

It counts prompt tokens as the real one does, from the parts it receives. Its answers name the background that it was
shown, so that a mix-up is seen. It keeps what it was asked, and fails in the ways it is told to.
"""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable
from io import BytesIO

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from backdrop.processing.patch_groups_backdrop import (
    BACKGROUND,
    GROUP_KINDS,
    METADATA_KEY,
    PatchGroup,
    read_group,
)
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.serving.frames import GroupItem
from backdrop.serving.prompts import prompt_text, prompt_tokens

PIECE = 16  # characters of an answer in one event


class _FastSleep:
    """asyncio, as uvicorn sees it: `Server.shutdown` sleeps for a tenth of a second whatever there is to wait for."""

    def __getattr__(self, name):
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.005))


uvicorn.server.asyncio = _FastSleep()


def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Returns as soon as a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class AppThread:
    """An ASGI application under uvicorn, on a loop of its own: `with AppThread(app) as server: server.url`.

    A stopped one can be started again, on the same port.
    """

    def __init__(self, app):
        self.app, self.port = app, 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self.server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not stopped since."""
        return self._thread is not None

    def start(self) -> None:
        """Returns once it listens."""
        config = uvicorn.Config(
            self.app,
            host="127.0.0.1",
            port=self.port,
            http="h11",
            log_level="critical",
            lifespan="on",
            timeout_graceful_shutdown=10,
        )
        self.server = uvicorn.Server(config)
        begun = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(begun),), daemon=True)
        self._thread.start()
        begun.wait()
        assert self.server.started, "the application did not start"
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    async def _serve(self, begun: threading.Event) -> None:
        # As `Server.serve`, which checks only ten times a second whether it should end.
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        try:
            self.server.config.load()
            self.server.lifespan = self.server.config.lifespan_class(self.server.config)
            await self.server.startup()
        finally:
            begun.set()
        if self.server.started:
            await self._end.wait()
            await self.server.shutdown()

    def end(self) -> None:
        """Tells it to stop, and returns at once."""
        self.loop.call_soon_threadsafe(self._end.set)

    def stop(self) -> None:
        """Returns once the requests that are running have been answered and it has stopped."""
        if self._thread is not None:
            self.end()
            self._thread.join(15)
            assert not self._thread.is_alive(), "requests are still running"
            self._thread = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def tasks(self) -> list[str]:
        """Names of the coroutines on its loop."""
        found = []

        def look():
            found.extend(task.get_coro().__qualname__ for task in asyncio.all_tasks(self.loop))

        self.call(look)
        return found

    def call(self, function) -> None:
        """Runs a function on the loop."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(5)


class FakeEngine(AppThread):
    """`with FakeEngine(processor) as engine: client of engine.url + "/v1"`.

    Attributes:
        name, root, context: of the model, in /v1/models; context is its max_model_len, None: not told.
        prompts: texts that the chat template made of the requests, but for probes.
        sees_alpha: False: images are taken for RGB, as vLLM does without `--media-io-kwargs`.
        mode: what happens to every request but the probe:
            "answer";
            "500", "503", "400": that status; "slow 400": after a step;
            "close": the connection is closed without an answer;
            "hang": nothing, until the caller leaves;
            "early death", "late death": a stream's connection breaks before, after its first event;
            "empty": a stream ends before its first event;
            "no core", "refusal": a stream whose first event is an error: the engine's own, the request's;
            "cut": a stream ends properly, but without its end mark;
            "slow": a stream's events come one by one as `step` is called; plain answers after the first step.
        probe_mode: what happens to the probe.
        modes: what happens to the next requests instead, in order.
        healthy: False: /health answers 503.
        text: the answer; None: the background's uuid and the question.
        calls: tool calls of the answer.
        requests: bodies, but for probes.
        probes: how many came.
        cancelled: how many callers left while they were waiting.
        groups: by uuid, what was sent under it.
        mixed_up: uuids under which two different groups came.
    """

    def __init__(self, processor: BackdropProcessor, name: str = "backdrop", root: str = "nowhere"):
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        super().__init__(Starlette(routes=routes))
        self.processor, self.name, self.root = processor, name, root
        self.reset()

    def reset(self) -> None:
        """Forgets every request, and every way to fail."""
        self.sees_alpha, self.healthy, self.text = True, True, None
        self.context: int | None = None
        self.calls: list[dict] = []
        self.prompts: list[str] = []
        self.mode = self.probe_mode = "answer"
        self.modes: list[str] = []
        self.requests: list[dict] = []
        self.probes = self.cancelled = self.running = 0
        self.groups: dict[str, PatchGroup] = {}
        self.mixed_up: list[str] = []
        self._known: set[tuple] = set()
        self._steps = threading.Semaphore(0)

    def step(self, count: int = 1) -> None:
        """Releases so many events of the mode "slow"."""
        self._steps.release(count)

    def parts(self, number: int = -1) -> list[dict]:
        """The image parts of a request."""
        return image_parts(self.requests[number]["messages"])

    # ---- handlers

    async def _health(self, request: Request) -> Response:
        return Response(status_code=200 if self.healthy else 503)

    async def _models(self, request: Request) -> Response:
        card = {"id": self.name, "object": "model", "root": self.root}
        if self.context is not None:
            card["max_model_len"] = self.context
        return JSONResponse({"object": "list", "data": [card]})

    async def _chat(self, request: Request) -> Response:
        body = json.loads(await request.body())
        if body["model"] != self.name:
            return JSONResponse({"error": {"message": f"no model {body['model']}"}}, 404)
        if body.get("max_tokens") == 1 and body["messages"][-1]["content"][-1].get("text") == "?":
            self.probes += 1
            mode = self.probe_mode
        else:
            self.requests.append(body)
            mode = self.modes.pop(0) if self.modes else self.mode
        self.running += 1
        try:
            if mode == "slow 400" and await self._stepped(request):
                mode = "400"
            if mode.isdecimal():
                return JSONResponse({"error": {"message": f"refused with {mode}"}}, int(mode))
            if mode == "close":
                self._break_connection(request)
                return Response()
            if mode == "hang":
                await self._until_gone(request)
                return Response()
            answer = self._answer(body)
            if body.get("stream"):
                self.running += 1  # until the stream's end
                return StreamingResponse(self._events(body, answer, mode), media_type="text/event-stream")
            if mode == "slow" and not await self._stepped(request):
                return Response()
            return JSONResponse(answer)
        finally:
            self.running -= 1

    def _answer(self, body: dict) -> dict:
        sees_alpha = self.sees_alpha  # a test may set it while this request is read
        groups = [(part.get("uuid"), self._group(part, sees_alpha)) for part in image_parts(body["messages"])]
        for uuid, group in groups if sees_alpha else ():
            known = self.groups.setdefault(uuid, group)
            if not all(
                map(np.array_equal, (known.pixels, known.patch_mask), (group.pixels, group.patch_mask))
            ):
                self.mixed_up.append(uuid)
        items = [
            GroupItem(GROUP_KINDS[group.kind], int(group.patch_mask.sum()), "", b"") for _, group in groups
        ]
        text = prompt_text(self.processor, body["messages"], body.get("tools"))
        if any(each is body for each in self.requests):
            self.prompts.append(text)
        tokens = prompt_tokens(self.processor, text, items)
        background = next((uuid for uuid, group in groups if group.kind == BACKGROUND), None)
        key = (body.get("cache_salt"), background)
        cached = items[0].patches if items and key in self._known else 0
        self._known.add(key)
        text = self.text if self.text is not None else f"{background} | {question_of(body)}"
        message = {"role": "assistant", "content": text}
        if self.calls:
            message["tool_calls"] = self.calls
        return {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": self.name,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": tokens,
                "completion_tokens": 3,
                "total_tokens": tokens + 3,
                "prompt_tokens_details": {"cached_tokens": cached},
            },
        }

    def _group(self, part: dict, sees_alpha: bool) -> PatchGroup:
        if sees_alpha:
            return group_of(part, self.processor)
        pixels = np.asarray(image_of(part).convert("RGB"))
        patches = (pixels.shape[0] // self.processor.image_processor.patch_size) ** 2
        return PatchGroup(pixels, np.ones(patches, dtype=bool), BACKGROUND)

    async def _events(self, body: dict, answer: dict, mode: str):
        text, done = answer["choices"][0]["message"]["content"], False
        pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
        head = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "created": 0, "model": self.name}
        try:
            if mode in ("no core", "refusal"):
                error = {"message": mode, "code": 500 if mode == "no core" else 400}
                yield event({"error": error})
                yield b"data: [DONE]\n\n"
                done = True
                return
            if mode == "early death":
                raise ConnectionAbortedError
            for piece in pieces if mode != "empty" else []:
                if mode == "slow":
                    await self._stepped(None)
                delta = {"role": "assistant", "content": piece}
                yield event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                if mode == "late death":
                    raise ConnectionAbortedError
            for number, call in enumerate(self.calls):
                arguments = call["function"]["arguments"]
                for piece in ("", arguments[:5], arguments[5:]):
                    function = {"arguments": piece} if piece else {"name": call["function"]["name"]}
                    part = {"index": number, "function": function, **({} if piece else {"id": call["id"]})}
                    delta = {"tool_calls": [part]}
                    yield event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            if mode not in ("cut", "empty"):
                yield event(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                if (body.get("stream_options") or {}).get("include_usage"):
                    yield event(head | {"choices": [], "usage": answer["usage"]})
                yield b"data: [DONE]\n\n"
            done = True
        finally:
            self.running -= 1
            self.cancelled += not done and "death" not in mode

    async def _stepped(self, request: Request | None) -> bool:
        """Waits for a step; False: the caller left before."""
        while not self._steps.acquire(blocking=False):
            if request is not None and await request.is_disconnected():
                self.cancelled += 1
                return False
            await asyncio.sleep(0.002)
        return True

    async def _until_gone(self, request: Request) -> None:
        while not await request.is_disconnected() and not self._end.is_set():
            await asyncio.sleep(0.002)
        self.cancelled += 1

    def _break_connection(self, request: Request) -> None:
        for connection in list(self.server.server_state.connections):
            if connection.client == tuple(request.client):
                connection.transport.abort()


def event(values: dict) -> bytes:
    # As vLLM: not escaped.
    return b"data: " + json.dumps(values, ensure_ascii=False).encode() + b"\n\n"


def image_parts(messages: list[dict]) -> list[dict]:
    """The image parts of messages, in order."""
    return [
        part
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]


def image_of(part: dict) -> Image.Image:
    """The image that a part carries."""
    return Image.open(BytesIO(base64.b64decode(part["image_url"]["url"].split(",", 1)[1])))


def group_of(part: dict, processor: BackdropProcessor) -> PatchGroup:
    """The patch group that a part carries, read and checked as the model's processor does."""
    image, images = image_of(part), processor.image_processor
    pixels = np.asarray(image)
    return read_group(pixels, pixels.shape[0], images.patch_size, images.geometry(), image.info[METADATA_KEY])


def question_of(body: dict) -> str:
    """The last text."""
    content = body["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return next((part["text"] for part in reversed(content) if part["type"] == "text"), "")


def red_processor() -> BackdropProcessor:
    """The processor of the root's fixture `processor`, for fixtures that live longer than a test."""
    import tiny
    from red_detector import RedDetector

    from backdrop.hub_export.chat_template import chat_template
    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

    side = {"height": tiny.SIDE, "width": tiny.SIDE}
    images = BackdropImageProcessor(
        size={"shortest_edge": tiny.SIDE}, crop_size=side, patch_size=tiny.PATCH, margin=0
    )
    images.set_detector(RedDetector())
    tokenizer = tiny.tokenizer()
    BackdropProcessor.add_tokens(tokenizer)
    return BackdropProcessor(images, tokenizer, chat_template=chat_template(system_prompt=""))


def red_scene(x: int = 0, y: int = 0, shade: int = 90, width: int = 14) -> Image.Image:
    """56 px: a grey gradient, its shade telling one background from another, and one red square; width 0: none."""
    pixels = np.full((56, 56, 3), shade, dtype=np.uint8)
    pixels[..., 2] = np.arange(56)[:, None] * 3
    pixels[y : y + width, x : x + width] = (255, 0, 0)
    return Image.fromarray(pixels)


def data_url(image: Image.Image, kind: str = "PNG", **options) -> str:
    """An image as it stands in a request."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
