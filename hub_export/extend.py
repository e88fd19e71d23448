"""Parts added to a finished model, and parts folded into others; what the model computes stays the same."""

import copy

import torch
from torch import nn

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.modeling.prefusion_backdrop import BackdropPrefusion


@torch.no_grad()
def extend_model(
    model: BackdropForConditionalGeneration,
    *,
    num_prefusion_layers: int = 0,
    prefusion_rotary: bool = True,
    separate_vision_towers: bool = False,
    separate_projectors: bool = False,
) -> None:
    """Gives a model the parts it does not have yet; what it computes stays the same until they are trained.

    Prefusion layers start as the identity, a tower or projector for objects as a copy of the background's.
    """
    config, base = model.config, model.model
    if num_prefusion_layers and not config.num_prefusion_layers:
        with torch.device(base.language_model.device):
            prefusion = BackdropPrefusion(base.language_model, num_prefusion_layers, prefusion_rotary)
        for module in prefusion.modules():
            model._init_weights(module)
        base.prefusion = prefusion.to(base.language_model.dtype)
        config.num_prefusion_layers, config.prefusion_rotary = num_prefusion_layers, prefusion_rotary
    elif num_prefusion_layers != config.num_prefusion_layers and num_prefusion_layers:
        raise ValueError(
            f"num_prefusion_layers is {num_prefusion_layers}, but the model has {config.num_prefusion_layers} already."
        )
    if separate_vision_towers and not config.separate_vision_towers:
        base.object_vision_tower = copy.deepcopy(base.vision_tower)
        config.separate_vision_towers = True
    if separate_projectors and not config.separate_projectors:
        base.object_multi_modal_projector = copy.deepcopy(base.multi_modal_projector)
        config.separate_projectors = True


def fold_prefusion(model: BackdropForConditionalGeneration) -> None:
    """Makes the prefusion layers the first layers of the language model.

    Prefusion runs over the whole sequence, causally, in front of the language model: as its first layers it computes the
    same, and serving engines, which know nothing of it, see a plain decoder. There is no way back.

    Raises:
        ValueError: prefusion without positions, which decoder layers always have.
    """
    config, base = model.config, model.model
    if not config.num_prefusion_layers:
        return
    if not config.prefusion_rotary:
        raise ValueError(
            "prefusion_rotary is False: these prefusion layers see no positions and cannot become layers of the language "
            "model, which do."
        )
    added = config.num_prefusion_layers
    layers = nn.ModuleList([*base.prefusion.layers, *base.language_model.layers])
    for i, layer in enumerate(layers):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = i
    base.language_model.layers = layers
    del base.prefusion
    # The language model holds the same configuration or a copy of it.
    for text_config in {id(c): c for c in (config.text_config, base.language_model.config)}.values():
        if getattr(text_config, "layer_types", None) is not None:
            text_config.layer_types = ["full_attention"] * added + list(text_config.layer_types)
        text_config.num_hidden_layers = len(layers)
    config.num_prefusion_layers = 0
