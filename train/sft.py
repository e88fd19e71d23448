"""Finetunes a Backdrop model with TRL's `SFTTrainer`.

    python -m backdrop.train.sft --config train/recipes/finetune_lora.yaml --model MODEL --dataset ROWS
    accelerate launch --config_file fsdp.yaml -m backdrop.train.sft --config recipe.yaml
    python -m backdrop.train.sft --config recipe.yaml --dry_run true

A recipe holds the fields of `BackdropArguments`, of TRL's `SFTConfig` and of its `ModelConfig` (LoRA, bits). Rows have
`messages` and `images`; an image that is a patch group (RGBA) is taken as it stands, any other is split.
"""

import json
import logging
import re
import shutil
import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import set_seed
from trl import ModelConfig, SFTConfig, TrlParser

from backdrop.data.load import BAD_ROWS, load_rows
from backdrop.data.rows import BadRows
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.train.assemble import ModelArguments, assemble, build_processor, outline
from backdrop.train.stages import check_start, write_stage
from backdrop.train.trainable import (
    TrainableCheck,
    last_layers,
    print_trainable,
    select_trainable,
    trainable_rows,
)
from backdrop.train.trainer import GROUP_KINDS, PARTIAL, BackdropTrainer, replace_files

# Only the language model: bare names such as q_proj would reach into the tower and prefusion too.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
TRAINABLE = ["multi_modal_projector", "prefusion", "separators"]
# Options of TRL's that nothing here reads -> what does their work.
UNREAD = {
    "model_name_or_path": "model",
    "model_revision": "a local folder of that revision as model",
    "lora_modules_to_save": "lora_also_trains",
    "lora_target_parameters": "lora_target_modules",
    "lora_task_type": "CAUSAL_LM",
    "bnb_4bit_quant_storage": "its default",
}
DRY_RUN_ROWS = 64
# These make a folder loadable; they come last when a run ends.
LOADED_FIRST = ("config.json", "adapter_config.json")
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class BackdropArguments(ModelArguments):
    """What a recipe says beyond TRL's own options."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the data; of rows: `save_to_disk`, parquet, JSON."},
    )
    dataset_name: str = field(
        default="rows",
        metadata={"help": "What the data is: rows, llava_instruct, textvqa, ... (backdrop.data)."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    image_folder: str | None = field(default=None, metadata={"help": "Where the images are, if apart."})
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed (set max_steps)."})
    on_bad_row: str = field(
        default="skip",
        metadata={
            "help": "A row that cannot be used is counted and left out, or ends the run.",
            "choices": ["skip", "raise"],
        },
    )
    max_rows: int | None = field(default=None, metadata={"help": "Use only so many rows."})
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "As dataset, for the loss that eval_strategy asks for; the same dataset_name."},
    )
    eval_split: str = field(default="validation", metadata={"help": "Split of eval_dataset."})
    stage: str | None = field(default=None, metadata={"help": "Name noted beside the finished checkpoint."})
    requires_stage: str | None = field(
        default=None, metadata={"help": "Refuse to start from a checkpoint of any other stage."}
    )
    train: bool = field(
        default=True, metadata={"help": "False: set the switches above and save, without a step."}
    )
    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "Without LoRA: regular expressions over parameter names, `separators`; all else is frozen. "
            f"Default: {', '.join(TRAINABLE)}."
        },
    )
    train_last_layers: int = field(
        default=0, metadata={"help": "Without LoRA: the language model's last so many layers train too."}
    )
    lora_also_trains: list[str] = field(
        default_factory=lambda: ["multi_modal_projector"],
        metadata={
            "help": "With LoRA: modules trained whole beside it (multi_modal_projector, prefusion, ...)."
        },
    )
    matching_loss: float = field(
        default=0.0, metadata={"help": "Weight of the image-text matching loss (two more forwards), 0: off."}
    )
    group_kinds: str = field(
        default="any",
        metadata={"help": "Refuse groups of another kind.", "choices": sorted(GROUP_KINDS)},
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print what trains and the peak memory it needs, and stop."}
    )
    dry_run_device: str | None = field(
        default=None,
        metadata={
            "help": "What a dry run is for; on a machine without a GPU: --use_cpu true --dry_run_device cuda.",
            "choices": ["cuda", "cpu"],
        },
    )


@dataclass
class TrainingConfig(SFTConfig):
    """TRL's own options with three defaults that fit: image tokens are never cut off, a checkpoint every epoch."""

    max_length: int | None = field(
        default=None, metadata={"help": "Must stay null: cutting image tokens off is an error."}
    )
    save_strategy: str = field(default="epoch", metadata={"help": "When checkpoints are saved."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Where metrics go."})


def choose_trainable(model, arguments: BackdropArguments, options: ModelConfig) -> LoraConfig | None:
    """Marks what trains; LoRA's configuration where the recipe asks for it. Nothing is loaded for this.

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
    optional = {"prefusion", "object_vision_tower", "object_multi_modal_projector"}
    missing = [name for name in arguments.lora_also_trains if not hasattr(model.model, name)]
    unknown = sorted(set(missing) - optional)
    if unknown:
        raise ValueError(f"lora_also_trains: the model has no module {unknown}.")
    check_lora_targets(model, options.lora_target_modules)
    return lora_config(model, options, [name for name in arguments.lora_also_trains if name not in missing])


def check_lora_targets(model, targets: list[str] | str | None) -> None:
    """Names the targets that match no module: peft passes over one as long as another matches."""
    names = [name for name, _ in model.named_modules()]
    if targets is None or targets == "all-linear":
        return
    if isinstance(targets, str):
        idle = (
            []
            if any(re.fullmatch(targets, name) or name.endswith(f".{targets}") for name in names)
            else [targets]
        )
    else:
        idle = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    if idle:
        raise ValueError(
            f"lora_target_modules: {idle} matches no module; wanted names such as q_proj or a regular expression."
        )


def lora_config(model: BackdropForConditionalGeneration, options: ModelConfig, also: list[str]) -> LoraConfig:
    """LoRA on the language model; the separators' rows and the modules in `also` train beside it."""
    separators = model.config.separator_token_ids
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        target_modules=options.lora_target_modules or LORA_TARGETS,
        modules_to_save=also or None,
        trainable_token_indices={"embed_tokens": separators} if separators else None,
        task_type="CAUSAL_LM",
    )


def outline_trainable(arguments: BackdropArguments, options: ModelConfig):
    """The model of the recipe on the meta device, ready to train: what fails here costs nothing."""
    dtype = torch.float32 if options.dtype in (None, "auto") else getattr(torch, options.dtype)
    model = outline(arguments, options.attn_implementation, dtype)
    adapter = choose_trainable(model, arguments, options)
    return model if adapter is None else get_peft_model(model, adapter)


def build_trainer(arguments: BackdropArguments, training: SFTConfig, options: ModelConfig) -> BackdropTrainer:
    """Model, rows and trainer of a recipe, everything checked before a weight is read."""
    check_recipe(arguments, training, options)
    rows, bad = training_rows(arguments)
    eval_rows = None
    if arguments.eval_dataset is not None:
        eval_rows, _ = training_rows(
            replace(arguments, dataset=arguments.eval_dataset, dataset_split=arguments.eval_split)
        )
    set_seed(training.seed)  # new layers, copies and tokens are drawn before the trainer sets it
    model, processor = assemble(arguments, options)
    model.config.trained_on_groups = model.config.trained_on_groups or processor.image_processor.split
    peft_config = choose_trainable(model, arguments, options)
    trainer = BackdropTrainer(
        model=model,
        args=training,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=[TrainableCheck()],
        matching_loss=arguments.matching_loss,
        group_kinds=arguments.group_kinds,
    )
    trainer.bad_rows = bad
    return trainer


def check_recipe(arguments: BackdropArguments, training: SFTConfig, options: ModelConfig) -> None:
    """Everything about a recipe that can be wrong without its data and weights."""
    if training.max_length is not None:
        raise ValueError(
            f"max_length is {training.max_length}; wanted null: cutting image tokens off is an error."
        )
    if arguments.train and arguments.dataset is None:
        raise ValueError("dataset is null; wanted the rows to train on (or train: false).")
    if training.eval_strategy != "no" and arguments.eval_dataset is None:
        raise ValueError(
            f"eval_strategy is {training.eval_strategy.value!r} without rows; wanted eval_dataset."
        )
    defaults = ModelConfig()
    for name, instead in UNREAD.items():
        if getattr(options, name, None) != getattr(defaults, name, None):
            raise ValueError(
                f"{name} is {getattr(options, name)!r}, which is not read here; wanted {instead}."
            )
    if arguments.streaming and training.max_steps <= 0:
        raise ValueError(f"max_steps is {training.max_steps} with streaming; wanted the number of steps.")
    if arguments.streaming and training.accelerator_config.dispatch_batches is not False:
        # Process 0 would cut every tensor to the batch's rows, and groups are more than rows.
        training.accelerator_config.dispatch_batches = False
    if (options.load_in_4bit or options.load_in_8bit) and not training.bf16:
        raise ValueError(
            "bf16 is false with load_in_4bit or load_in_8bit; wanted true: TRL keeps their adapters in bfloat16."
        )
    check_start(arguments.model, arguments.requires_stage)
    if arguments.train:
        outline_trainable(arguments, options)


def training_rows(arguments: BackdropArguments) -> tuple[Dataset | IterableDataset, BadRows]:
    """The recipe's rows, and the bad ones: named on the console, of a stream only known when it has been read."""
    rows, bad = load_rows(
        arguments.dataset_name,
        arguments.dataset,
        split=arguments.dataset_split,
        images=arguments.image_folder,
        streaming=arguments.streaming,
        on_bad_row=arguments.on_bad_row,
        limit=arguments.max_rows,
        image_position=arguments.image_position or "first",
    )
    if len(bad):
        logger.warning(bad.summary())
    return rows, bad


def dry_run(arguments: BackdropArguments, training: SFTConfig, options: ModelConfig) -> None:
    """Prints what would train and what memory it needs, without loading a weight."""
    if Version(version("trl")) < Version("1.16"):
        raise ValueError(
            f"the memory estimate runs TRL's own loss: TRL is {version('trl')}, wanted 1.16 or newer"
        )
    from backdrop.train.memory import estimate, print_memory

    check_recipe(arguments, training, options)
    model = outline_trainable(arguments, options)
    print_trainable(trainable_rows(model))
    processor = build_processor(arguments)
    longest, images, groups = row_shape(training_rows(arguments)[0], processor)
    found = estimate(
        model,
        training,
        options,
        sequence_length=longest,
        images_per_row=images,
        groups_per_image=groups,
        device=arguments.dry_run_device or ("cpu" if training.use_cpu else "cuda"),
    )
    print_memory(found)
    print(
        f"for rows of {longest} tokens, {images} images of {groups} groups: the longest of {DRY_RUN_ROWS} read"
    )


def row_shape(rows: Dataset | IterableDataset, processor: BackdropProcessor) -> tuple[int, int, int]:
    """Of the first rows the most tokens, images and groups an image: what a dry run counts with."""
    longest, images, groups = 0, 1, 1
    for row, _ in zip(rows, range(DRY_RUN_ROWS), strict=False):
        messages = [dict(message) for message in row["messages"]]
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        text = messages[first]["content"]
        if isinstance(text, str):
            parts = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": text}]
            messages[first] = {"role": "user", "content": parts}
        prompt = processor.apply_chat_template(messages, tokenize=False)
        inputs = processor(images=list(row["images"]) or None, text=prompt, add_special_tokens=False)
        longest = max(longest, len(inputs["input_ids"][0]))
        if row["images"]:
            images = max(images, len(row["images"]))
            groups = max(groups, -(-len(inputs["group_kind"]) // len(row["images"])))
    return longest, images, groups


def finish(trainer: BackdropTrainer, arguments: BackdropArguments, training: SFTConfig, recipe: dict) -> None:
    """Writes the finished model into the output folder; a run cut off in here leaves a folder that does not load."""
    out, built = Path(training.output_dir), Path(training.output_dir, PARTIAL, "final")
    sharding = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if sharding is not None:  # checkpoints may be in parts; what others load may not
        sharding.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(built))
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    if not any(built.glob("*.safetensors")):
        raise RuntimeError(
            f"{built} holds no weights after saving; wanted *.safetensors. The checkpoints are kept."
        )
    trainer.model.config.save_pretrained(built)
    trainer.processing_class.save_pretrained(built)
    if arguments.streaming and len(trainer.bad_rows):
        logger.warning(trainer.bad_rows.summary())
    (built / BAD_ROWS).write_text(json.dumps(list(trainer.bad_rows), indent=1), encoding="utf-8")
    (built / "log.json").write_text(json.dumps(trainer.state.log_history, indent=2))
    write_stage(built, arguments.stage, recipe)
    replace_files(built, out, LOADED_FIRST)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def set_switches(
    arguments: BackdropArguments, training: SFTConfig, options: ModelConfig, recipe: dict
) -> None:
    """A stage in which nothing trains: the model with the recipe's switches set."""
    check_recipe(arguments, training, options)
    if training.process_index:
        return
    out, built = Path(training.output_dir), Path(training.output_dir, PARTIAL, "final")
    set_seed(training.seed)
    model, processor = assemble(arguments, options)
    built.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(built)
    processor.save_pretrained(built)
    write_stage(built, arguments.stage, recipe)
    replace_files(built, out, LOADED_FIRST)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def parse(arguments: list[str] | None = None) -> tuple[BackdropArguments, SFTConfig, ModelConfig]:
    """A recipe and what the command line says over it.

    Raises:
        ValueError: a key of the recipe that no option has, named.
    """
    parser = TrlParser((BackdropArguments, TrainingConfig, ModelConfig))
    return parser.parse_args_and_config(args=arguments, fail_with_unknown_args=True)


def run(arguments: BackdropArguments, training: SFTConfig, options: ModelConfig) -> None:
    """One recipe from start to finish."""
    recipe = {**vars(arguments), "training": training.to_dict(), "options": vars(options)}
    if arguments.dry_run:
        dry_run(arguments, training, options)
        return
    if not arguments.train:
        set_switches(arguments, training, options, recipe)
        return
    trainer = build_trainer(arguments, training, options)
    rows = trainable_rows(trainer.model)
    if trainer.is_world_process_zero():
        print_trainable(rows)
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        Path(training.output_dir, "trainable.json").write_text(json.dumps(rows, indent=2))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    finish(trainer, arguments, training, recipe)


def main() -> None:
    try:
        run(*parse())
    except ValueError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
