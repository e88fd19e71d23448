"""peft's adapters for single rows: `generate(adapter_names=[...])`, where each row of a batch names its adapter.

peft installs a forward pre-hook on each of its layers for the duration of a call; the hook hands the names of all rows to
the layer. A pass over a single row, or over the groups of some rows, needs the names of these: inside `one_adapter` every
layer uses one adapter for whatever it is given.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .configuration_backdrop import BACKGROUND, OBJECT
from .prompt_layout_backdrop import rows_of_groups

_HOOK_NAME = "_adapter_names_pre_forward_hook"


def is_adapter_hook(hook: Callable) -> bool:
    """Whether a forward pre-hook is peft's that hands out the names of the rows' adapters."""
    function = hook.func if isinstance(hook, functools.partial) else None
    if getattr(function, "__name__", None) != _HOOK_NAME:
        return False
    return getattr(function, "__globals__", {}).get("__name__", "").startswith("peft.")


def row_adapters(*modules: nn.Module) -> list[str] | None:
    """The adapter of each row as the present call names them; None: it names none, or none concerns these modules."""
    if "peft" not in sys.modules:
        return None
    for module in modules:
        for part in module.modules():
            for hook in part._forward_pre_hooks.values():
                if is_adapter_hook(hook):
                    return list(hook.keywords["adapter_names"])
    return None


def vision_modules(model) -> list[nn.Module]:
    """Towers and projectors of a `BackdropModel`, of both kinds of groups."""
    return [module for kind in (BACKGROUND, OBJECT) for module in model.vision_modules(kind)]


def prefix_modules(model) -> list[nn.Module]:
    """What makes the keys and values of a `BackdropModel`: its language model, and prefusion where it has any."""
    return [model.language_model, *([model.prefusion] if model.config.num_prefusion_layers else [])]


def group_adapters(
    model,
    input_ids: torch.Tensor,
    tokens_per_group: list[int],
    cached: int = 0,
    group_index: torch.Tensor | None = None,
) -> list[str] | None:
    """The adapter of each group's row, None where the call names none for the vision modules.

    Args:
        model: the `BackdropModel`.
        input_ids: `[B, L]`.
        tokens_per_group: of the `G` groups.
        cached: positions of each row that are cached.
        group_index: `[G']`, which group each of the expanded rows' groups is; None: rows were not expanded.

    Raises:
        ValueError: the names are not one for each row, or the groups do not fit the placeholders.
    """
    names = row_adapters(*vision_modules(model))
    if names is None:
        return None
    if len(names) != input_ids.shape[0]:
        raise ValueError(
            f"adapter_names has {len(names)} names for {input_ids.shape[0]} rows; wanted one each."
        )
    groups = len(tokens_per_group)
    order = list(range(groups)) if group_index is None else group_index.tolist()
    lengths = [tokens_per_group[g] for g in order]
    rows, _ = rows_of_groups(input_ids, model.config.image_token_id, lengths, cached)
    of_group = {order[k]: name for name, row in zip(names, rows, strict=True) for k in row}
    return [of_group[g] for g in range(groups)]


@contextlib.contextmanager
def one_adapter(name: str | None, *modules: nn.Module) -> Iterator[None]:
    """Inside, every layer below `modules` uses the adapter `name` for all it is given; None: nothing is changed."""

    def use_adapter(layer, args, kwargs):
        given = args[0] if args else next(iter(kwargs.values()))
        return args, {**kwargs, "adapter_names": [name] * len(given)}

    replaced = []
    for part in (part for module in modules if name is not None for part in module.modules()):
        for key, hook in part._forward_pre_hooks.items():
            if is_adapter_hook(hook):
                replaced.append((part._forward_pre_hooks, key, hook))
    for hooks, key, _ in replaced:
        hooks[key] = use_adapter
    try:
        yield
    finally:
        for hooks, key, hook in replaced:
            if key in hooks:
                hooks[key] = hook


@contextlib.contextmanager
def adapter_hooks_removed_on_error(model: nn.Module) -> Iterator[None]:
    """Takes peft's hooks for this call off when it raises: peft itself does so only when it returns."""
    try:
        yield
    except BaseException:
        for part in model.modules():
            for key, hook in list(part._forward_pre_hooks.items()):
                if is_adapter_hook(hook):
                    del part._forward_pre_hooks[key]
                    part._forward_pre_hooks_with_kwargs.pop(key, None)
        raise
