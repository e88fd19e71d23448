"""What the forward passes return: LLaVA's fields."""

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
