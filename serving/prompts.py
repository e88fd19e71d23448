"""The exact number of prompt tokens of a request, and the probe that compares it with an engine's own count.

An engine that turns RGBA images into RGB, or that runs another chat template, answers too, but wrongly. Its number of
prompt tokens gives it away.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from backdrop.processing.patch_groups_backdrop import BACKGROUND, GROUP_KINDS, make_group
from backdrop.processing.processing_backdrop import BackdropProcessor

from .frames import FrameSplitter, GroupItem
from .problems import ApiError

ENGINE_FLAGS = (
    '--trust-remote-code --model-impl transformers --media-io-kwargs \'{"image": {"image_mode": null}}\''
)


class EngineMismatchError(RuntimeError):
    """The engine reads a request as another number of tokens than it has."""


@dataclass(frozen=True)
class Context:
    """What a prompt and its answer may have together.

    Attributes:
        tokens: of an engine.
        characters: of a text that could still fit: longer ones need not be tokenized.
    """

    tokens: int
    characters: int

    @classmethod
    def of(cls, processor: BackdropProcessor, tokens: int) -> "Context":
        """The context of so many tokens of a processor's tokenizer."""
        longest = max(map(len, processor.tokenizer.get_vocab()))
        return cls(tokens, tokens * longest)


def prompt_text(processor: BackdropProcessor, messages: list[dict], tools: list[dict] | None = None) -> str:
    """A chat as its template writes it, an `<image>` for each image part.

    Args:
        processor: the served model's.
        messages: of the chat completions API.
        tools: of the request.

    Raises:
        jinja2.TemplateError: the template cannot show a message.
    """
    return processor.apply_chat_template(
        template_messages(messages), tools=tools, add_generation_prompt=True, tokenize=False
    )


def prompt_tokens(processor: BackdropProcessor, text: str, items: Sequence[GroupItem]) -> int:
    """Number of tokens of a prompt, its images expanded.

    Args:
        processor: the served model's.
        text: of `prompt_text`.
        items: the groups, in order, one for each `<image>`.
    """
    tokens = len(processor.tokenizer(text, add_special_tokens=False).input_ids)
    return tokens + sum(item_tokens(processor, item) - 1 for item in items)


def item_tokens(processor: BackdropProcessor, item: GroupItem) -> int:
    """Number of tokens that a group's `<image>` becomes."""
    empty = processor.expand_group(0, GROUP_KINDS.index(item.kind))
    # Every placeholder is one token, and so is a separator; groups with extra placeholders have them when empty too.
    return item.patches + len(processor.tokenizer(empty, add_special_tokens=False).input_ids)


def check_shown(text: str, messages: list[dict]) -> None:
    """Compares a rendered chat with what the messages say: nothing may be left out.

    Args:
        text: of the whole prompt.
        messages: of the chat completions API, without special tokens.

    Raises:
        ApiError: 400, the template leaves a message out.
    """
    position = 0
    for number, message in enumerate(messages):
        content = message.get("content") or ""
        texts = [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]
        texts += [call["function"]["name"] for call in message.get("tool_calls") or ()]
        for each in texts:
            words = each.strip()
            found = text.find(words, position)
            if found < 0:  # a template may put messages in another order
                found = text.find(words)
            if found < 0:
                raise ApiError(
                    400,
                    f"the model's chat template leaves out messages[{number}], of the {message['role']}",
                    "not_shown",
                )
            position = found + len(words) if found >= position else position


def template_messages(messages: list[dict]) -> list[dict]:
    """Messages of the chat completions API in the form that the chat template takes."""
    found = []
    for message in messages:
        changed = dict(message)
        if isinstance(message.get("content"), list):
            changed["content"] = [
                {"type": "image"} if part["type"] == "image_url" else part for part in message["content"]
            ]
        if message.get("tool_calls"):  # engines decode the arguments before they render
            changed["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": _decoded(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        found.append(changed)
    return found


def _decoded(arguments: object) -> object:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def engine_probe(
    processor: BackdropProcessor, splitter: FrameSplitter, model: str
) -> tuple[dict, Callable[[int], None]]:
    """A request that an engine counts differently if it does not see patch groups, and a check of its count.

    The request shows a group that owns one patch; an engine that drops alpha sees an image of all patches.

    Args:
        processor: the served model's.
        splitter: encodes the group.
        model: the engine's name for the model.

    Returns:
        The request's body, and a function that takes `usage.prompt_tokens` of its answer and raises
        `EngineMismatchError` where it is not the number expected.
    """
    images = splitter.processor
    side = images.image_side
    owned: np.ndarray = np.zeros(images.num_patches, dtype=bool)
    owned[0] = True
    pixels: np.ndarray = np.zeros((side, side, 3), dtype=np.uint8)
    item = splitter.item(make_group(pixels, owned, BACKGROUND, images.patch_size))
    messages = [{"role": "user", "content": [item.part(), {"type": "text", "text": "?"}]}]
    wanted = prompt_tokens(processor, prompt_text(processor, messages), [item])
    body = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": 1}
    return body, lambda found: check_prompt_tokens(found, wanted)


def suppressed_tokens(processor: BackdropProcessor) -> dict[str, int]:
    """The `logit_bias` under which an engine never generates separators or the placeholder.

    Our own `generate` suppresses them; an engine knows nothing of them.
    """
    return {str(token): -100 for token in (processor.image_token_id, *(processor.separator_token_ids or ()))}


def check_prompt_tokens(found: int, wanted: int) -> None:
    """Compares an engine's count of prompt tokens with the number that the prompt has.

    Raises:
        EngineMismatchError: they differ.
    """
    if found != wanted:
        raise EngineMismatchError(
            f"the engine read a prompt of {wanted} tokens as {found}: it does not see patch groups, or runs another chat "
            f"template. Start it on the exported folder with {ENGINE_FLAGS}"
        )
