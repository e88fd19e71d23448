"""What trains: selection by name, a table before the first step, a check after it."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from backdrop.modeling.configuration_backdrop import BACKGROUND, OBJECT
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

# Parts that a model may lack: naming one is no mistake.
OPTIONAL_PARTS = ("prefusion", "object_vision_tower", "object_multi_modal_projector", "separators")
PATIENCE = 20
SEPARATORS = "separators"


def unused_parameters(model: BackdropForConditionalGeneration) -> set[str]:
    """Names of tower parameters after the feature layer: their output is not used, so they get no gradient."""
    names = set()
    depth = model.config.vision_config.num_hidden_layers
    used = max(layer if layer >= 0 else depth + 1 + layer for layer in model.config.feature_layers)
    for name, _ in model.named_parameters():
        if "vision_tower." not in name:
            continue
        layer = re.search(r"encoder\.layers?\.(\d+)\.", name)
        behind = layer is not None and int(layer.group(1)) >= used
        if behind or re.search(r"vision_tower\.(post_layernorm|layernorm|head)\.|mask_token$", name):
            names.add(name)
    return names


def last_layers(model: BackdropForConditionalGeneration, count: int) -> list[str]:
    """Patterns of the language model's last `count` layers and its final norm.

    Raises:
        ValueError: the language model has fewer.
    """
    depth = model.config.text_config.num_hidden_layers
    if not 0 <= count <= depth:
        raise ValueError(f"train_last_layers is {count}; the language model has {depth} layers.")
    if count == 0:
        return []
    numbers = "|".join(str(number) for number in range(depth - count, depth))
    return [rf"language_model\.layers\.({numbers})\.", r"language_model\.norm\."]


def select_trainable(model: BackdropForConditionalGeneration, patterns: list[str]) -> None:
    """Freezes all parameters but those in whose names one of the regular expressions is found.

    `separators` selects the separators' embedding rows (and those of a tied head): the other embedding rows get no
    gradient. A tied head trains with the embedding table, whichever of them is named. The name of a part that this
    model does not have (`OPTIONAL_PARTS`) selects nothing.

    Raises:
        ValueError: another pattern that matches no parameter (named), or no pattern at all.
    """
    # A tied head is the embedding table under a second name.
    aliases: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases[parameter].append(name)
    names = [name for of_one in aliases.values() for name in of_one]
    found = {pattern: any(re.search(pattern, name) for name in names) for pattern in patterns}
    unmatched = [
        pattern for pattern, matches in found.items() if not matches and pattern not in OPTIONAL_PARTS
    ]
    if unmatched or not patterns:
        raise ValueError(
            f"trainable: {unmatched or 'no pattern'} matches no parameter; wanted regular expressions over names such as {names[0]!r}."
        )
    unused = unused_parameters(model)
    for name, parameter in model.named_parameters():
        chosen = any(re.search(pattern, alias) for pattern in patterns for alias in aliases[parameter])
        parameter.requires_grad_(chosen and name not in unused)
    embedding = model.get_input_embeddings()
    embedding.trained_embedding_rows = None
    if SEPARATORS in patterns and model.config.separator_token_ids and not embedding.weight.requires_grad:
        _train_embedding_rows(embedding, model.config.separator_token_ids)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"trainable: the model has none of {patterns}; nothing would train.")


def _train_embedding_rows(embedding: nn.Embedding, rows: list[int]) -> None:
    embedding.trained_embedding_rows = list(rows)
    embedding.weight.requires_grad_(True)
    embedding.weight.register_hook(
        lambda gradient: gradient.masked_fill(~embedding_row_mask(gradient, rows), 0)
    )


def embedding_row_mask(table: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """`[R, 1]` bool: which of a table's `R` embedding rows are among `rows`.

    Of a table that FSDP has sharded, it is the mask of the embedding rows in this process.
    """
    mask = torch.zeros(len(table), 1, dtype=torch.bool, device=table.device)
    mask[rows] = True
    if isinstance(table, DTensor):
        mask = distribute_tensor(mask, table.device_mesh, table.placements, src_data_rank=None)
    return local(mask)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process' shard of a tensor that FSDP has sharded, without a copy; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mask_sharded_gradients(model: nn.Module, partly: dict[str, list[int]]) -> None:
    """Zeros the gradients of embedding rows that do not train, in tables that FSDP2 has sharded.

    FSDP2 replaces the parameters, and with them the gradient hook that does this elsewhere.

    Args:
        partly: what `partly_trained_tables` found.
    """
    for name, parameter in model.named_parameters():
        if name in partly and isinstance(parameter.grad, DTensor):
            local(parameter.grad).masked_fill_(~embedding_row_mask(parameter.grad, partly[name]), 0)


def partly_trained_tables(model: nn.Module) -> dict[str, list[int]]:
    """Names of the embedding tables of which only some embedding rows train -> those rows."""
    return {
        f"{name}.weight": module.trained_embedding_rows
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and getattr(module, "trained_embedding_rows", None)
    }


def trainable_summary(model: nn.Module) -> list[dict]:
    """A dictionary for each part of the model: parameters, how many of them train, dtype, device."""
    parts: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    partly = partly_trained_tables(model)
    for name, parameter in model.named_parameters():
        parts[_part(name)].append((name, parameter))
    summary = []
    for part, members in parts.items():
        parameters = [parameter for _, parameter in members]
        total = sum(_count(p) for p in parameters)
        training = sum(
            len(partly[name]) * p.shape[-1] if name in partly else _count(p)
            for name, p in members
            if p.requires_grad
        )
        summary.append(
            {
                "module": part,
                "parameters": total,
                "trainable": training,
                "share": training / max(total, 1),
                "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
                "device": ", ".join(sorted({str(p.device) for p in parameters})),
            }
        )
    return summary


def _count(parameter: nn.Parameter) -> int:
    """Elements of a parameter, also where bitsandbytes packs two of 4 bits in a byte or ZeRO-3 keeps it elsewhere."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return math.prod(packed.shape)
    return getattr(parameter, "ds_numel", parameter.numel())


def print_trainable(summary: list[dict]) -> None:
    """Prints what `trainable_summary` found as a table."""
    table = Table("module", "parameters", "trainable", "share", "dtype", "device", title="What trains")
    total = {key: sum(part[key] for part in summary) for key in ("parameters", "trainable")}
    total |= {"module": "all", "share": total["trainable"] / max(total["parameters"], 1)}
    for row in [*summary, total | {"dtype": "", "device": ""}]:
        cells = row["module"], f"{row['parameters']:,}", f"{row['trainable']:,}", f"{row['share']:.1%}"
        table.add_row(*cells, row["dtype"], row["device"])
    Console().print(table)


def _part(name: str) -> str:
    adapter = " (lora)" if "lora_" in name else ""
    # The embedding table is inside the language model, so the more specific name comes first.
    names = (
        "object_vision_tower",
        "vision_tower",
        "object_multi_modal_projector",
        "multi_modal_projector",
        "prefusion",
    )
    part = next(
        (part for part in (*names, "embed_tokens", "language_model", "lm_head") if part in name), None
    )
    return (part or name.split(".")[0]) + adapter


class TrainableCheck(TrainerCallback):
    """Stops after the first step if a trainable parameter got no gradient or a frozen one moved.

    The first examples of a mixed dataset may have no image. So a part that only images reach is checked after the first
    image, a part for one group kind after the first group of that kind, and everything after `PATIENCE` steps.

    Attributes:
        kinds: group kinds in the batches so far, which the trainer adds to.
    """

    def __init__(self) -> None:
        self.kinds: set[int] = set()
        self._frozen: dict[str, tuple] = {}
        self._waiting: dict[str, nn.Parameter] = {}
        self._reached: set[str] = set()
        self._hooks: list = []
        self._stepped = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Notes the frozen values, and watches for gradients of what trains."""
        self._frozen = dict(_frozen_values(model))
        self._waiting = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # DeepSpeed clears gradients before `on_pre_optimizer_step` is called, so hooks note that they were there.
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._reached.add(name))
            for name, parameter in self._waiting.items()
        ]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raises a `ValueError` for parameters that were asked for and have no gradient."""
        if not self._waiting:
            return
        without = [n for n, p in self._waiting.items() if n not in self._reached and p.grad is None]
        self._waiting = {name: self._waiting[name] for name in without}
        step = state.global_step + 1
        if step < min(PATIENCE, state.max_steps):
            without = [name for name in without if self._was_asked(name)]
        if without:
            when = "the first step" if step == 1 else f"{step} steps"
            raise ValueError(f"Trainable parameters without a gradient after {when}: {', '.join(without)}.")
        if not self._waiting:
            for hook in self._hooks:
                hook.remove()

    def _was_asked(self, name: str) -> bool:
        if "prefusion" in name:
            return bool(self.kinds)
        if not re.search(r"vision_tower|multi_modal_projector", name):
            return True
        return (OBJECT if "object_" in name else BACKGROUND) in self.kinds

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """After the first step: raises a `ValueError` for frozen parameters that moved."""
        if self._stepped:
            return
        self._stepped = True
        now = dict(_frozen_values(model))
        moved = [name for name, value in self._frozen.items() if now.get(name) != value]
        self._frozen = {}
        if moved:
            raise ValueError(f"Frozen parameters moved in the first step: {', '.join(moved)}.")


def _frozen_values(model: nn.Module) -> Iterator[tuple[str, tuple]]:
    """(name, checksums) of every frozen parameter, and of the frozen embedding rows of a table that trains in part.

    Checksums, because a copy of a 7B model would not fit beside it. XOR and sum together miss no change that training
    makes: equal changes of an even number of elements cancel in XOR, opposite changes cancel in the sum.
    """
    partly = partly_trained_tables(model)
    for name, parameter in model.named_parameters():
        value = local(parameter.detach())
        if not value.numel() or value.device.type == "meta":  # ZeRO-3 keeps the values elsewhere
            continue
        if name in partly:
            value = value.masked_fill(embedding_row_mask(parameter, partly[name]), 0)
        elif parameter.requires_grad:
            continue
        yield name, (torch.hash_tensor(value).item(), float(value.sum(dtype=torch.float64)))
