"""The exact number of prompt tokens of a request, and the probe that compares it with an engine's own count.

An engine that turns RGBA images into RGB, or that runs another chat template, answers too, but wrongly. Its number of
prompt tokens gives it away.
"""

from collections.abc import Callable, Sequence

import numpy as np

from backdrop.processing.patch_groups_backdrop import BACKGROUND, GROUP_KINDS, make_group
from backdrop.processing.processing_backdrop import BackdropProcessor

from .frames import FrameSplitter, GroupItem

ENGINE_FLAGS = (
    '--trust-remote-code --model-impl transformers --media-io-kwargs \'{"image": {"image_mode": null}}\''
)


class EngineMismatchError(RuntimeError):
    """The engine reads a request as another number of tokens than it has."""


def prompt_tokens(processor: BackdropProcessor, messages: list[dict], items: Sequence[GroupItem]) -> int:
    """Number of tokens of a prompt, its images expanded.

    Args:
        processor: the served model's: its chat template and tokenizer.
        messages: of the chat completions API, one image part for each item.
        items: the groups, in order.
    """
    text = processor.apply_chat_template(
        template_messages(messages), add_generation_prompt=True, tokenize=False
    )
    tokens = len(processor.tokenizer(text, add_special_tokens=False).input_ids)
    for item in items:
        group = processor.expand_group(item.patches, GROUP_KINDS.index(item.kind))
        tokens += len(processor.tokenizer(group, add_special_tokens=False).input_ids) - 1
    return tokens


def template_messages(messages: list[dict]) -> list[dict]:
    """Messages of the chat completions API in the form that the chat template takes."""
    return [
        message
        if isinstance(message["content"], str)
        else message
        | {
            "content": [
                {"type": "image"} if part["type"] == "image_url" else part for part in message["content"]
            ]
        }
        for message in messages
    ]


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
    wanted = prompt_tokens(processor, messages, [item])
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
