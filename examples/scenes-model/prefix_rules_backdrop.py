"""Where a stored prefix may be used. What is refused here is computed in one pass, as without a cache."""

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


def keeps_prefixes(text_config: PreTrainedConfig) -> bool:
    """Whether a language model has prefixes to reuse at all.

    Only full attention keeps every position: neither a sliding window nor a recurrent state holds a whole prefix.
    """
    layers = DynamicCache(config=text_config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def may_load_prefix(
    model,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> bool:
    """Whether this call may begin with stored keys and values.

    Args:
        model: the `BackdropModel`.
        attention_mask, position_ids: as `forward` takes them; a prefix needs masks `[B, L]` and positions `[B, L]`.
        past_key_values: the cache of this generation, which must exist and be empty.
    """
    cache = model.cache_in_use
    return (
        cache is not None
        and cache.prefixes
        and not model.config.raster_order
        and isinstance(past_key_values, Cache)
        and past_key_values.get_seq_length() == 0
        and (attention_mask is None or attention_mask.ndim == 2)
        and (position_ids is None or position_ids.ndim == 2)
    )
