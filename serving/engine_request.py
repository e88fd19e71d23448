"""What the gateway sends to an engine: the client's request with patch groups in the place of its images."""

import json
from dataclasses import dataclass

from backdrop.processing.processing_backdrop import BackdropProcessor

from .chat import ChatRequest
from .fields import MESSAGE_FIELDS
from .frames import SplitFrame
from .problems import ApiError
from .prompts import suppressed_tokens


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
    chat: ChatRequest, frames: list[SplitFrame], cache_salt: str, processor: BackdropProcessor
) -> EngineRequest:
    """The request for an engine.

    Args:
        chat: what the client asked.
        frames: its images, split, in order.
        cache_salt: the tenant's; also the prefix of its items' uuids, since the engine's encoder cache knows no salt.
        processor: the served model's.

    Raises:
        ApiError: 400, the body holds what JSON cannot (NaN, half a surrogate pair).
    """
    body = chat.body | {"messages": engine_messages(chat, frames, f"{cache_salt}-"), "cache_salt": cache_salt}
    body["logit_bias"] = (chat.body.get("logit_bias") or {}) | suppressed_tokens(processor)
    if chat.streams:
        body["stream_options"] = {
            "include_usage": True
        }  # for the metrics; the client sees it only if it asked
    body.pop("model", None)
    try:
        data = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body holds what JSON does not: {error}", "invalid_body") from None
    background = next((frame.background for frame in frames if frame.background is not None), None)
    return EngineRequest(data, None if background is None else cache_salt + background.key)


def engine_messages(chat: ChatRequest, frames: list[SplitFrame], uuid_prefix: str) -> list[dict]:
    """The messages with each image replaced by the content parts of its groups, and without fields that mean nothing.

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
    for m, message in enumerate(chat.body["messages"]):
        content = message.get("content")
        if isinstance(content, list):
            parts = [each for p, part in enumerate(content) for each in groups.get((m, p), [part])]
            message = message | {"content": parts}
        messages.append({name: value for name, value in message.items() if name in MESSAGE_FIELDS})
    return messages
