"""Chat requests from strangers: what is in them, checked line by line before anything is decoded or sent."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from .images import ImageFetcher, decode_data_url, open_image
from .problems import ApiError
from .settings import Limits

# What is sent on. Everything else is refused by name: cache salts, processor options and the like are the gateway's.
PASSED_ON = frozenset(
    [
        "model",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "stop",
        "stream",
        "stream_options",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "response_format",
        "user",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "metadata",
    ]
)
OURS = {
    "cache_salt": "the gateway sets it for each tenant",
    "mm_processor_kwargs": "it would change what the model sees",
    "media_io_kwargs": "it would change what the model sees",
    "chat_template": "it would change what the model sees",
    "chat_template_kwargs": "it would change what the model sees",
}
ROLES = ("system", "user", "assistant", "tool", "developer")
MAX_MESSAGES = 1024


@dataclass
class ChatRequest:
    """A request whose form is right.

    Attributes:
        body: as it came, without the images.
        slots: (message, part) of every image, in order.
        urls: their URLs.
    """

    body: dict
    slots: list[tuple[int, int]]
    urls: list[str]

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


def read_chat(body: object, limits: Limits, special_tokens: tuple[str, ...], model: str) -> ChatRequest:
    """Checks a body.

    Args:
        special_tokens: texts that only the chat template may write.
        model: the name of the model that is served.

    Raises:
        ApiError: 400, 404, 413.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}; wanted a JSON object", "invalid_body")
    for name in body:
        if name in OURS:
            raise ApiError(400, f"{name} cannot be set: {OURS[name]}", "field_refused")
        if name not in PASSED_ON:
            raise ApiError(400, f"unknown field {name!r:.80}", "unknown_field")
    if body.get("model") not in (None, model):
        raise ApiError(
            404, f"the model {body['model']!r:.200} is not served; wanted {model!r}", "model_not_found"
        )
    _check_number(body, "n", limits.choices)
    for name in ("max_tokens", "max_completion_tokens"):
        _check_number(body, name, limits.answer_tokens)
    bias = body.get("logit_bias")
    if bias is not None and not isinstance(bias, dict):
        raise ApiError(400, f"logit_bias is a {type(bias).__name__}; wanted an object", "invalid_body")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is missing or empty; wanted a list", "invalid_body")
    if len(messages) > MAX_MESSAGES:
        raise ApiError(
            400, f"{len(messages):,} messages; wanted at most {MAX_MESSAGES:,}", "too_many_messages"
        )
    request = ChatRequest(body, [], [])
    for m, message in enumerate(messages):
        _read_message(request, m, message, special_tokens)
    if len(request.urls) > limits.images:
        raise ApiError(
            413,
            f"the request has {len(request.urls):,} images; wanted at most {limits.images}",
            "too_many_images",
        )
    return request


async def load_images(
    request: ChatRequest, limits: Limits, fetcher: ImageFetcher, in_thread: Callable
) -> list[Image.Image]:
    """The request's images, decoded in threads.

    Args:
        in_thread: runs a function elsewhere and awaits it.

    Raises:
        ApiError: 400, 413, 504.
    """

    async def load(url: str) -> Image.Image:
        if url.startswith("data:"):
            return await in_thread(
                lambda: open_image(decode_data_url(url, limits.image_bytes), limits.image_pixels)
            )
        data = await fetcher.fetch(url)
        return await in_thread(open_image, data, limits.image_pixels)

    return list(await asyncio.gather(*map(load, request.urls)))


def with_images(request: ChatRequest, parts: list[list[dict]]) -> dict:
    """The body with each image replaced by the content parts of its groups."""
    replaced = dict(zip(request.slots, parts, strict=True))
    messages = []
    for m, message in enumerate(request.body["messages"]):
        content = message.get("content")
        if isinstance(content, list):
            new = []
            for p, part in enumerate(content):
                new.extend(replaced.get((m, p), [part]))
            message = message | {"content": new}
        messages.append(message)
    return request.body | {"messages": messages}


def _check_number(body: dict, name: str, largest: int) -> None:
    value = body.get(name)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise ApiError(400, f"{name} is {value!r:.40}; wanted 1 to {largest:,}", "invalid_value")


def _read_message(request: ChatRequest, m: int, message: object, special_tokens: tuple[str, ...]) -> None:
    where = f"messages[{m}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ApiError(400, f"{where} has no role of {', '.join(ROLES)}", "invalid_body")
    content = message.get("content")
    if content is None or isinstance(content, str):
        _check_text(where, content or "", special_tokens)
        return
    if not isinstance(content, list):
        raise ApiError(
            400, f"{where}.content is a {type(content).__name__}; wanted text or parts", "invalid_body"
        )
    for p, part in enumerate(content):
        here = f"{where}.content[{p}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ApiError(400, f"{here}.text is missing", "invalid_body")
            _check_text(here, part["text"], special_tokens)
        elif kind == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str) or not url:
                raise ApiError(400, f"{here}.image_url has no url", "invalid_body")
            if part.get("uuid") is not None:
                raise ApiError(
                    400, f"{here}.uuid cannot be set: the gateway hashes the pixels", "field_refused"
                )
            if message["role"] != "user":
                raise ApiError(
                    400, f"{here} is an image of the {message['role']}; wanted the user's", "invalid_body"
                )
            request.slots.append((m, p))
            request.urls.append(url)
        else:
            raise ApiError(400, f"{here} has the type {kind!r:.40}; wanted text or image_url", "invalid_body")


def _check_text(where: str, text: str, special_tokens: tuple[str, ...]) -> None:
    for token in special_tokens:
        if token in text:
            raise ApiError(
                400,
                f"{where} has {text.count(token):,} times {token!r}, which only the chat template may write",
                "special_token",
            )
