"""What becomes of each field of a request: one table for the request, one for its messages, one for their parts.

A field that stands in no table is refused by name: the engine would take it, and might mean something by it that crosses
from one tenant to another.
"""

from dataclasses import dataclass
from enum import Enum

from .problems import ApiError


class Handling(Enum):
    """What the gateway does with a field."""

    PASSED_ON = "passed on to the engine as it came"
    CHECKED = "checked, and passed on in a form that the gateway writes"
    REFUSED = "refused"


@dataclass(frozen=True)
class Field:
    """One row of the table of a request's fields.

    Attributes:
        handling: what is done with the field.
        reason: of a refusal, for the client.
    """

    handling: Handling
    reason: str = ""


_PASSED_ON, _CHECKED = Field(Handling.PASSED_ON), Field(Handling.CHECKED)
_CHANGES_THE_IMAGE = Field(Handling.REFUSED, "it would change what the model sees")

REQUEST_FIELDS: dict[str, Field] = {
    "model": _CHECKED,  # the replica's own name takes its place
    "messages": _CHECKED,  # patch groups take the place of images
    "max_tokens": _CHECKED,
    "max_completion_tokens": _CHECKED,
    "n": _CHECKED,
    "stream": _CHECKED,
    "stream_options": _CHECKED,  # the gateway always asks for the usage
    "logit_bias": _CHECKED,  # the gateway suppresses separators and placeholder
    "temperature": _PASSED_ON,
    "top_p": _PASSED_ON,
    "stop": _PASSED_ON,
    "seed": _PASSED_ON,
    "presence_penalty": _PASSED_ON,
    "frequency_penalty": _PASSED_ON,
    "logprobs": _PASSED_ON,
    "top_logprobs": _PASSED_ON,
    "response_format": _CHECKED,  # this and the tools: for special tokens, since a chat template may show them
    "tools": _CHECKED,
    "tool_choice": _CHECKED,
    "parallel_tool_calls": _PASSED_ON,
    "user": _PASSED_ON,
    "metadata": _PASSED_ON,
    "cache_salt": Field(Handling.REFUSED, "the gateway sets it for each tenant"),
    "mm_processor_kwargs": _CHANGES_THE_IMAGE,
    "media_io_kwargs": _CHANGES_THE_IMAGE,
    "chat_template": _CHANGES_THE_IMAGE,
    "chat_template_kwargs": _CHANGES_THE_IMAGE,
}

# Fields of a message that are passed on. Clients send an answer's message back with further fields; those that are empty
# are left out, others are refused.
MESSAGE_FIELDS = frozenset(["role", "content", "name", "tool_calls", "tool_call_id"])

# Fields of a content part by its type. Nothing else may stand in a part: vLLM takes an image, and its URL, from a text
# part that has a uuid.
PART_FIELDS = {"text": frozenset(["type", "text"]), "image_url": frozenset(["type", "image_url"])}


def check_request_fields(body: dict) -> None:
    """Refuses a request that has a field which may not be set, whatever its value.

    Raises:
        ApiError: 400, names the field.
    """
    for name in body:
        field = REQUEST_FIELDS.get(name)
        if field is None:
            raise ApiError(400, f"unknown field {name!r:.80}", "unknown_field")
        if field.handling is Handling.REFUSED:
            raise ApiError(400, f"{name} cannot be set: {field.reason}", "field_refused")


def check_message_fields(where: str, message: dict) -> None:
    """Refuses a message that has a field which would be lost, unless it is empty.

    Args:
        where: names the message in the error, as "messages[0]".

    Raises:
        ApiError: 400, names the field.
    """
    for name, value in message.items():
        if name not in MESSAGE_FIELDS and value not in (None, "", [], {}):
            raise ApiError(400, f"unknown field {where}.{name:.80}", "unknown_field")


def check_part_fields(where: str, part: object) -> str:
    """The type of a content part, all of whose fields belong to it.

    Args:
        where: names the part in the error, as "messages[0].content[0]".

    Raises:
        ApiError: 400, names the part or its field.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in PART_FIELDS:
        raise ApiError(400, f"{where} has the type {kind!r:.40}; wanted text or image_url", "invalid_body")
    if part.get("uuid") is not None:
        raise ApiError(400, f"{where}.uuid cannot be set: the gateway hashes the pixels", "field_refused")
    for name in part:
        if name not in PART_FIELDS[kind]:
            raise ApiError(400, f"unknown field {where}.{name:.80}", "unknown_field")
    return kind
