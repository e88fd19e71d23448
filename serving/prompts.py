"""What a request must cost on an engine that reads it as we do: its exact number of prompt tokens.

An engine that turned RGBA images into RGB, or that runs another chat template, would answer all the same, and wrongly.
It is known by its count.
"""

from collections.abc import Sequence

from backdrop.processing.patch_groups_backdrop import GROUP_KINDS
from backdrop.processing.processing_backdrop import BackdropProcessor

from .frames import GroupItem

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
