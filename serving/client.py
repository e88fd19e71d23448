"""A client that splits frames before it sends them, for vLLM serving an exported Backdrop folder.

    from backdrop.serving import BackdropClient

    client = BackdropClient("http://localhost:8000/v1")
    print(client.ask(frame, "How many vehicles are there?"))

    with client.camera("gate") as camera:  # references of its own, forgotten at the end
        for frame in frames:
            print(camera.ask(frame, "Is the barrier up?"))

A frame is sent as its patch groups, background first, with the pixels of the reference that the matcher found. So the
engine's prefix cache already has the background's keys and values, whatever objects are in front of it. To a Backdrop
gateway, which splits images itself, the client sends whole frames.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any, TypeAlias

import openai
from openai.types.chat import ChatCompletion
from PIL import Image, ImageOps

from backdrop.processing.image_loading_backdrop import array_to_image, load_image, rgb_array
from backdrop.processing.patch_groups_backdrop import METADATA_KEY, save_group
from backdrop.processing.processing_backdrop import BackdropProcessor

from .frames import FAST_COMPRESSION, Frame, FrameSplitter, SplitFrame
from .prompts import check_prompt_tokens, engine_probe, prompt_text, prompt_tokens, suppressed_tokens

Frames: TypeAlias = Frame | list[Frame] | tuple[Frame, ...]
ProcessorSource: TypeAlias = BackdropProcessor | str | os.PathLike[str]

GATEWAY_MARK = "backdrop_gateway"  # in a gateway's list of models


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    Attributes:
        text: the answer.
        prompt_tokens: of the whole prompt.
        cached_tokens: prompt tokens whose keys and values the engine had already; None where the engine does not tell
            (it needs `--enable-prompt-tokens-details`).
        patches, patches_reused: of all frames.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int | None
    patches: int
    patches_reused: int

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class PreparedRequest:
    """A request, ready to be sent.

    Attributes:
        body: arguments of `chat.completions.create`.
        tokens: of the prompt; None where a gateway splits the frames, and checks the count itself.
        frames: as they were split.
    """

    body: dict
    tokens: int | None
    frames: tuple[SplitFrame, ...]

    def answer(self, completion: ChatCompletion) -> Answer:
        """The answer of a completion.

        Raises:
            EngineMismatchError: the engine counted other tokens than the prompt has.
        """
        usage = completion.usage
        if self.tokens is not None:
            check_prompt_tokens(usage.prompt_tokens, self.tokens)
        details = usage.prompt_tokens_details
        told = (getattr(usage, "backdrop", None) or {}).get("patches", {})  # a gateway's
        reused = told.get("reused", sum(frame.reused for frame in self.frames))
        fresh = told.get("fresh", sum(frame.total - frame.reused for frame in self.frames))
        return Answer(
            text=(completion.choices[0].message.content or "").strip(),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=None if details is None else details.cached_tokens,
            patches=reused + fresh,
            patches_reused=reused,
        )


class Preparation:
    """Makes requests of frames and questions: what the synchronous and the asynchronous client share.

    Args:
        processor: of the served model, or its folder or Hub id; None: the engine says where it serves from.
        model: its name; None: the first one.
        tolerance, matching: see `FrameSplitter`.

    Attributes:
        ready: whether the engine has been probed.
        splitter: None until `choose_model`, and at a gateway.
    """

    def __init__(
        self, processor: ProcessorSource | None, model: str | None, tolerance: float, matching: dict[str, Any]
    ) -> None:
        self._given = processor
        self._wanted_model = model
        self._tolerance, self._matching = tolerance, matching
        self.ready = False
        self.splitter: FrameSplitter | None = None
        self._model: str | None = None
        self._processor: BackdropProcessor | None = None

    @property
    def model(self) -> str:
        """The model's name on the engine; a `RuntimeError` before `choose_model`."""
        if self._model is None:
            raise RuntimeError("no model is chosen yet; wanted the client to connect first.")
        return self._model

    @property
    def processor(self) -> BackdropProcessor:
        """The served model's; a `RuntimeError` before `choose_model`, and at a gateway, which has its own."""
        if self._processor is None:
            raise RuntimeError("no processor is loaded; wanted the client to connect first, to an engine.")
        return self._processor

    def choose_model(self, models: list) -> None:
        """Chooses one of the engine's models and loads its processor, unless the server is a gateway.

        Raises:
            ValueError: the model that was asked for is not among them.
        """
        names = [model.id for model in models]
        name = self._wanted_model or (names[0] if names else None)
        if name not in names:
            raise ValueError(f"the engine serves {names}; wanted {self._wanted_model or 'a model'}.")
        found = models[names.index(name)]
        if not getattr(found, GATEWAY_MARK, False) and self.splitter is None:
            given = self._given
            if given is None or isinstance(given, str | os.PathLike):
                given = BackdropProcessor.from_pretrained(given or getattr(found, "root", None) or name)
            self.splitter = FrameSplitter(given, self._tolerance, **self._matching)
            self._processor = given
        self._model = name

    def messages(
        self, frames: Sequence[Frame], question: str, system: str | None, namespace: str, match: bool
    ) -> tuple[list[dict], tuple[SplitFrame, ...]]:
        """The messages of a question, and its frames as they were split (at a gateway: none)."""
        splitter = self.splitter
        split: tuple[SplitFrame, ...] = ()
        if splitter is None:
            parts = [_whole_frame(frame) for frame in frames]
        else:
            split = tuple(splitter.split(frame, namespace, match) for frame in frames)
            parts = [item.part() for group in split for item in group.items]
        messages: list[dict] = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        return messages, split

    def prepare(
        self,
        frames: Frames,
        question: str,
        system: str | None,
        namespace: str,
        match: bool,
        options: dict[str, Any],
    ) -> PreparedRequest:
        """The request of a question; `options` are further fields of the API."""
        messages, split = self.messages(_listed(frames), question, system, namespace, match)
        body = {"model": self.model, "messages": messages, "temperature": 0.0, **options}
        if self.splitter is None:  # a gateway is told whose references, and whether, and says what it reused
            control = {"camera": namespace or None, "match": None if match else "off"}
            extra = body.get("extra_body") or {}
            body["extra_body"] = {**extra, "backdrop": {**control, **(extra.get("backdrop") or {})}}
            return PreparedRequest(body, None, ())
        body["logit_bias"] = suppressed_tokens(self.processor) | (options.get("logit_bias") or {})
        items = [item for frame in split for item in frame.items]
        text = prompt_text(self.processor, messages, options.get("tools"))
        return PreparedRequest(body, prompt_tokens(self.processor, text, items), split)

    def probe(self) -> tuple[dict, Callable[[int], None]] | None:
        """See `engine_probe`; None for a gateway, which probes its engines itself."""
        return None if self.splitter is None else engine_probe(self.processor, self.splitter, self.model)

    def forget(self, namespace: str) -> None:
        """Drops the references of a namespace."""
        if self.splitter is not None:
            self.splitter.matcher.clear(namespace)


def _listed(frames: Frames) -> list[Frame]:
    return list(frames) if isinstance(frames, list | tuple) else [frames]


def _whole_frame(frame: Frame) -> dict:
    """The content part of a whole frame, read as a processor reads it; a URL is left for the gateway to fetch."""
    if isinstance(frame, str) and frame.startswith(("http://", "https://", "data:")):
        return {"type": "image_url", "image_url": {"url": frame}}
    if isinstance(frame, str) or hasattr(frame, "__fspath__"):
        frame = load_image(os.fspath(frame))
    image = ImageOps.exif_transpose(frame) if isinstance(frame, Image.Image) else array_to_image(frame)
    if image.mode not in ("RGB", "RGBA"):  # PNG has no CMYK and no floating-point pixels
        image = Image.fromarray(rgb_array(image))
    buffer = BytesIO()
    if METADATA_KEY in image.info:  # a patch group, which is one only by its mark
        save_group(image, buffer, FAST_COMPRESSION)
    else:
        image.save(buffer, format="PNG", compress_level=FAST_COMPRESSION)
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()},
    }


class BackdropClient:
    """Asks an engine, or a Backdrop gateway, about frames.

    Args:
        base_url: the API's, with /v1.
        model: its name there; None: the first one.
        processor: of the served model, or its folder or Hub id; None: the engine says where it serves from.
        api_key: None: the environment's OPENAI_API_KEY, or none.
        tolerance, matching: see `FrameSplitter`.
        openai_options: of `openai.OpenAI`: timeout, max_retries, http_client, ...

    Attributes:
        preparation: what makes its requests; holds processor and splitter once the client has connected.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:8000/v1",
        *,
        model: str | None = None,
        processor: ProcessorSource | None = None,
        api_key: str | None = None,
        tolerance: float = 10.0,
        matching: dict[str, Any] | None = None,
        **openai_options: Any,
    ) -> None:
        self.preparation = Preparation(processor, model, tolerance, matching or {})
        self._options = {"base_url": base_url, "api_key": api_key or _environment_key(), **openai_options}
        self._connecting = threading.Lock()

    @cached_property
    def openai(self) -> openai.OpenAI:
        """The official client that carries the requests."""
        return openai.OpenAI(**self._options)

    def ask(
        self,
        frames: Frames,
        question: str,
        *,
        system: str | None = None,
        namespace: str = "",
        match: bool = True,
        **options: Any,
    ) -> Answer:
        """The answer to a question about one frame or several.

        Args:
            frames: a PIL image, array, path or URL; or a list of them.
            system: system prompt in place of the template's own.
            namespace: whose references: see `camera`.
            match: False splits without references.
            options: of the API: max_tokens, temperature (default 0), seed, ...

        Raises:
            EngineMismatchError: the engine does not see patch groups.
            openai.APIError: what the engine refuses.
        """
        self.connect()
        prepared = self.preparation.prepare(frames, question, system, namespace, match, options)
        return prepared.answer(self.openai.chat.completions.create(**prepared.body))

    def stream(
        self,
        frames: Frames,
        question: str,
        *,
        system: str | None = None,
        namespace: str = "",
        match: bool = True,
        **options: Any,
    ) -> Iterator[str]:
        """The answer in pieces, as they come; the arguments are those of `ask`."""
        self.connect()
        prepared = self.preparation.prepare(frames, question, system, namespace, match, options)
        with self.openai.chat.completions.create(**prepared.body, stream=True) as chunks:
            for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content

    def messages(
        self,
        frames: Frames,
        question: str,
        *,
        system: str | None = None,
        namespace: str = "",
        match: bool = True,
    ) -> list[dict]:
        """The messages of a question, to send with another client. Arguments as `ask` takes them."""
        self.connect()
        return self.preparation.messages(_listed(frames), question, system, namespace, match)[0]

    @contextlib.contextmanager
    def camera(self, name: str) -> Iterator[Camera]:
        """A source of frames that has references of its own, which are dropped when the block ends."""
        try:
            yield Camera(self, f"camera/{name}")
        finally:
            self.preparation.forget(f"camera/{name}")

    def close(self) -> None:
        """Closes the connections."""
        self.openai.close()

    def __enter__(self) -> BackdropClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def connect(self) -> None:
        """Chooses the model, loads its processor and probes the engine; idempotent, and done by the first question.

        Raises:
            ValueError: the engine does not serve the model that was asked for.
            EngineMismatchError: it does not see patch groups, or runs another chat template.
        """
        with self._connecting:
            if self.preparation.ready:
                return
            self.preparation.choose_model(self.openai.models.list().data)
            # A streamed answer reports no token count, so probe once that the engine reads alpha.
            probe = self.preparation.probe()
            if probe is not None:
                body, check = probe
                check(self.openai.chat.completions.create(**body).usage.prompt_tokens)
            self.preparation.ready = True


class AsyncBackdropClient:
    """`BackdropClient` for asyncio. Frames are split in a worker thread, so that the event loop is not blocked."""

    def __init__(
        self,
        base_url: str = "http://localhost:8000/v1",
        *,
        model: str | None = None,
        processor: ProcessorSource | None = None,
        api_key: str | None = None,
        tolerance: float = 10.0,
        matching: dict[str, Any] | None = None,
        **openai_options: Any,
    ) -> None:
        self.preparation = Preparation(processor, model, tolerance, matching or {})
        self._options = {"base_url": base_url, "api_key": api_key or _environment_key(), **openai_options}
        self._connecting: asyncio.Lock | None = None

    @cached_property
    def openai(self) -> openai.AsyncOpenAI:
        """The official client that carries the requests."""
        return openai.AsyncOpenAI(**self._options)

    async def ask(
        self,
        frames: Frames,
        question: str,
        *,
        system: str | None = None,
        namespace: str = "",
        match: bool = True,
        **options: Any,
    ) -> Answer:
        """See `BackdropClient.ask`."""
        await self.connect()
        prepared = await asyncio.to_thread(
            self.preparation.prepare, frames, question, system, namespace, match, options
        )
        return prepared.answer(await self.openai.chat.completions.create(**prepared.body))

    async def stream(
        self,
        frames: Frames,
        question: str,
        *,
        system: str | None = None,
        namespace: str = "",
        match: bool = True,
        **options: Any,
    ) -> AsyncIterator[str]:
        """See `BackdropClient.stream`."""
        await self.connect()
        prepared = await asyncio.to_thread(
            self.preparation.prepare, frames, question, system, namespace, match, options
        )
        async with await self.openai.chat.completions.create(**prepared.body, stream=True) as chunks:
            async for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content

    async def messages(
        self,
        frames: Frames,
        question: str,
        *,
        system: str | None = None,
        namespace: str = "",
        match: bool = True,
    ) -> list[dict]:
        """See `BackdropClient.messages`."""
        await self.connect()
        found = await asyncio.to_thread(
            self.preparation.messages, _listed(frames), question, system, namespace, match
        )
        return found[0]

    @contextlib.asynccontextmanager
    async def camera(self, name: str) -> AsyncIterator[AsyncCamera]:
        """See `BackdropClient.camera`."""
        try:
            yield AsyncCamera(self, f"camera/{name}")
        finally:
            self.preparation.forget(f"camera/{name}")

    async def close(self) -> None:
        """Closes the connections."""
        await self.openai.close()

    async def __aenter__(self) -> AsyncBackdropClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """See `BackdropClient.connect`."""
        self._connecting = self._connecting or asyncio.Lock()
        async with self._connecting:
            if self.preparation.ready:
                return
            models = (await self.openai.models.list()).data
            await asyncio.to_thread(self.preparation.choose_model, models)
            probe = self.preparation.probe()
            if probe is not None:
                body, check = probe
                check((await self.openai.chat.completions.create(**body)).usage.prompt_tokens)
            self.preparation.ready = True


@dataclass(frozen=True)
class Camera:
    """One source of frames of a `BackdropClient`."""

    client: BackdropClient
    namespace: str

    def ask(self, frames: Frames, question: str, **options: Any) -> Answer:
        """See `BackdropClient.ask`."""
        return self.client.ask(frames, question, namespace=self.namespace, **options)

    def stream(self, frames: Frames, question: str, **options: Any) -> Iterator[str]:
        """See `BackdropClient.stream`."""
        return self.client.stream(frames, question, namespace=self.namespace, **options)


@dataclass(frozen=True)
class AsyncCamera:
    """One source of frames of an `AsyncBackdropClient`."""

    client: AsyncBackdropClient
    namespace: str

    async def ask(self, frames: Frames, question: str, **options: Any) -> Answer:
        """See `BackdropClient.ask`."""
        return await self.client.ask(frames, question, namespace=self.namespace, **options)

    def stream(self, frames: Frames, question: str, **options: Any) -> AsyncIterator[str]:
        """See `BackdropClient.stream`."""
        return self.client.stream(frames, question, namespace=self.namespace, **options)


def _environment_key() -> str:
    return os.environ.get("OPENAI_API_KEY") or "none"
