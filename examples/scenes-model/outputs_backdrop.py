"""What the forward passes return: LLaVA's fields, and the positions whose logits are asked for."""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput


@dataclass
class BackdropModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states [sum n_g, D]`: the vision tokens that replaced the placeholders."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class BackdropCausalLMOutputWithPast(ModelOutput):
    """As LLaVA's; `image_hidden_states [sum n_g, D]`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


def kept_positions(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Some positions of `hidden [B, L, D]`, see `BackdropForConditionalGeneration.forward`."""
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden[logits_to_keep]
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    if isinstance(logits_to_keep, int):
        logits_to_keep = slice(-logits_to_keep, None)
    return hidden[:, logits_to_keep, :]
