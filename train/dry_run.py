"""A dry run: what a recipe would train and the memory it would need, without loading a weight."""

from importlib.metadata import version

from datasets import Dataset, IterableDataset
from packaging.version import Version
from trl import ModelConfig, SFTConfig

from backdrop.processing.processing_backdrop import BackdropProcessor

from .arguments import BackdropArguments
from .assemble import build_processor
from .recipe import check_recipe, outline_trainable, training_dataset
from .trainable import print_trainable, trainable_summary

EXAMPLES_READ = 64


def dry_run(arguments: BackdropArguments, training: SFTConfig, options: ModelConfig) -> None:
    """Prints what would train and the peak memory of its longest example.

    Raises:
        ValueError: TRL is too old for the estimate, or the recipe does not fit.
    """
    if Version(version("trl")) < Version("1.16"):
        raise ValueError(
            f"the memory estimate runs TRL's own loss: TRL is {version('trl')}, wanted 1.16 or newer"
        )
    # Older versions of TRL lack what the estimate imports.
    from .memory import estimate, print_memory

    check_recipe(arguments, training, options)
    model = outline_trainable(arguments, options)
    print_trainable(trainable_summary(model))
    processor = build_processor(arguments)
    tokens, groups = longest_example(training_dataset(arguments)[0], processor)
    found = estimate(
        model,
        training,
        options,
        sequence_length=tokens,
        example_groups=groups,
        device=arguments.dry_run_device or ("cpu" if training.use_cpu else "cuda"),
    )
    print_memory(found)
    owned = sum(patches for patches, _ in groups)
    print(
        f"for examples of {tokens} tokens, {len(groups)} groups of {owned} patches in all: the longest of {EXAMPLES_READ} read"
    )


def longest_example(
    dataset: Dataset | IterableDataset, processor: BackdropProcessor
) -> tuple[int, list[tuple[int, int]]]:
    """Tokens of the longest of the dataset's first examples, and (patches, kind) of each of its groups.

    An ordinary image is split into its groups; a ready-made group is one.
    """
    longest: tuple[int, list[tuple[int, int]]] = (0, [])
    for example, _ in zip(dataset, range(EXAMPLES_READ), strict=False):
        messages = [dict(message) for message in example["messages"]]
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        text = messages[first]["content"]
        if isinstance(text, str):
            parts = [{"type": "image"} for _ in example["images"]] + [{"type": "text", "text": text}]
            messages[first] = {"role": "user", "content": parts}
        prompt = processor.apply_chat_template(messages, tokenize=False)
        inputs = processor(images=list(example["images"]) or None, text=prompt, add_special_tokens=False)
        tokens = len(inputs["input_ids"][0])
        if tokens > longest[0]:
            masks = inputs.get("patch_mask", [])
            patches = [int(mask.sum()) for mask in masks]
            longest = tokens, list(zip(patches, map(int, inputs.get("group_kind", [])), strict=True))
    return longest
