"""What the gateway sends to an engine: the client's request with patch groups in the place of its images."""

import json
from dataclasses import dataclass

from jinja2 import TemplateError

from backdrop.processing.processing_backdrop import BackdropProcessor

from .chat import ChatRequest
from .frames import SplitFrame
from .problems import ApiError
from .prompts import Context, check_shown, prompt_text, prompt_tokens, suppressed_tokens


@dataclass(frozen=True)
class EngineRequest:
    """A request as every replica takes it, but for the model's name, which replicas may choose.

    Attributes:
        body: JSON object without "model".
        background_key: of the first background, tenants kept apart: which replica it belongs to. None: no background.
    """

    body: bytes
    background_key: str | None

    def body_for(self, model: str) -> bytes:
        """The body for a replica that serves the model under this name."""
        return b'{"model":' + json.dumps(model).encode() + b"," + self.body[1:]


def engine_request(
    chat: ChatRequest,
    frames: list[SplitFrame],
    cache_salt: str,
    processor: BackdropProcessor,
    context: Context | None = None,
) -> EngineRequest:
    """The request for an engine.

    Args:
        chat: what the client asked.
        frames: its images, split, in order.
        cache_salt: the tenant's; also the prefix of its items' uuids, since the engine's encoder cache knows no salt.
        processor: the served model's.
        context: of the engine; None: not known, the engine itself checks.

    Raises:
        ApiError: 400, the prompt does not fit or cannot be shown, or the body holds what JSON cannot (half a surrogate
            pair).
    """
    messages = engine_messages(chat, frames, f"{cache_salt}-")
    body = chat.options | {"messages": messages, "cache_salt": cache_salt}
    body |= _answer_tokens(chat, _left_for_answer(chat, messages, frames, processor, context))
    suppressed = suppressed_tokens(processor)
    body["logit_bias"] = (chat.options.get("logit_bias") or {}) | suppressed
    for token in chat.options.get("allowed_token_ids", ()):
        if str(token) in suppressed:
            raise ApiError(
                400, f"allowed_token_ids has {token}, which only the chat template may write", "special_token"
            )
    if chat.streams:
        body["stream_options"] = {
            "include_usage": True
        }  # for the metrics; the client sees it only if it asked
    try:
        data = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body holds what JSON does not: {error}", "invalid_body") from None
    background = next((frame.background for frame in frames if frame.background is not None), None)
    return EngineRequest(data, None if background is None else cache_salt + background.key)


def _left_for_answer(
    chat: ChatRequest,
    messages: list[dict],
    frames: list[SplitFrame],
    processor: BackdropProcessor,
    context: Context | None,
) -> int | None:
    """Tokens that the prompt leaves for the answer, None where the context is not known."""
    try:
        text = prompt_text(processor, messages, chat.tools)
    except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise ApiError(
            400, f"the model's chat template cannot show the messages: {str(error):.300}", "not_shown"
        ) from None
    if context is not None and len(text) > context.characters:
        raise too_long(context.tokens, len(chat.images), context)
    check_shown(text, messages)
    if context is None:
        return None
    items = [item for frame in frames for item in frame.items]
    try:
        tokens = prompt_tokens(processor, text, items)
    except UnicodeEncodeError as error:
        raise ApiError(400, f"the body holds what JSON does not: {error}", "invalid_body") from None
    if tokens >= context.tokens:
        raise too_long(tokens, len(chat.images), context)
    return context.tokens - tokens


def _answer_tokens(chat: ChatRequest, left: int | None) -> dict:
    """The bounds of the answer's length, where the client set them, made to fit."""
    found: dict[str, int] = {}
    for name in ("max_tokens", "min_tokens"):
        if name in chat.options:
            bounds = (chat.options[name], left, found.get("max_tokens"))
            found[name] = min(bound for bound in bounds if bound is not None)
    return found


def too_long(tokens: int, images: int, context: Context) -> ApiError:
    """The error of a prompt that does not fit."""
    return ApiError(
        400,
        f"the prompt has {tokens:,} tokens or more with {images:,} image(s); wanted fewer than the model's context, "
        f"{context.tokens:,}",
        "context_length_exceeded",
    )


def engine_messages(chat: ChatRequest, frames: list[SplitFrame], uuid_prefix: str) -> list[dict]:
    """The messages with each image replaced by the content parts of its groups.

    Args:
        chat: what the client asked.
        frames: its images, split, in order.
        uuid_prefix: of all items, so that two tenants never share one.
    """
    groups = {
        (image.message, image.part): [item.part(uuid_prefix) for item in frame.items]
        for image, frame in zip(chat.images, frames, strict=True)
    }
    messages = []
    for m, message in enumerate(chat.messages):
        content = message["content"]
        if isinstance(content, list):
            content = [each for p, part in enumerate(content) for each in groups.get((m, p), [part])]
        messages.append(message | {"content": content})
    return messages
