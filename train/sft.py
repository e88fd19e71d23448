"""Finetunes a Backdrop model with TRL's `SFTTrainer`: the program behind `backdrop train`.

    backdrop train --config finetune_lora --model MODEL --dataset DATASET --output_dir FOLDER
    accelerate launch --config_file fsdp.yaml -m backdrop.train.sft --config finetune_full ...
    backdrop train --config recipe.yaml --dry_run true

A recipe holds the fields of `BackdropArguments`, of TRL's `SFTConfig` and of its `ModelConfig` (LoRA, quantisation).
Examples of a dataset have `messages` and `images`; an image that is a patch group (RGBA) is used as it is, any other is
split.
"""

import json
import logging
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers import set_seed
from trl import ModelConfig, SFTConfig

from backdrop.data.load import BAD_ROWS

from .arguments import RECIPES, BackdropArguments, parse
from .assemble import assemble
from .dry_run import dry_run
from .recipe import check_recipe, choose_trainable, training_dataset
from .stages import write_stage
from .trainable import TrainableCheck, print_trainable, trainable_summary
from .trainer import PARTIAL, BackdropTrainer, replace_files

# A folder loads once it holds one of these, so they are written last.
WRITTEN_LAST = ("config.json", "adapter_config.json")
logger = logging.getLogger(__name__)


def build_trainer(arguments: BackdropArguments, training: SFTConfig, options: ModelConfig) -> BackdropTrainer:
    """Model, dataset and trainer of a recipe, everything checked before a weight is read."""
    check_recipe(arguments, training, options)
    dataset, bad_rows = training_dataset(arguments)
    eval_dataset = None
    if arguments.eval_dataset is not None:
        eval_dataset, _ = training_dataset(
            replace(arguments, dataset=arguments.eval_dataset, dataset_split=arguments.eval_split)
        )
    # New layers, copies and tokens are drawn before the trainer sets the seed.
    set_seed(training.seed)
    model, processor = assemble(arguments, options)
    model.config.trained_on_groups = model.config.trained_on_groups or processor.image_processor.split
    peft_config = choose_trainable(model, arguments, options)
    trainer = BackdropTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=[TrainableCheck()],
        matching_loss=arguments.matching_loss,
        group_kinds=arguments.group_kinds,
    )
    trainer.bad_rows = bad_rows
    return trainer


def finish(trainer: BackdropTrainer, arguments: BackdropArguments, training: SFTConfig, recipe: dict) -> None:
    """Writes the finished model into the output folder, which does not load if the run is cut off in here."""
    out, built = Path(training.output_dir), Path(training.output_dir, PARTIAL, "final")
    sharding = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if sharding is not None:  # checkpoints may be sharded, but the finished model is for everyone to load
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
    replace_files(built, out, WRITTEN_LAST)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def set_switches(
    arguments: BackdropArguments, training: SFTConfig, options: ModelConfig, recipe: dict
) -> None:
    """Saves the model with the recipe's switches set, for a stage in which nothing trains."""
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
    replace_files(built, out, WRITTEN_LAST)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def run(arguments: BackdropArguments, training: SFTConfig, options: ModelConfig) -> None:
    """Runs one recipe from start to finish."""
    recipe = {**vars(arguments), "training": training.to_dict(), "options": vars(options)}
    if arguments.dry_run:
        dry_run(arguments, training, options)
        return
    if not arguments.train:
        set_switches(arguments, training, options, recipe)
        return
    trainer = build_trainer(arguments, training, options)
    summary = trainable_summary(trainer.model)
    if trainer.is_world_process_zero():
        print_trainable(summary)
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        Path(training.output_dir, "trainable.json").write_text(json.dumps(summary, indent=2))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    finish(trainer, arguments, training, recipe)


def main(arguments: list[str] | None = None, recipe_folders: Iterable[Path] = (RECIPES,)) -> None:
    """The program: a mistake in a recipe is printed as one line, and the exit status is 1.

    Args:
        arguments: words of the command line; None: those of this process.
        recipe_folders: where `--config NAME` is looked for.
    """
    try:
        run(*parse(arguments, recipe_folders))
    except ValueError as error:
        Console(stderr=True).print(
            f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
