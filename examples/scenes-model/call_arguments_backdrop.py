"""What a call of the processor or of the image processor may name; what neither takes is refused, never dropped."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Beside its options `from_pretrained` of an image processor is given these, by users and by transformers itself.
LOADING_ARGUMENTS = frozenset(
    (
        "backend",
        "cache_dir",
        "code_revision",
        "force_download",
        "image_processor_filename",
        "local_files_only",
        "proxies",
        "resume_download",
        "return_unused_kwargs",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
        "use_auth_token",
        "use_fast",
        "user_agent",
    )
)
# What a saved configuration holds beside the options.
CONFIGURATION_FIELDS = frozenset(
    (
        "auto_map",
        "backend",
        "feature_extractor_type",
        "image_processor_type",
        "model_input_names",
        "processor_class",
        "transformers_version",
        "use_fast",
    )
)
_GENERATION_OPTIONS = GenerationConfig()
OTHER_MODALITIES = ("videos", "audio", "audios", "videos_kwargs", "audio_kwargs")


def refuse_arguments(owner: str, names: Iterable[str], takes: str) -> None:
    """Refuses arguments as Python does.

    Args:
        takes: what `owner` takes, for the message.

    Raises:
        TypeError: there is a name; it says which.
    """
    names = sorted(names)
    if names:
        raise TypeError(
            f"{owner}() got an unexpected keyword argument {', '.join(map(repr, names))}; it takes {takes}."
        )


def check_processor_arguments(processor, arguments: Mapping[str, Any]) -> None:
    """Checks the keyword arguments of a call of a processor; None and empty ones are as good as not given.

    Args:
        processor: a `ProcessorMixin` with `image_processor` and `valid_processor_kwargs`.

    Options of `generate` are told of, once, and left out.

    Raises:
        TypeError: one is neither the tokenizer's nor the image processor's, or is of another modality.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    others = [name for name in OTHER_MODALITIES if name in given and len(given[name])]
    owner = type(processor).__name__
    refuse_arguments(owner, others, "images and text")
    kinds = processor.valid_processor_kwargs.__annotations__
    of_text = set(kinds["text_kwargs"].__annotations__)
    of_images = set(processor.image_processor.valid_kwargs.__annotations__)
    takes = "options of the tokenizer and of the image processor"
    flat = of_text | of_images | set(kinds) | {"common_kwargs", *OTHER_MODALITIES}
    unknown = set(given) - flat
    # A pipeline hands every argument on that it does not know, `do_sample` among them: with LLaVA such a call answers.
    of_generate = {name for name in unknown if hasattr(_GENERATION_OPTIONS, name)}
    for name in sorted(of_generate):
        logger.warning_once(
            f"{name} is an option of generate, not of the processor, which leaves it out; with a pipeline it is "
            f"generate_kwargs={{{name!r}: ...}}."
        )
    refuse_arguments(owner, unknown - of_generate, takes)
    for name, known in (
        ("text_kwargs", of_text),
        ("images_kwargs", of_images),
        ("common_kwargs", of_text | of_images),
    ):
        refuse_arguments(owner, set(given.get(name) or ()) - known, takes)


def check_template_arguments(
    processor, template: str | dict | None, arguments: Mapping[str, Any], named: Iterable[str]
) -> dict[str, Any]:
    """Checks the further keyword arguments of `apply_chat_template`.

    Programs that serve many models set variables that only some templates know (`enable_thinking`): those are told of,
    once. What resembles an option of ours is a misspelling, and refused.

    Args:
        template: of the call, Jinja or the name of one of the processor's; None: the processor's own.
        named: parameters of `apply_chat_template`.

    Returns:
        The arguments without those that nothing takes.

    Raises:
        TypeError: one is nearly an argument of the processor's call, or an option of `generate`.
    """
    own = processor.chat_template
    texts = list(own.values()) if isinstance(own, dict) else [own]
    text = "\n".join(text for text in (template, *texts) if isinstance(text, str))
    others = {
        name: value
        for name, value in arguments.items()
        if name not in named and not re.search(rf"\b{re.escape(name)}\b", text)
    }
    known = [
        *processor.image_processor.valid_kwargs.__annotations__,
        *processor.valid_processor_kwargs.__annotations__["text_kwargs"].__annotations__,
        *vars(_GENERATION_OPTIONS),
    ]
    unknown = {name for name in others if not difflib.get_close_matches(name, known, cutoff=0.8)}
    for name in sorted(unknown):
        logger.warning_once(f"The chat template has no variable {name}; it is left out.")
    check_processor_arguments(
        processor, {name: value for name, value in others.items() if name not in unknown}
    )
    return {name: value for name, value in arguments.items() if name not in unknown}


def check_images_per_prompt(images: Any, counted: Iterable[int], texts: list[str], image_token: str) -> None:
    """Checks that each prompt has as many placeholders as images.

    Args:
        images: lists of images, one for each prompt; or one flat list, which is dealt out by the placeholders.
        counted: the number of images in each list of `images`; of a flat list its length alone.
        texts: the prompts.

    Raises:
        ValueError: a number differs; it names the prompt, what was found, and what was wanted.
    """
    placeholders, counted = [text.count(image_token) for text in texts], list(counted)
    if is_nested(images):
        if len(counted) != len(texts):
            raise ValueError(
                f"images are {len(counted)} lists for {len(texts)} prompts; wanted a list for each prompt, or one flat "
                "list."
            )
        for row, (found, wanted) in enumerate(zip(counted, placeholders, strict=True)):
            if found != wanted:
                raise ValueError(
                    f"Prompt {row} has {wanted} {image_token} placeholders, and its list has {found} images; wanted one each."
                )
    elif sum(counted) != sum(placeholders):
        shown = f" ({', '.join(map(str, placeholders))} by prompt)" if len(texts) > 1 else ""
        raise ValueError(
            f"The prompts have {sum(placeholders)} {image_token} placeholders for {sum(counted)} images; wanted one each"
            f"{shown}."
        )


def is_nested(images: Any) -> bool:
    """Whether images come as lists, one for each prompt."""
    return isinstance(images, list | tuple) and any(isinstance(part, list | tuple) for part in images)
