"""A chat request as a client sends it, checked field by field before anything is decoded, fetched or sent."""

import json
from dataclasses import dataclass, field

from .fields import check_message_fields, check_part_fields, check_request_fields
from .problems import ApiError
from .settings import Limits

ROLES = ("system", "user", "assistant", "tool", "developer")
MAX_MESSAGES = 1024


@dataclass(frozen=True)
class ImagePart:
    """An image of a request.

    Attributes:
        message, part: indices of its content part.
        url: data:, http: or https:; not checked yet.
    """

    message: int
    part: int
    url: str


@dataclass
class ChatRequest:
    """A request whose form has been checked.

    Attributes:
        body: as it came.
        images: of all messages, in order.
    """

    body: dict
    images: list[ImagePart] = field(default_factory=list)

    @property
    def streams(self) -> bool:
        """Whether the client wants the answer as server-sent events."""
        return bool(self.body.get("stream"))

    @property
    def shows_usage(self) -> bool:
        """Whether the client wants the usage as the last event of a stream."""
        return bool((self.body.get("stream_options") or {}).get("include_usage"))


def read_chat(body: object, limits: Limits, special_tokens: tuple[str, ...], model: str) -> ChatRequest:
    """Checks the parsed body of a chat request.

    Args:
        body: any JSON value.
        limits: bounds on images, max_tokens and choices.
        special_tokens: texts that only the chat template may write.
        model: the name of the model that is served.

    Raises:
        ApiError: 400, the form is wrong or a field may not be set; 404, another model; 413, too many images.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}; wanted a JSON object", "invalid_body")
    check_request_fields(body)
    if body.get("model") not in (None, model):
        message = f"the model {body['model']!r:.200} is not served; wanted {model!r}"
        raise ApiError(404, message, "model_not_found")
    _check_options(body, limits)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is missing or empty; wanted a list", "invalid_body")
    if len(messages) > MAX_MESSAGES:
        raise ApiError(
            400, f"{len(messages):,} messages; wanted at most {MAX_MESSAGES:,}", "too_many_messages"
        )
    for name in ("tools", "tool_choice", "response_format"):
        if body.get(name) is not None:  # a chat template may show them
            _check_text(name, json.dumps(body[name], ensure_ascii=False), special_tokens)
    request = ChatRequest(body)
    for index, message in enumerate(messages):
        request.images += _read_message(index, message, special_tokens)
    if len(request.images) > limits.images:
        raise ApiError(
            413,
            f"the request has {len(request.images):,} images; wanted at most {limits.images}",
            "too_many_images",
        )
    return request


def _check_options(body: dict, limits: Limits) -> None:
    _check_number(body, "n", limits.choices)
    for name in ("max_tokens", "max_completion_tokens"):
        _check_number(body, name, limits.answer_tokens)
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):  # an engine reads the text "no" as false
        raise ApiError(400, f"stream is {stream!r:.40}; wanted true or false", "invalid_body")
    for name in _object(body, "stream_options"):
        if name != "include_usage":
            raise ApiError(400, f"unknown field stream_options.{name:.80}", "unknown_field")
    for token in _object(body, "logit_bias"):
        # An engine reads " 5" and "05" as 5 too: such a key could stand beside the gateway's own "5", and win.
        if not token.isdecimal() or token != str(int(token[:20])):
            raise ApiError(400, f"logit_bias has the token {token!r:.40}; wanted an id", "invalid_body")


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


def _read_message(index: int, message: object, special_tokens: tuple[str, ...]) -> list[ImagePart]:
    """Checks a message; its images."""
    where = f"messages[{index}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ApiError(400, f"{where} has no role of {', '.join(ROLES)}", "invalid_body")
    check_message_fields(where, message)
    for name in ("name", "tool_calls", "tool_call_id"):
        if message.get(name) is not None:
            _check_text(f"{where}.{name}", json.dumps(message[name], ensure_ascii=False), special_tokens)
    content = message.get("content")
    if content is None or isinstance(content, str):
        _check_text(where, content or "", special_tokens)
        return []
    if not isinstance(content, list):
        raise ApiError(
            400, f"{where}.content is a {type(content).__name__}; wanted text or parts", "invalid_body"
        )
    texts, images = [], []
    for number, part in enumerate(content):
        here = f"{where}.content[{number}]"
        if check_part_fields(here, part) == "text":
            texts.append(_text_of(here, part))
        else:
            images.append(ImagePart(index, number, _image_url_of(here, part, message["role"])))
    # The chat template joins the texts of a message: "<ima" and "ge>" are harmless only apart.
    _check_text(where, "".join(texts), special_tokens)
    return images


def _text_of(where: str, part: dict) -> str:
    if not isinstance(part.get("text"), str):
        raise ApiError(400, f"{where}.text is missing", "invalid_body")
    return part["text"]


def _image_url_of(where: str, part: dict, role: str) -> str:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or not url:
        raise ApiError(400, f"{where}.image_url has no url", "invalid_body")
    if role != "user":
        raise ApiError(400, f"{where} is an image of the {role}; wanted the user's", "invalid_body")
    return url


def _check_text(where: str, text: str, special_tokens: tuple[str, ...]) -> None:
    for token in special_tokens:
        if token in text:
            raise ApiError(
                400,
                f"{where} has {text.count(token):,} times {token!r}, which only the chat template may write",
                "special_token",
            )
