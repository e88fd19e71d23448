"""What a request must cost on an engine that reads it as we do: its exact number of prompt tokens.

An engine that turned RGBA images into RGB, or that runs another chat template, would answer all the same, and wrongly.
It is known by its count.
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
    """The engine does not read requests as the client writes them."""


def prompt_tokens(processor: BackdropProcessor, messages: list[dict], items: Sequence[GroupItem]) -> int:
    """Tokens of a prompt.

    Args:
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
    """The API's messages as the chat template knows them."""
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
    """A request of a few tokens that an engine which does not see patch groups counts differently, and the check.

    The check takes the usage's prompt_tokens and raises `EngineMismatchError`.
    """
    images = splitter.processor
    side = images.image_side
    owned = np.zeros(images.num_patches, dtype=bool)
    owned[0] = True
    pixels = np.zeros((side, side, 3), dtype=np.uint8)
    item = splitter.item(make_group(pixels, owned, BACKGROUND, images.patch_size))
    messages = [{"role": "user", "content": [item.part(), {"type": "text", "text": "?"}]}]
    wanted = prompt_tokens(processor, messages, [item])
    body = {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": 1}
    return body, lambda found: check_prompt_tokens(found, wanted)


def suppressed_tokens(processor: BackdropProcessor) -> dict[str, int]:
    """`logit_bias` under which separators and the placeholder are never generated, as in our own `generate`."""
    return {str(token): -100 for token in (processor.image_token_id, *(processor.separator_token_ids or ()))}


def check_prompt_tokens(found: int, wanted: int) -> None:
    """Raises `EngineMismatchError` where an engine counted other tokens than the prompt has."""
    if found != wanted:
        raise EngineMismatchError(
            f"the engine read a prompt of {wanted} tokens as {found}: it does not see patch groups, or runs another chat "
            f"template. Start it on the exported folder with {ENGINE_FLAGS}"
        )
