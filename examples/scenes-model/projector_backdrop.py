"""The projector between tower and language model."""

import torch
from torch import nn
from transformers.activations import ACT2FN


class BackdropProjector(nn.Module):
    """LLaVA's two-layer MLP from tower width to text width (`LlavaMultiModalProjector`), sized by a `BackdropConfig`."""

    def __init__(self, config):
        super().__init__()
        width = config.vision_config.hidden_size * len(config.feature_layers)
        text_width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(width, text_width, bias=config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text_width, text_width, bias=config.multimodal_projector_bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[n, tower width * feature layers]` -> `[n, D]`."""
        return self.linear_2(self.act(self.linear_1(features)))
