"""What becomes of each field of a request: one table for the request, one for its messages, one for their parts.

The rule: what the engine takes is passed on, once its type is right; what other APIs define and this one has no use for is
ignored; null means unset. Refused is what would cross from one tenant to another, what would change the prompt behind the
gateway's back, content that would be lost, and a name that is nearly that of a field which counts. Any other name is
ignored, and the response names it in `X-Backdrop-Ignored`. No field reaches the engine but those that are passed on.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .problems import ApiError

RESEMBLES = 0.8  # of difflib's ratio, from which an unknown name is taken for a misspelling


class Handling(Enum):
    """What the gateway does with a field."""

    PASSED_ON = "passed on to the engine, once its type is right"
    CHECKED = "read by the gateway, which tells the engine in its own form"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True)
class Field:
    """One row of the table of a request's fields.

    Attributes:
        handling: what is done with the field.
        reason: why it is refused; of other fields what they do, where the name does not say it.
        read: of a field that is passed on, gives the value to send, or raises a ValueError that says what was wanted.
        harmless: of a refused field, values that change nothing; they are ignored.
    """

    handling: Handling
    reason: str = ""
    read: Callable[[Any], Any] | None = None
    harmless: tuple = ()


# ---- types of values


def integer(low: int, high: int = 2**63 - 1) -> Callable[[Any], int]:
    """Reads a whole number from `low` to `high`; 100.0 is one."""

    def read(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{low:,} to {high:,}" if high < 2**31 else f"a whole number, {low:,} or more")
        return value

    return read


def number(low: float, high: float = float("inf"), above: bool = False) -> Callable[[Any], float]:
    """Reads a number from `low`, or `above` it, to `high`; NaN and infinity are none."""

    def read(value: Any) -> float:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        if not real or not low <= value <= high or (above and value == low) or value in (float("inf"),):
            least = f"above {low:g}" if above else f"from {low:g}"
            raise ValueError(f"a number {least}" + (f" to {high:g}" if high != float("inf") else ""))
        return value

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _object(value: Any) -> dict:
    if not isinstance(value, dict):
        raise ValueError("an object")
    return value


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError("a list of texts")
    return value


def _stop(value: Any) -> str | list[str]:
    if isinstance(value, str):
        return value
    try:
        return _texts(value)
    except ValueError:
        raise ValueError("a text or a list of texts") from None


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise ValueError("a list of token ids")
    return [integer(0, 2**31 - 1)(token) for token in value]


# ---- the tables


def _passed_on(read: Callable[[Any], Any], reason: str = "") -> Field:
    return Field(Handling.PASSED_ON, reason, read)


def _ignored(reason: str = "") -> Field:
    return Field(Handling.IGNORED, reason)


def _refused(reason: str, *harmless: Any) -> Field:
    return Field(Handling.REFUSED, reason, harmless=harmless)


_IMAGE = "it would change what the model sees"
_PROMPT = "it would change the prompt behind the gateway's back"
_LOST = "its content would be lost; wanted it in messages"
_LOCAL = "an option of another server"
_OPENAI = "OpenAI's; it means nothing here"
_ROUTER = "of a router in front of several models"

REQUEST_FIELDS: dict[str, Field] = {
    "model": Field(Handling.CHECKED, "the replica's own name takes its place"),
    "messages": Field(Handling.CHECKED, "patch groups take the place of images"),
    "max_tokens": Field(Handling.CHECKED, "made to fit the model's context; -1 is as if it were not set"),
    "max_completion_tokens": Field(
        Handling.CHECKED, "made to fit the model's context; -1 is as if it were not set"
    ),
    "min_tokens": Field(Handling.CHECKED, "never more than max_tokens"),
    "n": Field(Handling.CHECKED, "at most `limits.choices`"),
    "stream": Field(Handling.CHECKED, "true or false"),
    "stream_options": Field(Handling.CHECKED, "the engine is always asked for the usage"),
    "logit_bias": Field(Handling.CHECKED, "separators and placeholder are suppressed whatever it says"),
    "allowed_token_ids": Field(Handling.CHECKED, "not separators and placeholder"),
    "tools": Field(Handling.CHECKED, "special tokens in them are text"),
    "tool_choice": Field(Handling.CHECKED, "left out where there are no tools"),
    "response_format": Field(Handling.CHECKED, "an object"),
    "extra_body": Field(Handling.CHECKED, "its fields are read as the request's own"),
    "backdrop": Field(Handling.CHECKED, "camera, match and tolerance, as the headers X-Backdrop-*"),
    "user": Field(Handling.CHECKED, "the camera, where `camera_from_user` is set"),
    "temperature": _passed_on(number(0)),
    "top_p": _passed_on(number(0, 1, above=True)),
    "top_k": _passed_on(integer(-1, 2**31 - 1)),
    "min_p": _passed_on(number(0, 1)),
    "repetition_penalty": _passed_on(number(0, above=True)),
    "presence_penalty": _passed_on(number(-2, 2)),
    "frequency_penalty": _passed_on(number(-2, 2)),
    "length_penalty": _passed_on(number(-1e6, 1e6)),
    "seed": _passed_on(integer(-(2**63))),
    "stop": _passed_on(_stop),
    "stop_token_ids": _passed_on(_token_ids),
    "bad_words": _passed_on(_texts),
    "ignore_eos": _passed_on(_flag),
    "include_stop_str_in_output": _passed_on(_flag),
    "skip_special_tokens": _passed_on(_flag),
    "spaces_between_special_tokens": _passed_on(_flag),
    "logprobs": _passed_on(_flag),
    "top_logprobs": _passed_on(integer(0, 20)),
    "return_tokens_as_token_ids": _passed_on(_flag),
    "parallel_tool_calls": _passed_on(_flag),
    "structured_outputs": _passed_on(_object, "the answer's form: json, regex, choice or grammar"),
    "repetition_detection": _passed_on(_object),
    **dict.fromkeys(
        (
            "store",
            "metadata",
            "service_tier",
            "reasoning_effort",
            "verbosity",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prompt_cache_options",
            "safety_identifier",
            "prediction",
            "web_search_options",
            "moderation",
        ),
        _ignored(_OPENAI),
    ),
    **dict.fromkeys(
        (
            "provider",
            "models",
            "route",
            "transforms",
            "plugins",
            "usage",
            "session_id",
            "custom_llm_provider",
            "api_key",
            "api_base",
            "timeout",
            "tags",
            "guardrails",
            "fallbacks",
            "cache",
            "trace",
            "litellm_metadata",
            "chat_id",
            "conversation_id",
            "user_id",
            "features",
            "background_tasks",
        ),
        _ignored(_ROUTER),
    ),
    **dict.fromkeys(
        (
            "num_ctx",
            "num_keep",
            "num_gpu",
            "num_thread",
            "num_batch",
            "main_gpu",
            "use_mmap",
            "use_mlock",
            "keep_alive",
            "options",
            "think",
            "thinking",
            "enable_thinking",
            "thinking_budget",
            "thinking_token_budget",
            "include_reasoning",
            "reasoning",
            "reasoning_format",
            "reasoning_split",
            "cache_prompt",
            "id_slot",
            "slot_id",
            "timings_per_token",
            "return_progress",
            "post_sampling_probs",
            "n_probs",
            "n_keep",
            "top_a",
            "typical_p",
            "tfs_z",
            "mirostat",
            "mirostat_tau",
            "mirostat_eta",
            "penalize_nl",
            "penalize_newline",
            "repeat_last_n",
            "dynatemp_range",
            "dynatemp_exponent",
            "xtc_probability",
            "xtc_threshold",
            "dry_multiplier",
            "dry_base",
            "dry_allowed_length",
            "dry_sequence_breakers",
            "dry_penalty_last_n",
            "samplers",
            "lora",
            "raw",
            "no_stop_trim",
            "stream_interval",
            "watermarking",
            "mm_payload",
        ),
        _ignored(_LOCAL),
    ),
    "cache_salt": _refused("the gateway sets it for each tenant"),
    "request_id": _refused("the gateway names requests, so that no tenant takes another's name"),
    "priority": _refused("it would put one tenant before another", 0),
    "kv_transfer_params": _refused("it names entries of the engine's cache, which all tenants share"),
    "ec_transfer_params": _refused("it names entries of the engine's cache, which all tenants share"),
    "vllm_xargs": _refused("it reaches extensions of the engine, which know no tenants", {}),
    "mm_processor_kwargs": _refused(_IMAGE, {}),
    "media_io_kwargs": _refused(_IMAGE, {}),
    "truncate_prompt_tokens": _refused("it would cut images in two", -1),
    "truncation_side": _refused("it would cut images in two"),
    "chat_template": _refused(_PROMPT),
    "chat_template_kwargs": _refused(
        _PROMPT, {}, *({name: on} for name in ("enable_thinking", "thinking") for on in (False, True))
    ),
    "add_generation_prompt": _refused(_PROMPT, True),
    "continue_final_message": _refused(_PROMPT, False),
    "add_special_tokens": _refused(_PROMPT, False),
    "echo": _refused(_PROMPT, False),
    "prompt_logprobs": _refused("the engine would compute the background again", 0, False),
    "return_token_ids": _refused("the prompt's tokens are the gateway's", False),
    "return_prompt_text": _refused("the prompt's tokens are the gateway's", False),
    "return_token_offsets": _refused("the prompt's tokens are the gateway's", False),
    "use_beam_search": _refused("beams are not kept from separators", False),
    "best_of": _refused("engines no longer have it; wanted n", 0, 1),
    "modalities": _refused("answers are text", ["text"]),
    "audio": _refused("answers are text"),
    "prompt": _refused(_LOST),
    "input": _refused(_LOST),
    "instructions": _refused("its content would be lost; wanted a message of the role system"),
    "system": _refused("its content would be lost; wanted a message of the role system"),
    "system_prompt": _refused("its content would be lost; wanted a message of the role system"),
    "documents": _refused(_LOST, []),
    "images": _refused(_LOST, []),
    "functions": _refused("wanted tools", []),
    "function_call": _refused("wanted tool_choice", "none", "auto"),
}

# Names that other servers have for a field.
ALIASES = {
    "repeat_penalty": "repetition_penalty",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "stop_sequences": "stop",
}
# Earlier names of what is now one field of structured outputs.
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}

# Of a message. What is shown: its content, who speaks, the calls and what they answer, the reasoning.
MESSAGE_FIELDS: dict[str, Field] = {
    **dict.fromkeys(
        (
            "role",
            "content",
            "name",
            "tool_calls",
            "tool_call_id",
            "reasoning",
            "reasoning_content",
            "refusal",
            "function_call",
        ),
        Field(Handling.CHECKED, "shown by the chat template"),
    ),
    **dict.fromkeys(
        (
            "id",
            "type",
            "object",
            "created",
            "created_at",
            "timestamp",
            "status",
            "index",
            "model",
            "finish_reason",
            "stop_reason",
            "logprobs",
            "usage",
            "annotations",
            "citations",
            "cache_control",
            "prefix",
            "weight",
            "metadata",
            "additional_kwargs",
            "response_metadata",
            "usage_metadata",
            "provider_specific_fields",
            "reasoning_details",
            "thinking_blocks",
            "phase",
        ),
        _ignored("what servers and libraries note about a message"),
    ),
}

# Fields of content parts that say nothing the model could see, whatever the part's type.
PART_NOTES = frozenset(
    [
        "cache_control",
        "annotations",
        "citations",
        "index",
        "id",
        "detail",
        "fps",
        "logprobs",
        "status",
        "mime_type",
        "media_type",
        "format",
        "filename",
        "metadata",
        "extras",
        "prompt_cache_breakpoint",
    ]
)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# Of a name without its punctuation, the field that it resembles: only those that do something can be meant.
_MEANT = {
    _plain(name): name for name, field in REQUEST_FIELDS.items() if field.handling is not Handling.IGNORED
} | {_plain(alias): alias for alias in (*ALIASES, *GUIDED)}


def resembled(name: str, names: dict[str, str] | None = None) -> str | None:
    """The known field that an unknown name is nearly written as; None where it resembles none.

    Args:
        name: of the unknown field.
        names: known names by their lower-case letters and digits; None: those of a request.
    """
    known = _MEANT if names is None else names
    found = difflib.get_close_matches(_plain(name[:80]), known, 1, RESEMBLES)
    return known[found[0]] if found else None


def read_request_fields(body: dict) -> tuple[dict, list[str]]:
    """The fields of a request that count, under their own names, and the names of those that are ignored.

    Values of fields that are passed on have their right type; those of fields that the gateway reads are as they came.

    Raises:
        ApiError: 400, a field may not be set, resembles one that counts, or has the wrong type.
    """
    found: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in _unfolded(body).items():
        if name in GUIDED:
            found["structured_outputs"] = {**(found.get("structured_outputs") or {}), GUIDED[name]: value}
            continue
        own = ALIASES.get(name, name)
        field = REQUEST_FIELDS.get(own)
        if field is None:
            meant = resembled(name)
            if meant is not None:
                raise ApiError(400, f"unknown field {name!r:.80}; is {meant!r} meant?", "unknown_field")
            ignored.append(name)
        elif field.handling is Handling.IGNORED:
            ignored.append(name)
        elif field.handling is Handling.REFUSED:
            if not any(value == harmless and type(value) is type(harmless) for harmless in field.harmless):
                raise ApiError(400, f"{name} cannot be set: {field.reason}", "field_refused")
            ignored.append(name)
        elif own == name or body.get(own) is None:
            found[own] = value if field.read is None else read_value(name, value, field.read)
    return found, ignored


def _unfolded(body: dict) -> dict:
    """A request's fields that are not null, those of its extra_body among them."""
    extra = body.get("extra_body")
    if extra is not None and not isinstance(extra, dict):
        raise ApiError(400, f"extra_body is a {type(extra).__name__}; wanted an object", "invalid_body")
    fields = {**(extra or {}), **{name: value for name, value in body.items() if value is not None}}
    return {name: value for name, value in fields.items() if value is not None and name != "extra_body"}


def read_value(name: str, value: Any, read: Callable[[Any], Any]) -> Any:
    """The value of a field, once its type is right.

    Raises:
        ApiError: 400, names field, value and what was wanted.
    """
    try:
        return read(value)
    except ValueError as error:
        raise ApiError(400, f"{name} is {value!r:.40}; wanted {error}", "invalid_value") from None


def message_fields(where: str, message: dict) -> dict:
    """The fields of a message that are shown and not null.

    Args:
        where: names the message in the error, as "messages[0]".

    Raises:
        ApiError: 400, a field that is in no table is neither empty nor a mere number: it might be content.
    """
    found = {}
    for name, value in message.items():
        field = MESSAGE_FIELDS.get(name)
        if field is None:
            _refuse_content(where, name, value, MESSAGE_FIELDS)
        elif field.handling is Handling.CHECKED and value is not None:
            found[name] = value
    return found


def check_part_fields(where: str, part: dict, taken: frozenset[str]) -> None:
    """Refuses a content part with a field that would be lost.

    Args:
        where: names the part in the error, as "messages[0].content[0]".
        taken: the fields that are read.

    Raises:
        ApiError: 400, names the field.
    """
    if part.get("uuid") is not None:
        raise ApiError(400, f"{where}.uuid cannot be set: the gateway hashes the pixels", "field_refused")
    for name, value in part.items():
        if name not in taken and name not in PART_NOTES:
            _refuse_content(where, name, value, taken | PART_NOTES)


def _refuse_content(where: str, name: str, value: Any, known: Any) -> None:
    if value in (None, "", [], {}) or isinstance(value, int | float):
        return
    meant = resembled(name, {_plain(each): each for each in known})
    hint = f"; is {meant!r} meant?" if meant else ": its content would be lost"
    raise ApiError(400, f"unknown field {where}.{name:.80}{hint}", "unknown_field")
