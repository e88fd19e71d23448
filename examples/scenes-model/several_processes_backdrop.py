"""Keeps processes that run the model together in step: each of them runs every part, whatever its own examples need.

Where gradients are reduced or parameters gathered over processes, all of them must reach the same modules in the same order. One
process may have rows of text alone, or images in which nothing was detected: without its part of a collective operation the
others would wait for it for ever.
"""

import torch
from torch import distributed

from .configuration_backdrop import BACKGROUND, OBJECT


def runs_every_part(model) -> bool:
    """Whether this pass must reach the modules of both group kinds: other processes train, or hold shards, with this one.

    Args:
        model: the `BackdropModel`.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    if model.training and torch.is_grad_enabled():
        return True
    # FSDP2 gathers a module's parameters in evaluation too; it gives the modules that it shards this method.
    return any(hasattr(module, "unshard") for module in model.vision_tower.modules())


def with_every_kind(
    model,
    inputs_embeds: torch.Tensor,
    pixel_values: torch.Tensor | None,
    patch_mask: torch.Tensor | None,
    group_kind: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Groups with a blank group of one patch behind them for each kind that has modules of its own and no group here.

    Args:
        model: the `BackdropModel`.
        inputs_embeds: `[B, L, D]`; its dtype and device are those of blank pixels where there are no others.
        pixel_values, patch_mask, group_kind: see `BackdropModel.get_image_features`; all None: no group at all.

    Returns:
        `pixel_values [G + n, 3, S, S]`, `patch_mask [G + n, P]`, `group_kind [G + n]`, and n, the number of blank groups.
    """
    config = model.config
    side, patches = config.vision_config.image_size, config.num_patches
    if pixel_values is None:
        pixel_values = inputs_embeds.new_zeros(0, 3, side, side)
    groups = pixel_values.shape[0]
    if patch_mask is None:
        patch_mask = torch.ones(groups, patches, dtype=torch.bool)
    if group_kind is None:
        group_kind = torch.full((groups,), BACKGROUND)
    apart = config.separate_vision_towers or config.separate_projectors
    present = set(group_kind.tolist()) if apart else {BACKGROUND} if groups else set()
    missing = sorted(({BACKGROUND, OBJECT} if apart else {BACKGROUND}) - present)
    if missing:
        pixel_values = torch.cat([pixel_values, pixel_values.new_zeros(len(missing), 3, side, side)])
        # A patch of the last group's: groups that overlap are not put into one order (`in_raster_order`).
        owned = torch.zeros(len(missing), patches, dtype=patch_mask.dtype, device=patch_mask.device)
        owned[:, int(patch_mask[-1].int().argmax()) if groups else 0] = 1
        patch_mask = torch.cat([patch_mask, owned])
        group_kind = torch.cat([group_kind, group_kind.new_tensor(missing)])
    return pixel_values, patch_mask, group_kind, len(missing)


def without_blanks(
    inputs_embeds: torch.Tensor, features: list[torch.Tensor], blanks: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`inputs_embeds` with the last `blanks` groups in their graph, and the vision tokens of the others; None: no others.

    The values stay what they are, and the gradients of the blank groups are zeros.

    Args:
        inputs_embeds: `[B, L, D]`.
        features: `G` tensors `[n_g, D]`.
    """
    kept = len(features) - blanks
    for blank in features[kept:]:
        inputs_embeds = inputs_embeds + 0 * blank.sum().to(inputs_embeds)
    return inputs_embeds, torch.cat(features[:kept]) if kept else None
