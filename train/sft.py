"""Finetunes a Backdrop model with TRL's `SFTTrainer`.

    python -m backdrop.train.sft --config train/recipes/scenes.yaml
    accelerate launch -m backdrop.train.sft --config recipe.yaml

A recipe holds the fields of `BackdropArguments`, of TRL's `SFTConfig` and of its `ModelConfig` (LoRA). Rows have
`messages` and `images`; an image that is a patch group (RGBA) is taken as it stands, any other is split.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from peft import LoraConfig
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

from backdrop.hub_export.convert import extend_model
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor

from .trainable import TrainableCheck, print_trainable, select_trainable, trainable_rows

# Only the language model: bare names such as q_proj would reach into the tower and prefusion too.
LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


@dataclass
class BackdropArguments:
    """What a recipe says beyond TRL's own options."""

    model: str = field(
        metadata={"help": "Folder of a Backdrop model (from convert, export or an earlier stage)."}
    )
    dataset: str = field(metadata={"help": "Folder of `save_to_disk`, a folder of files, or a Hub id."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    trainable: list[str] = field(
        default_factory=lambda: ["multi_modal_projector", "prefusion", "embed_tokens"],
        metadata={"help": "Without LoRA: regular expressions over parameter names; all else is frozen."},
    )
    lora_also_trains: list[str] = field(
        default_factory=lambda: ["multi_modal_projector"],
        metadata={
            "help": "With LoRA: modules trained whole beside it (multi_modal_projector, prefusion, ...)."
        },
    )
    num_prefusion_layers: int = field(
        default=0, metadata={"help": "Give the model prefusion if it has none."}
    )
    separate_vision_towers: bool = field(
        default=False, metadata={"help": "Give object groups a tower of their own."}
    )
    separate_projectors: bool = field(
        default=False, metadata={"help": "Give object groups a projector of their own."}
    )


def load_rows(name: str, split: str) -> Dataset:
    """Rows with `messages` and `images` from a folder written by `save_to_disk`, other files, or the Hub."""
    folder = Path(name)
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        rows = load_from_disk(name)
        rows = rows[split] if isinstance(rows, DatasetDict) else rows
    else:
        rows = load_dataset(name, split=split)
    missing = {"messages", "images"} - set(rows.column_names)
    if missing:
        raise ValueError(f"The dataset {name!r} has columns {rows.column_names}; wanted messages and images.")
    return rows


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


def build_trainer(arguments: BackdropArguments, training: SFTConfig, options: ModelConfig) -> SFTTrainer:
    """Model, rows and trainer of a recipe, everything checked before the first step."""
    if training.max_length is not None:
        raise ValueError(
            f"max_length is {training.max_length}; wanted null: cutting image tokens off is an error."
        )
    rows = load_rows(arguments.dataset, arguments.dataset_split)
    processor = BackdropProcessor.from_pretrained(arguments.model)
    model = BackdropForConditionalGeneration.from_pretrained(
        arguments.model, dtype=options.dtype or "auto", attn_implementation=options.attn_implementation
    )
    extend_model(
        model,
        num_prefusion_layers=arguments.num_prefusion_layers,
        separate_vision_towers=arguments.separate_vision_towers,
        separate_projectors=arguments.separate_projectors,
    )
    model.config.trained_on_groups = True
    peft_config = None
    if options.use_peft:
        also = [name for name in arguments.lora_also_trains if hasattr(model.model, name)]
        if also != arguments.lora_also_trains:
            missing = sorted(set(arguments.lora_also_trains) - set(also))
            raise ValueError(f"lora_also_trains: the model has no module {missing}.")
        peft_config = lora_config(model, options, also)
    else:
        select_trainable(model, arguments.trainable)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=rows,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=[TrainableCheck(), SaveConfig()],
    )
    return trainer


class SaveConfig(TrainerCallback):
    """Writes the model's configuration beside every checkpoint: an adapter's folder would not have it, and with it
    would go what the run added to the base (prefusion, towers) and that it was trained on groups."""

    def on_save(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            model.config.save_pretrained(Path(args.output_dir, f"checkpoint-{state.global_step}"))


def main() -> None:
    parser = TrlParser((BackdropArguments, SFTConfig, ModelConfig))
    arguments, training, options = parser.parse_args_and_config(fail_with_unknown_args=True)
    trainer = build_trainer(arguments, training, options)
    rows = trainable_rows(trainer.model)
    if trainer.is_world_process_zero():
        print_trainable(rows)
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        Path(training.output_dir, "trainable.json").write_text(json.dumps(rows, indent=2))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if trainer.is_world_process_zero():
        trainer.model.config.save_pretrained(training.output_dir)
        trainer.processing_class.save_pretrained(training.output_dir)
        Path(training.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history, indent=2))


if __name__ == "__main__":
    main()
