"""Chat requests from strangers: what is in them, checked line by line before anything is decoded or sent."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

from .images import Budget, ImageFetcher, decode_data_url
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
# What a message may have. Others that clients send back from an answer are left out where they are empty.
MESSAGE_FIELDS = frozenset(["role", "content", "name", "tool_calls", "tool_call_id"])
# What a part may have. vLLM reads an image, and its URL, out of a text part that has a uuid.
PART_FIELDS = {"text": ("type", "text"), "image_url": ("type", "image_url")}


@dataclass
class ChatRequest:
    """A request whose form is right.

    Attributes:
        body: as it came.
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
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):  # an engine takes "no" for false
        raise ApiError(400, f"stream is {stream!r:.40}; wanted true or false", "invalid_body")
    for name in _object(body, "stream_options"):
        if name != "include_usage":
            raise ApiError(400, f"unknown field stream_options.{name:.80}", "unknown_field")
    for token in _object(body, "logit_bias"):
        # " 5" and "05" are 5 to an engine too, and would stand beside the gateway's own "5".
        if not token.isdecimal() or token != str(int(token[:20])):
            raise ApiError(400, f"logit_bias has the token {token!r:.40}; wanted an id", "invalid_body")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is missing or empty; wanted a list", "invalid_body")
    if len(messages) > MAX_MESSAGES:
        raise ApiError(
            400, f"{len(messages):,} messages; wanted at most {MAX_MESSAGES:,}", "too_many_messages"
        )
    for name in ("tools", "tool_choice", "response_format"):
        if body.get(name) is not None:  # a template may show them
            _check_text(name, json.dumps(body[name], ensure_ascii=False), special_tokens)
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


async def fetch_images(
    request: ChatRequest, limits: Limits, fetcher: ImageFetcher, in_thread: Callable
) -> list[bytes]:
    """The request's images as they are encoded; fetched ones together are no larger than a body may be.

    Args:
        in_thread: runs a function elsewhere and awaits it.

    Raises:
        ApiError: 400, 413, 504.
    """
    budget = Budget(limits.body_bytes)

    async def fetch(url: str) -> bytes:
        if url.startswith("data:"):
            return await in_thread(decode_data_url, url, limits.image_bytes)
        return await fetcher.fetch(url, budget)

    tasks = [asyncio.ensure_future(fetch(url)) for url in request.urls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:  # where one failed, the others are for nothing
            task.cancel()


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
        messages.append({name: value for name, value in message.items() if name in MESSAGE_FIELDS})
    return request.body | {"messages": messages}


def _object(body: dict, name: str) -> dict:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise ApiError(400, f"{name} is a {type(value).__name__}; wanted an object", "invalid_body")
    return value or {}


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
    for name, value in message.items():
        if name not in MESSAGE_FIELDS and value not in (None, "", [], {}):
            raise ApiError(400, f"unknown field {where}.{name:.80}", "unknown_field")
    for name in ("name", "tool_calls", "tool_call_id"):
        if message.get(name) is not None:
            _check_text(f"{where}.{name}", json.dumps(message[name], ensure_ascii=False), special_tokens)
    content = message.get("content")
    if content is None or isinstance(content, str):
        _check_text(where, content or "", special_tokens)
        return
    if not isinstance(content, list):
        raise ApiError(
            400, f"{where}.content is a {type(content).__name__}; wanted text or parts", "invalid_body"
        )
    texts = []
    for p, part in enumerate(content):
        here = f"{where}.content[{p}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in PART_FIELDS:
            raise ApiError(400, f"{here} has the type {kind!r:.40}; wanted text or image_url", "invalid_body")
        if part.get("uuid") is not None:
            raise ApiError(400, f"{here}.uuid cannot be set: the gateway hashes the pixels", "field_refused")
        for name in part:
            if name not in PART_FIELDS[kind]:
                raise ApiError(400, f"unknown field {here}.{name:.80}", "unknown_field")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise ApiError(400, f"{here}.text is missing", "invalid_body")
            texts.append(part["text"])
        else:
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str) or not url:
                raise ApiError(400, f"{here}.image_url has no url", "invalid_body")
            if message["role"] != "user":
                raise ApiError(
                    400, f"{here} is an image of the {message['role']}; wanted the user's", "invalid_body"
                )
            request.slots.append((m, p))
            request.urls.append(url)
    _check_text(where, "".join(texts), special_tokens)  # the template joins them: "<ima", "ge>"


def _check_text(where: str, text: str, special_tokens: tuple[str, ...]) -> None:
    for token in special_tokens:
        if token in text:
            raise ApiError(
                400,
                f"{where} has {text.count(token):,} times {token!r}, which only the chat template may write",
                "special_token",
            )
