"""The images of a prompt in a prefill: what of them is cached already, and which vision tokens are left to feed."""

from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache

from .adapter_rows_backdrop import prefix_modules, row_adapters
from .background_prefix_backdrop import background_prefix
from .cache_keys_backdrop import in_namespace, prefix_run_key
from .configuration_backdrop import VisionFeatures
from .group_features_backdrop import EncodedGroups, group_features
from .prefix_pass_backdrop import load_background_prefix
from .prefix_rules_backdrop import may_load_prefix
from .prompt_layout_backdrop import PromptBatch, prompt_rows, rows_of_groups, unseen_tokens


@dataclass(frozen=True)
class PrefillPlan:
    """What Python needs to know of a prompt, read before the images are encoded: afterwards a read waits for the device.

    Attributes:
        prompt: on the CPU.
        run_key: how the keys and values of a prefix are made, see `prefix_run_key`; None: no prefix may be loaded.
        cached: positions that the cache of this generation holds.
    """

    prompt: PromptBatch
    run_key: bytes | None
    cached: int = 0


def plan_prefill(
    model,
    prompt: PromptBatch,
    past_key_values: Cache | None,
    cached: int = 0,
    refusal: str | None = None,
) -> PrefillPlan:
    """The plan for a prompt of `L` positions.

    Args:
        model: the `BackdropModel`.
        past_key_values: the cache of this generation.
        cached: positions that it holds.
        refusal: why no prefix may be loaded, where the caller knows a reason.
    """
    prompt = prompt.on_host()
    may_load = not cached and may_load_prefix(model, prompt, past_key_values, refusal)
    return PrefillPlan(prompt, prefix_run_key(model) if may_load else None, cached)


def prefill_images(
    model, plan: PrefillPlan, encoded: EncodedGroups, past_key_values: Cache | None
) -> tuple[int, torch.Tensor | None]:
    """Loads the prefix of a batch where that may be, and leaves out the vision tokens that are cached then.

    Args:
        model: the `BackdropModel`.
        plan: see `plan_prefill`.
        encoded: the groups of all rows, in order; where some positions are cached, all of them or those not cached yet.
        past_key_values: the cache of this generation, filled where it is empty and a prefix is known.

    Returns:
        How many positions it holds afterwards, and the vision tokens `[n, D]` of the placeholders from there on, None if
        there are none.

    Raises:
        ValueError: the placeholders of a row are not a whole number of groups.
    """
    prompt, cached = plan.prompt, plan.cached
    is_image = prompt.input_ids == model.config.image_token_id
    rows, first = rows_of_groups(prompt.input_ids, model.config.image_token_id, encoded.lengths, cached)
    if plan.run_key is not None and encoded.are_keyed:
        cached = _load_prefix(model, prompt, plan.run_key, rows, encoded, past_key_values)
    return cached, unseen_tokens(encoded.features, rows, is_image[:, first:cached])


def prefill_inputs(
    model,
    prompt: PromptBatch,
    pixel_values: torch.Tensor | None,
    patch_mask: torch.Tensor | None,
    group_kind: torch.Tensor | None,
    vision_features: VisionFeatures,
) -> dict:
    """Inputs of `forward` for a whole prompt; see `BackdropGenerationMixin.prepare_prefill`."""
    input_ids, attention_mask, position_ids = prompt.input_ids, prompt.attention_mask, prompt.position_ids
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if position_ids is None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    position_ids = position_ids.expand(input_ids.shape[0], -1)
    past_key_values, image_embeds, cached = DynamicCache(config=model.config.text_config), None, 0
    if pixel_values is not None:
        plan = plan_prefill(model, PromptBatch(input_ids, attention_mask, position_ids), past_key_values)
        encoded = group_features(model, pixel_values, patch_mask, group_kind, vision_features)
        cached, image_embeds = prefill_images(model, plan, encoded, past_key_values)
    return {
        "input_ids": input_ids[:, cached:],
        "attention_mask": attention_mask,
        "position_ids": position_ids[:, cached:],
        "image_embeds": image_embeds,
        "past_key_values": past_key_values,
        "use_cache": True,
    }


def _load_prefix(
    model,
    prompt: PromptBatch,
    run_key: bytes,
    rows: list[tuple[int, ...]],
    encoded: EncodedGroups,
    past_key_values: Cache | None,
) -> int:
    """Fills an empty cache with what is known of the leading backgrounds; how many positions of each row."""
    config, input_ids, position_ids = model.config, prompt.input_ids, prompt.position_ids
    separators = config.separator_token_ids
    layout = prompt_rows(
        prompt,
        rows,
        encoded.kinds,
        encoded.lengths,
        config.image_token_id,
        None if separators is None else separators[1],
    )
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1]).unsqueeze(0)
    position_ids = position_ids.expand(input_ids.shape[0], -1)
    adapters = row_adapters(*prefix_modules(model))
    if adapters is not None and len(adapters) != len(rows):
        return 0  # peft will say so
    prefix = background_prefix(
        PromptBatch(input_ids, prompt.attention_mask, position_ids),
        layout,
        encoded,
        config.image_token_id,
        [
            in_namespace(model, run_key, adapter)
            for adapter in (adapters if adapters is not None else [None] * len(rows))
        ],
        adapters,
    )
    if prefix is None:
        return 0
    load_background_prefix(model, prefix, past_key_values, run_key)
    return prefix.length
