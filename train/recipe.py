"""What a recipe asks for: its checks, what trains, its dataset. Nothing here reads a weight."""

import logging
from dataclasses import MISSING, fields

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from torch import nn
from trl import ModelConfig, SFTConfig

from backdrop.data.load import load_rows
from backdrop.data.rows import BadRows
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

from .adapters import checked_lora_config
from .arguments import TRAINABLE, UNREAD, USE_INSTEAD, BackdropArguments
from .assemble import outline
from .stages import check_start
from .trainable import last_layers, select_trainable

logger = logging.getLogger(__name__)


def check_recipe(arguments: BackdropArguments, training: SFTConfig, options: ModelConfig) -> None:
    """Checks everything that can be wrong about a recipe without its dataset and weights.

    Raises:
        ValueError: the first mistake.
    """
    if training.max_length is not None:
        raise ValueError(
            f"max_length is {training.max_length}; wanted null: cutting image tokens off is an error."
        )
    if arguments.train and arguments.dataset is None:
        raise ValueError("dataset is null; wanted the dataset to train on (or train: false).")
    if training.eval_strategy != "no" and arguments.eval_dataset is None:
        raise ValueError(
            f"eval_strategy is {training.eval_strategy.value!r} without a dataset; wanted eval_dataset."
        )
    defaults = ModelConfig()
    for name, instead in USE_INSTEAD.items():
        if getattr(options, name, None) != getattr(defaults, name, None):
            raise ValueError(
                f"{name} is {getattr(options, name)!r}, which is not read here; wanted {instead}."
            )
    for option in fields(training):
        value = getattr(training, option.name)
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if option.name in UNREAD and value != default and value:
            raise ValueError(
                f"{option.name} is {value!r}, which does nothing here; wanted {UNREAD[option.name]}."
            )
    if training.n_gpu > 1:
        raise ValueError(
            f"{training.n_gpu} GPUs are visible to one process, which would divide the pixels of a batch otherwise than its "
            "rows; wanted `accelerate launch -m backdrop.train.sft ...`, or one GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    if arguments.streaming and training.max_steps <= 0:
        raise ValueError(f"max_steps is {training.max_steps} with streaming; wanted the number of steps.")
    if arguments.streaming and training.accelerator_config.dispatch_batches is not False:
        # Process 0 would cut every tensor to the number of examples, and there are more groups than examples.
        training.accelerator_config.dispatch_batches = False
    if (options.load_in_4bit or options.load_in_8bit) and not training.bf16:
        raise ValueError(
            "bf16 is false with load_in_4bit or load_in_8bit; wanted true: TRL keeps their adapters in bfloat16."
        )
    check_start(arguments.model, arguments.requires_stage)
    if arguments.train:
        outline_trainable(arguments, options)


def choose_trainable(
    model: BackdropForConditionalGeneration, arguments: BackdropArguments, options: ModelConfig
) -> LoraConfig | None:
    """Sets `requires_grad` as the recipe asks for, or returns the configuration of its LoRA adapter.

    Raises:
        ValueError: a name or pattern that the model does not have.
    """
    if not options.use_peft:
        if options.load_in_4bit or options.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit train adapters only; wanted use_peft: true.")
        patterns = (TRAINABLE if arguments.trainable is None else arguments.trainable) + last_layers(
            model, arguments.train_last_layers
        )
        select_trainable(model, patterns)
        return None
    if arguments.train_last_layers:
        raise ValueError(
            f"train_last_layers is {arguments.train_last_layers} beside use_peft; wanted one of the two."
        )
    if arguments.trainable is not None:
        raise ValueError(f"trainable is {arguments.trainable} beside use_peft; wanted lora_also_trains.")
    return checked_lora_config(model, options, arguments.lora_also_trains)


def outline_trainable(arguments: BackdropArguments, options: ModelConfig) -> nn.Module:
    """The recipe's model on the meta device, ready to train, so that a recipe that does not fit fails at once."""
    dtype = torch.float32 if options.dtype in (None, "auto") else getattr(torch, options.dtype)
    model = outline(arguments, options.attn_implementation, dtype)
    adapter = choose_trainable(model, arguments, options)
    return model if adapter is None else get_peft_model(model, adapter)


def training_dataset(arguments: BackdropArguments) -> tuple[Dataset | IterableDataset, BadRows]:
    """The recipe's dataset and its unusable rows, which are logged; of a stream they are known once it was read."""
    if arguments.dataset is None:
        raise ValueError("dataset is None; wanted a folder or a Hub id.")
    dataset, bad_rows = load_rows(
        arguments.dataset_name,
        arguments.dataset,
        split=arguments.dataset_split,
        images=arguments.image_folder,
        streaming=arguments.streaming,
        on_bad_row=arguments.on_bad_row,
        limit=arguments.max_rows,
        image_position=arguments.image_position or "first",
    )
    if len(bad_rows):
        logger.warning(bad_rows.summary())
    return dataset, bad_rows
