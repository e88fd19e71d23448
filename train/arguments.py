"""The options of a training run: ours, TRL's, and the recipe files that hold them.

A recipe is a YAML file with fields of `BackdropArguments`, of TRL's `SFTConfig` and of its `ModelConfig` (LoRA,
quantisation). The command line overrides it.
"""

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from trl import ModelConfig, SFTConfig, TrlParser

from .assemble import ModelArguments
from .trainer import GROUP_KINDS

RECIPES = Path(__file__).parent / "recipes"
TRAINABLE = ["multi_modal_projector", "prefusion", "separators"]
# TRL's options that are refused -> what to use instead.
USE_INSTEAD = {
    "model_name_or_path": "model",
    "model_revision": "a local folder of that revision as model",
    "lora_modules_to_save": "lora_also_trains",
    "lora_target_parameters": "lora_target_modules",
    "lora_task_type": "CAUSAL_LM",
    "bnb_4bit_quant_storage": "its default",
}
_PREPARED = "its default: rows are prepared in the collator, as messages and images"
_KERNELS = "its default: these kernels are written for other models"
_EXPORT = "backdrop export and backdrop push, which write a complete repository"
_NO_METRICS = "its default: no metrics are computed from the logits; backdrop eval scores a model"
# Options of `SFTConfig` and `TrainingArguments` that would do nothing here, or something else -> what to use instead.
UNREAD = {
    "use_liger_kernel": _KERNELS,
    "liger_kernel_config": _KERNELS,
    "model_init_kwargs": "dtype, attn_implementation and the switches of a recipe",
    "trust_remote_code": "its default: the model's code is this package's",
    "chat_template_path": "backdrop convert --chat-template FILE",
    "dataset_text_field": _PREPARED,
    "dataset_kwargs": _PREPARED,
    "dataset_num_proc": _PREPARED,
    "truncation_mode": _PREPARED,
    "packing": "false: prompts with images are not packed",
    "eval_packing": "false: prompts with images are not packed",
    "padding_free": "false: prompts with images are padded",
    "pad_token": "the tokenizer's own",
    "do_train": "train: true",
    "do_predict": "backdrop eval",
    "include_for_metrics": _NO_METRICS,
    "batch_eval_metrics": _NO_METRICS,
    "push_to_hub": _EXPORT,
    "hub_model_id": _EXPORT,
    "hub_always_push": _EXPORT,
    "hub_private_repo": _EXPORT,
    "hub_revision": _EXPORT,
    "hub_token": _EXPORT,
}


@dataclass(kw_only=True)
class BackdropArguments(ModelArguments):
    """What a recipe says beyond TRL's own options."""

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the dataset; of ready-made examples: `save_to_disk`, parquet or JSON."
        },
    )
    dataset_name: str = field(
        default="rows",
        metadata={
            "help": "Format of the dataset: rows (ready-made examples) or a public set's name, as `backdrop data` has "
            "them (llava_instruct, textvqa, ...)."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder of the image files, where it is not the dataset's own."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read examples as they are needed (set max_steps)."}
    )
    on_bad_row: str = field(
        default="skip",
        metadata={
            "help": "What an unusable row of the dataset does: it is counted and left out, or it ends the run.",
            "choices": ["skip", "raise"],
        },
    )
    max_rows: int | None = field(
        default=None, metadata={"help": "Use only the first so many rows of the dataset."}
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Dataset of the same dataset_name for the loss that eval_strategy asks for."},
    )
    eval_split: str = field(default="validation", metadata={"help": "Split of eval_dataset."})
    stage: str | None = field(default=None, metadata={"help": "Name to note beside the finished checkpoint."})
    requires_stage: str | None = field(
        default=None, metadata={"help": "Refuse to start from a checkpoint of any other stage."}
    )
    train: bool = field(
        default=True,
        metadata={"help": "False: change the model's parts as asked for and save it, without a step."},
    )
    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "Without LoRA: regular expressions over parameter names, or `separators`; everything else is "
            f"frozen. Default: {', '.join(TRAINABLE)}."
        },
    )
    train_last_layers: int = field(
        default=0, metadata={"help": "Without LoRA: also train so many of the language model's last layers."}
    )
    lora_also_trains: list[str] = field(
        default_factory=lambda: ["multi_modal_projector"],
        metadata={
            "help": "With LoRA: modules trained whole beside it (multi_modal_projector, prefusion, ...)."
        },
    )
    matching_loss: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the image-text matching loss, which costs two more forward passes; 0 is off."
        },
    )
    group_kinds: str = field(
        default="any",
        metadata={
            "help": "Refuse batches with groups of another kind.",
            "choices": sorted(GROUP_KINDS),
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Print what would train and the peak memory it needs, and stop."}
    )
    dry_run_device: str | None = field(
        default=None,
        metadata={
            "help": "The device that a dry run models; it need not be present: --use_cpu true --dry_run_device cuda "
            "works without a GPU.",
            "choices": ["cuda", "cpu"],
        },
    )


@dataclass
class TrainingConfig(SFTConfig):
    """TRL's `SFTConfig` with three other defaults: no cut at a length, a checkpoint every epoch, no reporting."""

    max_length: int | None = field(
        default=None, metadata={"help": "Must stay null: cutting image tokens off is an error."}
    )
    save_strategy: str = field(default="epoch", metadata={"help": "When checkpoints are saved."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Where metrics go."})


# Our own options in the order and the groups of `--help`.
GROUPS = {
    "What to train": (
        "model",
        "trainable",
        "train_last_layers",
        "lora_also_trains",
        "matching_loss",
        "train",
    ),
    "Data": (
        "dataset",
        "dataset_name",
        "dataset_split",
        "image_folder",
        "image_position",
        "streaming",
        "max_rows",
        "on_bad_row",
        "eval_dataset",
        "eval_split",
    ),
    "Parts of the model (left out, each stays as the model has it)": (
        "split",
        "margin",
        "detector",
        "separators",
        "num_prefusion_layers",
        "separate_projectors",
        "separate_vision_towers",
        "int8_threshold",
        "background_first",
        "masked_attention",
        "raster_order",
    ),
    "Checks": ("dry_run", "dry_run_device", "group_kinds", "stage", "requires_stage"),
}
USAGE = "backdrop train --config RECIPE --model MODEL --dataset DATASET --output_dir FOLDER [options]"
DESCRIPTION = """\
Finetunes a Backdrop model with TRL's SFTTrainer.
On several GPUs: accelerate launch -m backdrop.train.sft --config RECIPE ..."""
EXAMPLES = """\
Examples, from the root of a checkout; neither needs a GPU:
  # Eight made scenes as a dataset, and one step of LoRA on the shipped model.
  backdrop scenes rows --model examples/scenes-model --out runs/rows --scenes 8
  backdrop train --config finetune_lora --model examples/scenes-model \\
      --dataset runs/rows --output_dir runs/lora --max_steps 1 \\
      --use_cpu true --bf16 false
  # What the same recipe would train, and the memory it would need on a GPU.
  backdrop train --config finetune_lora --model examples/scenes-model \\
      --dataset runs/rows --output_dir runs/lora --dry_run true \\
      --use_cpu true --dry_run_device cuda
"""


class RecipeParser(TrlParser):
    """TRL's parser with a help page that shows our own options first, in groups."""

    def __init__(self, folders: Iterable[Path]):
        super().__init__((BackdropArguments, TrainingConfig, ModelConfig), prog="backdrop train", usage=USAGE)
        self.folders = tuple(folders)

    def format_help(self) -> str:
        """The help page: our own options first, in groups, then TRL's."""
        # Of a switch there are two, --train and --no_train; the first is the one to show.
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)
        names = ", ".join(shipped_recipes(self.folders))
        sections = [
            f"Usage: {USAGE}",
            DESCRIPTION,
            "\n".join(
                [
                    "Recipe:",
                    _entry(
                        "--config RECIPE",
                        f"YAML file of options, which those given here override, or the name of a shipped one: {names}.",
                    ),
                    _entry("--help", "Show this page."),
                ]
            ),
        ]
        groups: dict[str, Sequence[str]] = dict(GROUPS)
        groups["TRL's ModelConfig: precision, quantisation, LoRA"] = [
            f.name for f in fields(ModelConfig) if f.name not in USE_INSTEAD
        ]
        groups[
            "TRL's SFTConfig, with transformers' TrainingArguments: steps, optimizer, checkpoints, logging"
        ] = [f.name for f in fields(TrainingConfig) if f.init and f.name not in UNREAD]
        for title, dests in groups.items():
            sections.append("\n".join([f"{title}:", *(_option(actions[dest]) for dest in dests)]))
        return "\n\n".join([*sections, EXAMPLES])


def _option(action: argparse.Action) -> str:
    """An option of the help page: its name, its values, what it does, its default."""
    if action.choices is not None:
        value = "|".join(str(choice) for choice in action.choices)
    elif getattr(action.type, "__name__", "") == "string_to_bool":
        value = "true|false"
    elif action.type in (int, float):
        value = {int: "N", float: "X"}[action.type]
    else:
        value = "NAME" if action.nargs == "+" else action.dest.upper().rpartition("_")[2]
    if action.nargs == "+":
        value += " ..."
    text = " ".join((action.help or "").split()) % vars(action)
    default = getattr(action.default, "value", action.default)
    if default not in (None, "", []) and "default" not in text.lower():
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        text += f" (default: {shown.lower() if isinstance(default, bool) else shown})"
    return _entry(f"{action.option_strings[0]} {value}", text)


def _entry(option: str, text: str) -> str:
    """An option of the help page, and what it does in an indented column."""
    width = min(shutil.get_terminal_size().columns, 110)
    start = f"  {option}"
    lines = textwrap.wrap(text, width - 30, break_on_hyphens=False) or [""]
    if len(start) < 29:
        lines[0] = start.ljust(30) + lines[0]
        return "\n".join([lines[0], *(" " * 30 + line for line in lines[1:])])
    return "\n".join([start, *(" " * 30 + line for line in lines)])


def shipped_recipes(folders: Iterable[Path] = (RECIPES,)) -> list[str]:
    """Names of the recipes in the folders, such as "finetune_lora"; those of sub-folders as "folder/name"."""
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in folders
        for path in folder.rglob("*.yaml")
    )


def find_recipe(name: str, folders: Iterable[Path] = (RECIPES,)) -> Path:
    """The recipe file of that path, or the shipped one of that name.

    Raises:
        ValueError: neither; the shipped names are listed.
    """
    folders = tuple(folders)
    for path in (Path(name), *(folder / f"{name}.yaml" for folder in folders)):
        if path.is_file():
            return path
    raise ValueError(
        f"config is {name!r}, which is no file and no shipped recipe; wanted a path or one of "
        f"{', '.join(shipped_recipes(folders))}."
    )


def parse(
    arguments: list[str] | None = None, folders: Iterable[Path] = (RECIPES,)
) -> tuple[BackdropArguments, SFTConfig, ModelConfig]:
    """The options of a run: a recipe (`--config`), and what the command line says over it.

    Args:
        arguments: words of the command line; None: those of this process.
        folders: where shipped recipes are looked for.

    Raises:
        ValueError: an unknown recipe, or a key of the recipe that no option has, named.
    """
    folders = tuple(folders)
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--config")
    found, rest = named.parse_known_args(arguments)
    if found.config is not None:
        rest = ["--config", str(find_recipe(found.config, folders)), *rest]
    return RecipeParser(folders).parse_args_and_config(args=rest, fail_with_unknown_args=True)
