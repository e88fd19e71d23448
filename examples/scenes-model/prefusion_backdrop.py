"""Prefusion: decoder layers of the language model's own class in front of it.

The idea is LLaVA-Mini's (Zhang et al., "LLaVA-Mini: efficient image and video large multimodal models with one vision
token", 2025).

The layers run over the whole sequence, image and text tokens alike, causally, and start as the identity: their
output projections are zero, so that a model that gains prefusion answers as before until it is trained. Their keys
and values live in the language model's cache, at the layer indices behind its own.

Shapes: `B` batch, `L` new tokens, `D` width.
"""

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask

# The two projections of a decoder layer that write into the residual stream.
OUTPUT_PROJECTIONS = ("o_proj", "down_proj")


class BackdropPrefusion(nn.Module):
    """`num_layers` decoder layers, built from the class of the language model's own.

    Args:
        language_model: the decoder whose layers, rotary embedding and attention implementation are followed.
        num_layers: layers to build.
        rotary: False gives the layers no positions (cosine 1, sine 0).

    Raises:
        ValueError: the language model has no rotary positions, no full attention, or layers without the projections
            that have to start at zero.
    """

    def __init__(self, language_model: nn.Module, num_layers: int, rotary: bool):
        super().__init__()
        config = language_model.config
        layer_class = type(language_model.layers[0])
        if not isinstance(getattr(language_model, "rotary_emb", None), nn.Module):
            raise ValueError(
                f"num_prefusion_layers is {num_layers}, but {type(language_model).__name__} has no rotary_emb module: "
                "prefusion needs a decoder with rotary positions (Llama, Mistral, Qwen2, ...)."
            )
        self.config = config
        self.rotary = rotary
        self.layers = nn.ModuleList()
        full_attention = _full_attention_index(config)
        for i in range(num_layers):
            layer = layer_class(config, full_attention)
            for module in layer.modules():
                if "layer_idx" in vars(module):
                    module.layer_idx = config.num_hidden_layers + i
            self.layers.append(layer)
        missing = [name for name in OUTPUT_PROJECTIONS if not self._projections(name)]
        if missing and num_layers:
            raise ValueError(
                f"{layer_class.__name__} has no linear map called {missing}; without it prefusion cannot start as the identity."
            )
        for name in OUTPUT_PROJECTIONS:
            for projection in self._projections(name):
                projection.starts_at_zero = True  # read by BackdropPreTrainedModel._init_weights

    def _projections(self, name: str) -> list[nn.Linear]:
        return [m for n, m in self.named_modules() if n.endswith("." + name) and isinstance(m, nn.Linear)]

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        rotary_emb: nn.Module,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """`inputs_embeds [B, L, D]` -> `[B, L, D]`, on top of what `past_key_values` holds.

        Args:
            rotary_emb: the language model's.
            attention_mask: as the language model takes it.
            position_ids: `[B, L]` or `[1, L]`.
            past_key_values: the language model's cache; it gains layers where it lacks them.

        Raises:
            ValueError: the cache cannot gain layers, see `grow_cache`.
        """
        if past_key_values is not None:
            grow_cache(past_key_values, self.config.num_hidden_layers + len(self.layers))
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask["full_attention"]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        cos, sin = rotary_emb(inputs_embeds, position_ids=position_ids)
        if not self.rotary:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                position_embeddings=(cos, sin),
                **kwargs,
            )
        return hidden


def grow_cache(cache: Cache, num_layers: int) -> None:
    """Appends empty layers of the cache's own class until it has `num_layers`.

    A cache that was built from a configuration has a fixed number of layers; one built without adds them by itself.

    Raises:
        ValueError: the cache has neither dynamic nor static layers of full attention.
    """
    if cache.layer_class_to_replicate is not None:
        return
    while len(cache.layers) < num_layers:
        classes = {type(layer) for layer in cache.layers}
        if DynamicLayer in classes:
            cache.layers.append(DynamicLayer())
        elif StaticLayer in classes:
            full = next(layer for layer in cache.layers if type(layer) is StaticLayer)
            cache.layers.append(StaticLayer(max_cache_len=full.max_cache_len))
        else:
            raise ValueError(
                f"Prefusion keeps keys and values in the language model's cache, and {type(cache).__name__} of "
                f"{sorted(cls.__name__ for cls in classes)} cannot grow; wanted full-attention DynamicCache or StaticCache."
            )


def _full_attention_index(config: PreTrainedConfig) -> int:
    """A layer index of the language model whose attention is full (some models alternate with sliding windows)."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return 0
    if "full_attention" not in layer_types:
        raise ValueError(
            f"Prefusion layers attend to everything, but {config.model_type!r} has layer types {set(layer_types)}."
        )
    return layer_types.index("full_attention")
