"""One training step of `SFTTrainer`, on tensors without data."""

import copy
from collections.abc import Sequence

import torch
import trl.trainer.utils
from torch import nn
from torch.utils._pytree import tree_leaves
from trl import SFTConfig

from backdrop.hub_export.checkpoint import tower_config
from backdrop.modeling.configuration_backdrop import BACKGROUND, OBJECT, BackdropConfig

from ..adapters import give_head_a_bias
from .kernels import is_half
from .ledger import Ledger
from .optimizers import BlockwiseAdamW, build_optimizer


def run_step(
    model: nn.Module,
    training: SFTConfig,
    ledger: Ledger,
    gpu: bool,
    masters: bool,
    length: int,
    groups: Sequence[tuple[int, int]],
) -> int:
    """Runs one step as `SFTTrainer` does from the second step on; returns the bytes of paged optimizer states.

    Args:
        masters: half-precision weights have float32 copies that the optimizer steps (ZeRO).
        length: `sequence_length` of `estimate`.
        groups: (patches, kind) of each group of every example.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # The optimizer runs first, because its states exist from the second step on, the first step with the full peak.
    ledger.phase = "optimizer step"
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    ledger.assign("gradients", [parameter.grad for parameter in trained])
    if training.max_grad_norm:
        nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
    stepped = trained
    if masters:
        stepped = [nn.Parameter(torch.empty(p.shape)) if is_half(p) else p for p in trained]
        for own, parameter in zip(stepped, trained, strict=True):
            own.grad = torch.empty(own.shape) if own is not parameter else own.grad
    optimizer = build_optimizer(stepped, training, gpu)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in tree_leaves(state)]
    copies = [own for own, parameter in zip(stepped, trained, strict=True) if own is not parameter]
    ledger.assign("optimizer", [*copies, *(value for value in states if isinstance(value, torch.Tensor))])
    ledger.peaks.clear()
    optimizer.step()  # with the states in place
    for own in copies:
        own.grad = None
    if training.gradient_accumulation_steps == 1:
        for parameter in trained:
            parameter.grad = None
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.assign("gradients", [p.grad]))

    ledger.phase = "forward"
    batch = full_batch(model.config, training, length, groups)
    amp = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    saving = torch.autograd.graph.saved_tensors_hooks(ledger.save, lambda tensor: tensor)
    with saving, torch.autocast("cpu", dtype=amp, enabled=amp is not None):
        outputs = model(**batch, fused_lm_head=True, use_cache=False)
    loss = -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)
    del outputs
    ledger.end_forward()
    ledger.phase = "backward"
    loss.backward()
    return optimizer.host if isinstance(optimizer, BlockwiseAdamW) else 0


def without_data(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers hold no data; tied ones stay tied. To be called under a `Ledger`."""
    with torch.utils._python_dispatch._disable_current_modes():
        model = copy.deepcopy(model)
    made: dict[
        int, tuple[torch.Tensor, nn.Parameter]
    ] = {}  # the kept original keeps its id from being reused
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                if id(value) not in made:
                    empty = torch.empty(value.shape, dtype=value.dtype)  # a fake, under the ledger
                    made[id(value)] = value, nn.Parameter(empty, requires_grad=value.requires_grad)
                module._parameters[name] = made[id(value)][1]
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = torch.zeros(value.shape, dtype=value.dtype)
    return model


def prepare_for_training(model: nn.Module, training: SFTConfig) -> None:
    """Does to the model what `BackdropTrainer.__init__` and `Trainer.train` do to it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.trained_on_groups = True
    give_head_a_bias(base)
    trl.trainer.utils.add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    on, settings = recomputation(training)
    if on:
        every = settings.pop("every_n_layers", 1)
        unknown = sorted(set(settings) - {"use_reentrant"})
        if unknown:
            raise ValueError(
                f"activation_checkpointing_kwargs has {unknown}; the estimate knows every_n_layers, use_reentrant."
            )
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=settings or None, every_n_layers=every
            )
        elif every != 1:
            raise ValueError(
                f"every_n_layers is {every}, which this version of transformers does not know; wanted 1."
            )
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings or None)
        if base is not model:
            model.enable_input_require_grads()


def recomputation(training: SFTConfig) -> tuple[bool, dict]:
    """Whether layers are computed again in the backward pass, and its settings.

    transformers calls it activation checkpointing; older versions, 5.17 among them, gradient checkpointing.
    """
    name = "activation_checkpointing"
    if not hasattr(training, name):
        name = "gradient_checkpointing"
    return bool(getattr(training, name)), dict(getattr(training, f"{name}_kwargs") or {})


def split_evenly(config: BackdropConfig, images: int, groups: int) -> list[tuple[int, int]]:
    """(patches, kind) of each group of so many images, each split into so many groups, the first of them background.

    The groups are of unequal size, so that the tower packs them into shared sequences under a mask, as in training.
    """
    patches = config.num_patches
    owner = torch.arange(patches) * groups // patches
    owner[: patches // (4 * groups)] = groups - 1
    sizes = torch.bincount(owner, minlength=groups).tolist()
    return [(size, BACKGROUND if g == 0 else OBJECT) for g, size in enumerate(sizes)] * images


def full_batch(
    config: BackdropConfig, training: SFTConfig, length: int, groups: Sequence[tuple[int, int]]
) -> dict:
    """A batch of examples of the same length; all but the first have one position of padding, which changes the
    attention kernel.

    Args:
        groups: (patches, kind) of each group of every example.

    Returns:
        input_ids, attention_mask, labels `[B, L]`, pixel_values `[G, 3, S, S]`, patch_mask `[G, P]`, group_kind `[G]`.
    """
    rows, side = training.per_device_train_batch_size, tower_config(config).image_size
    image_tokens = sum(size + config.extra_tokens_per_group for size, _ in groups)
    if length <= image_tokens:
        raise ValueError(
            f"sequence_length is {length}; wanted more than the {image_tokens} tokens of {len(groups)} patch group(s)."
        )
    text = int(config.image_token_id == 0)
    ids = torch.full((rows, length), text)
    ids[:, 1 : 1 + image_tokens] = config.image_token_id
    attention_mask = torch.ones_like(ids)
    attention_mask[1:, -1] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    if training.assistant_only_loss:
        labels = labels.masked_fill(ids == config.image_token_id, -100)
    batch = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
    if groups:
        sizes, kinds = torch.tensor(groups).T
        batch["pixel_values"] = torch.zeros(rows * len(groups), 3, side, side)
        batch["patch_mask"] = (torch.arange(config.num_patches) < sizes[:, None]).repeat(rows, 1)
        batch["group_kind"] = kinds.repeat(rows)
    return batch
