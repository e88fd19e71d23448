"""Where a stored prefix may be used. What is refused here is computed in one pass, as without a cache.

A prefix is computed apart from the prompt that it leads, and put into the cache of another generation. That gives the
keys and values of the whole prompt only where nothing behind a prefix reaches back into it, and where attention reads
what was written. `may_load_prefix` is the one place that decides, and every refusal has a reason that is said once.
"""

import copy
import sys

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.utils import logging

from .prompt_layout_backdrop import PromptBatch

logger = logging.get_logger(__name__)

# Adapters that mix their experts by the mean over all tokens of a pass, so that no position stands for itself: peft's Lily.
MIXING_ADAPTERS = ("peft.tuners.lily",)
# Rotary types of transformers whose frequencies are fixed once and for all. Any other is tried out.
FIXED_ROTARY_TYPES = {"default", "linear", "yarn", "llama3", "proportional"}


def keeps_prefixes(text_config: PreTrainedConfig) -> bool:
    """Whether a language model has prefixes to reuse at all.

    Only full attention keeps every position: neither a sliding window nor a recurrent state holds a whole prefix.
    """
    layers = DynamicCache(config=text_config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def may_load_prefix(
    model, prompt: PromptBatch, past_key_values: Cache | None, refusal: str | None = None
) -> bool:
    """Whether this call may begin with stored keys and values. Where it asks for them and may not, the log says why.

    Args:
        model: the `BackdropModel`.
        prompt: on the CPU; a prefix needs masks `[B, L]` and positions `[B, L]`.
        past_key_values: the cache of this generation, which must exist and be empty.
        refusal: why not, where the caller knows a reason, see `generation_refusal`.
    """
    cache = model.cache_in_use
    if cache is None or not cache.prefixes or not isinstance(past_key_values, Cache):
        return False
    if past_key_values.get_seq_length():  # a conversation that goes on
        return False
    refusal = refusal or _prompt_refusal(model, prompt) or _cache_refusal(model, prompt, past_key_values)
    if refusal is not None:
        logger.warning_once(
            f"The background cache keeps no prefix for this call: {refusal}. Vision tokens are still reused."
        )
    return refusal is None


def generation_refusal(head: nn.Module, options: dict) -> str | None:
    """Why a call of `generate` cannot begin with a prefix, whatever its prompt; None: it can.

    Args:
        head: the model whose `prepare_inputs_for_generation` runs.
        options: `output_hidden_states`, `output_attentions` and `inputs_embeds` of the call, among others.
    """
    if options.get("inputs_embeds") is not None:
        return "the prompt is given as embeddings, and the key of a prefix is over token ids"
    if any(options.get(name) for name in ("output_hidden_states", "output_attentions")):
        return "states of all positions are asked for, and those of a prefix are not computed"
    replaced = vars(head).get("prepare_inputs_for_generation")
    if getattr(replaced, "__func__", None) not in (None, type(head).prepare_inputs_for_generation):
        # peft's prompt tuning, P-tuning and prefix tuning put virtual tokens in front.
        return "prepare_inputs_for_generation is wrapped, and the wrapper may put tokens in front"
    return None


def _prompt_refusal(model, prompt: PromptBatch) -> str | None:
    """Why a prompt has no prefix that another prompt could share; None: it may have one."""
    attention_mask, position_ids = prompt.attention_mask, prompt.position_ids
    if model.config.raster_order:
        return "raster_order mixes objects into their background"
    for name, form in (("attention mask", attention_mask), ("position ids", position_ids)):
        if form is not None and getattr(form, "ndim", None) != 2:
            return f"the {name} has another form than [batch, length]"
    attentions = (part for layer in model.language_model.layers for part in layer.children())
    if not all(getattr(part, "is_causal", True) for part in attentions):
        return "the language model attends to later positions (is_causal is False)"
    if "peft" in sys.modules and any(
        type(part).__module__.startswith(MIXING_ADAPTERS) for part in model.language_model.modules()
    ):
        return "an adapter's weights depend on all tokens of a pass"
    last = prompt.input_ids.shape[1] - 1 if position_ids is None else int(position_ids.max())
    rotary = getattr(model.language_model, "rotary_emb", None)
    if rotary is not None and _depends_on_length(rotary, last):
        return "the language model's rotary frequencies change with the length of the prompt"
    return None


def _depends_on_length(rotary: nn.Module, last: int) -> bool:
    """Whether a short pass and one up to position `last` may rotate by different angles.

    Dynamic NTK scaling and LongRoPE take other frequencies once a pass is longer than the model's original length.
    """
    kinds = getattr(rotary, "rope_type", None)
    if (set(kinds.values()) if isinstance(kinds, dict) else {kinds}) <= FIXED_ROTARY_TYPES:
        return False
    # Some rotary modules keep the frequencies of their last pass: a copy is asked, with buffers of its own.
    trial = copy.copy(rotary)
    with torch.inference_mode(False), torch.no_grad():  # there tensors count how often they are written
        trial._buffers = {name: None if b is None else b.clone() for name, b in rotary._buffers.items()}
        buffers = {name: b for name, b in trial._buffers.items() if b is not None}
        device = next((b.device for b in buffers.values()), torch.device("cpu"))
        like, angles = torch.zeros(1, 1, 1, device=device), []
        try:
            for positions in ([1], [1, last]):
                found = type(rotary).forward(trial, like, torch.tensor([positions], device=device))
                angles.append(torch.cat([part[:, :1] for part in found], dim=-1))
            # Frequencies that every pass writes anew are other weights for each call: no prefix is found again.
            return any(b._version for b in buffers.values()) or not torch.equal(*angles)
        except (TypeError, KeyError, AttributeError, RuntimeError):  # it wants to be called in another way
            return True


def _cache_refusal(model, prompt: PromptBatch, cache: Cache) -> str | None:
    """Why attention would not read a prefix from this empty cache as it was computed; None: it would."""
    if type(cache) in (DynamicCache, StaticCache) and all(
        type(layer) in (DynamicLayer, StaticLayer) for layer in cache.layers
    ):
        return None
    kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers})) or "no layers"
    name = f"{type(cache).__name__} ({kinds})"
    try:
        exact = _hands_back(copy.deepcopy(cache), model, prompt.input_ids.shape[1])
    except Exception as error:  # a foreign class may refuse a trial in any way
        return f"{name} could not be tried out ({type(error).__name__}: {error})"
    return None if exact else f"{name} does not hand back what was written to it"


def _hands_back(trial: Cache, model, length: int) -> bool:
    """Whether every layer of an empty cache, which is written to, returns two pieces of `length` positions as given."""
    weight = model.get_input_embeddings().weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    generator = torch.Generator().manual_seed(0)  # a trial must not move the caller's
    config = model.config.text_config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    whole = torch.randn(2, 1, heads, length, width, generator=generator).to(device, weight.dtype)
    split = max(1, length // 2)
    for i in range(len(trial.layers) or 1):
        trial.update(*whole[:, :, :, :split], i)
        found = trial.update(*whole[:, :, :, split:], i) if split < length else whole
        if any(
            part.dtype != whole.dtype or not torch.equal(part[:, :, :length], given)
            for part, given in zip(found, whole, strict=True)
        ):
            return False
    return True
