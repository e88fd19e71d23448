"""What trains, in the open: selection by name, a table before the first step, a check after it."""

import re
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import TrainerCallback

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration


def unused_parameters(model: BackdropForConditionalGeneration) -> set[str]:
    """Names of tower parameters behind the feature layer: nothing reads them, so they can get no gradient."""
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


def select_trainable(model: BackdropForConditionalGeneration, patterns: list[str]) -> None:
    """Freezes everything but the parameters in whose names one of the regular expressions is found.

    Raises:
        ValueError: a pattern that matches no parameter (named), or none given.
    """
    names = [name for name, _ in model.named_parameters()]
    idle = [pattern for pattern in patterns if not any(re.search(pattern, name) for name in names)]
    if idle or not patterns:
        raise ValueError(
            f"trainable: {idle or 'no pattern'} matches no parameter; wanted regular expressions over names such as {names[0]!r}."
        )
    unused = unused_parameters(model)
    for name, parameter in model.named_parameters():
        chosen = any(re.search(pattern, name) for pattern in patterns)
        parameter.requires_grad_(chosen and name not in unused)


def trainable_rows(model: nn.Module) -> list[dict]:
    """One row per part of the model: parameters, how many train, dtype, device."""
    parts: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        parts[_part(name)].append((name, parameter))
    rows = []
    for part, members in parts.items():
        parameters = [parameter for _, parameter in members]
        total = sum(p.numel() for p in parameters)
        training = sum(p.numel() for p in parameters if p.requires_grad)
        rows.append(
            {
                "module": part,
                "parameters": total,
                "trainable": training,
                "share": training / max(total, 1),
                "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
                "device": ", ".join(sorted({str(p.device) for p in parameters})),
            }
        )
    return rows


def print_trainable(rows: list[dict]) -> None:
    """The table on the console."""
    table = Table("module", "parameters", "trainable", "share", "dtype", "device", title="What trains")
    for row in rows:
        cells = row["module"], f"{row['parameters']:,}", f"{row['trainable']:,}", f"{row['share']:.1%}"
        table.add_row(*cells, row["dtype"], row["device"])
    Console().print(table)


def _part(name: str) -> str:
    adapter = " (lora)" if "lora_" in name else ""
    found = re.search(
        r"(object_vision_tower|vision_tower|object_multi_modal_projector|multi_modal_projector|prefusion|"
        r"embed_tokens|language_model|lm_head)",
        name,
    )
    return (found.group(1) if found else name.split(".")[0]) + adapter


class TrainableCheck(TrainerCallback):
    """Stops after the first step if a trainable parameter got no gradient or a frozen one moved."""

    def __init__(self):
        self._frozen: dict[str, torch.Tensor] = {}
        self._checked = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._frozen = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad
        }

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self._checked:
            return
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            raise ValueError(
                f"Trainable parameters without a gradient after the first step: {', '.join(without)}."
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self._checked:
            return
        self._checked = True
        moved = [
            name
            for name, p in model.named_parameters()
            if name in self._frozen and not torch.equal(p, self._frozen[name])
        ]
        self._frozen = {}
        if moved:
            raise ValueError(f"Frozen parameters moved in the first step: {', '.join(moved)}.")
