"""A chat request as a client sends it, checked field by field before anything is decoded, fetched or sent.

What it is turned into has one shape, whatever API's habits the client follows: messages whose content is a text or a list
of text and image parts, calls of tools with an id and JSON arguments, and the options that the engine takes.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from .content import read_content
from .control import Control, read_control
from .fields import integer, message_fields, read_request_fields, read_value
from .problems import ApiError
from .settings import Limits
from .special_tokens import SpecialTokens

# As engines know them, by the names that clients use.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
MAX_MESSAGES = 1024


@dataclass(frozen=True)
class ImagePart:
    """An image of a request.

    Attributes:
        message, part: indices of its content part.
        url: data:, http:, https: or bare base64; not checked yet.
    """

    message: int
    part: int
    url: str


@dataclass
class ChatRequest:
    """A request whose form has been checked.

    Attributes:
        options: fields for the engine, but for the messages.
        messages: in the engine's form, images as the client sent them.
        images: of all messages, in order.
        shows_usage: whether the client wants the usage as the last event of a stream.
        control: what the body says about matching.
        ignored: names of fields that were left out.
    """

    options: dict
    messages: list[dict]
    images: list[ImagePart] = field(default_factory=list)
    shows_usage: bool = False
    control: Control = field(default_factory=Control)
    ignored: tuple[str, ...] = ()

    @property
    def streams(self) -> bool:
        """Whether the client wants the answer as server-sent events."""
        return bool(self.options.get("stream"))

    @property
    def tools(self) -> list[dict] | None:
        """The tools that the prompt lists."""
        return self.options.get("tools")


def read_chat(
    body: object, limits: Limits, special: SpecialTokens, model: str, camera_from_user: bool = False
) -> ChatRequest:
    """Checks the parsed body of a chat request.

    Args:
        body: any JSON value.
        limits: bounds on images and choices.
        special: tokens that only the chat template may write.
        model: the name of the model that is served.
        camera_from_user: whether the field `user` names the camera.

    Raises:
        ApiError: 400, the form is wrong or a field may not be set; 404, another model; 413, too many images.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a {type(body).__name__}; wanted a JSON object", "invalid_body")
    fields, ignored = read_request_fields(body)
    named, messages = fields.pop("model", model), fields.pop("messages", None)
    if named != model:
        raise ApiError(404, f"the model {named!r:.200} is not served; wanted {model!r}", "model_not_found")
    user, given = fields.pop("user", None), fields.pop("backdrop", None)
    control = read_control(given, user if camera_from_user else None)
    shows_usage = _check_options(fields, limits)
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is missing or empty; wanted a list", "invalid_body")
    if len(messages) > MAX_MESSAGES:
        raise ApiError(
            400, f"{len(messages):,} messages; wanted at most {MAX_MESSAGES:,}", "too_many_messages"
        )
    _check_tools(fields, special)
    read = [_read_message(f"messages[{m}]", message, special) for m, message in enumerate(messages)]
    images = [
        ImagePart(m, p, part["image_url"]["url"])
        for m, message in enumerate(read)
        if isinstance(message["content"], list)
        for p, part in enumerate(message["content"])
        if part["type"] == "image_url"
    ]
    if len(images) > limits.images:
        raise ApiError(
            413, f"the request has {len(images):,} images; wanted at most {limits.images}", "too_many_images"
        )
    return ChatRequest(fields, read, images, shows_usage, control, tuple(ignored))


def _check_options(fields: dict, limits: Limits) -> bool:
    """Checks the options that the gateway reads, in place; whether a stream ends with its usage."""
    for name in ("max_tokens", "max_completion_tokens"):
        if fields.get(name) == -1:  # other servers' "as many as fit"
            del fields[name]
    for name, read in (
        ("n", integer(1, limits.choices)),
        ("max_tokens", integer(1)),
        ("max_completion_tokens", integer(1)),
        ("min_tokens", integer(0)),
    ):
        if name in fields:
            fields[name] = read_value(name, fields[name], read)
    wanted = fields.pop("max_completion_tokens", None)
    if wanted is not None:  # the one that counts where both are set
        fields["max_tokens"] = wanted
    if not isinstance(fields.get("stream", False), bool):  # an engine reads the text "no" as false
        raise ApiError(400, f"stream is {fields['stream']!r:.40}; wanted true or false", "invalid_body")
    _object(fields, "response_format")
    shows_usage = _object(fields, "stream_options").get("include_usage")
    fields.pop("stream_options", None)
    for token in _object(fields, "logit_bias"):
        # An engine reads " 5" and "05" as 5 too: such a key could stand beside the gateway's own "5", and win.
        if not token.isdecimal() or token != str(int(token[:20])):
            raise ApiError(400, f"logit_bias has the token {token!r:.40}; wanted an id", "invalid_body")
    return bool(shows_usage)


def _object(fields: dict, name: str) -> dict:
    value = fields.get(name, {})
    if not isinstance(value, dict):
        raise ApiError(400, f"{name} is a {type(value).__name__}; wanted an object", "invalid_body")
    return value


def _check_tools(fields: dict, special: SpecialTokens) -> None:
    """Checks the tools, in place; special tokens in them become text."""
    tools = fields.get("tools", [])
    if not isinstance(tools, list):
        raise ApiError(400, f"tools is a {type(tools).__name__}; wanted a list", "invalid_body")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, f"tools[{number}] is no function with a name", "invalid_body")
        if tool.get("type", "function") != "function":
            raise ApiError(
                400, f"tools[{number}].type is {tool['type']!r:.40}; wanted function", "invalid_body"
            )
    if tools:
        fields["tools"] = special.value(tools)
        return
    fields.pop("tools", None)
    if fields.get("tool_choice") in ("auto", "none"):  # an engine refuses a choice among no tools
        del fields["tool_choice"]


def _read_message(where: str, message: object, special: SpecialTokens) -> dict:
    """A message in the engine's form, its texts without special tokens."""
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{where} has no role of {', '.join(ROLES)}", "invalid_body")
    fields = message_fields(where, message)
    content = read_content(where, fields.get("content"))
    refusal = fields.get("refusal")
    if isinstance(refusal, str) and refusal:  # what the assistant said in the content's place
        content = _with_text(content, refusal)
    found: dict[str, Any] = {"role": ROLES[role], "content": _neutral(content, special)}
    for name in ("name", "tool_call_id", "reasoning", "reasoning_content"):
        if name in fields:
            if not isinstance(fields[name], str):
                raise ApiError(
                    400, f"{where}.{name} is a {type(fields[name]).__name__}; wanted text", "invalid_body"
                )
            found[name.removesuffix("_content")] = special.text(fields[name])
    calls = fields.get("tool_calls") or []
    if fields.get("function_call"):
        calls = [{"function": fields["function_call"]}]
    if not isinstance(calls, list):
        raise ApiError(400, f"{where}.tool_calls is a {type(calls).__name__}; wanted a list", "invalid_body")
    if calls and role != "assistant":
        raise ApiError(400, f"{where} has tool calls of the {role}; wanted the assistant's", "invalid_body")
    if calls:
        found["tool_calls"] = [
            _read_call(f"{where}.tool_calls[{number}]", number, call, special)
            for number, call in enumerate(calls)
        ]
    return found


def _with_text(content: str | list[dict], text: str) -> str | list[dict]:
    if isinstance(content, str):
        return f"{content}\n{text}" if content else text
    return [*content, {"type": "text", "text": text}]


def _neutral(content: str | list[dict], special: SpecialTokens) -> str | list[dict]:
    """Content without special tokens, not even in two pieces: a chat template may put a message's texts together."""
    if isinstance(content, str):
        return special.text(content)
    texts = iter(special.texts([part["text"] for part in content if part["type"] == "text"]))
    return [part | {"text": next(texts)} if part["type"] == "text" else part for part in content]


def _read_call(where: str, number: int, call: object, special: SpecialTokens) -> dict:
    """A call of a tool, its arguments a JSON object as text."""
    function = call.get("function") if isinstance(call, dict) else None
    if (
        not isinstance(call, dict)
        or not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
    ):
        raise ApiError(400, f"{where} is no call of a function by its name", "invalid_body")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            # Small models write such; the engine would show none of it, and a refusal would end the conversation.
            arguments = {"invalid_json": arguments}
    if not isinstance(arguments, dict):
        arguments = {"value": arguments}
    identity = call.get("id")
    return {
        "id": identity if isinstance(identity, str) and identity else f"call_{number}",
        "type": "function",
        "function": {
            "name": special.text(function["name"]),
            "arguments": json.dumps(special.value(arguments), ensure_ascii=False),
        },
    }
