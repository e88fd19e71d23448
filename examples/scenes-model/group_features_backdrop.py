"""The vision tokens of patch groups: checked, encoded by kind, put in order, and taken from the background cache.

Shapes: `G` groups, `P` patches, `S` image side, `n_g` tokens of group g, `D` text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from transformers.utils import logging

from .adapter_rows_backdrop import one_adapter, row_adapters, vision_modules
from .background_cache_backdrop import BackgroundCache
from .cache_keys_backdrop import content_keys, in_namespace, tokens_run_key
from .cache_tiers_backdrop import synchronized_clock
from .configuration_backdrop import BACKGROUND, OBJECT, BackdropConfig, VisionFeatures
from .grouped_vision_backdrop import encode_groups
from .host_copies_backdrop import host_copies, to_device

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class PatchGroups:
    """Groups that were checked, and what is wanted of them.

    `pixel_values [G, 3, S, S]`; on the CPU `patch_mask [G, P]` bool, None where every group owns every patch; the kind of
    each; P; the tower's states to take.
    """

    pixel_values: torch.Tensor
    patch_mask: torch.Tensor | None
    kinds: tuple[int, ...]
    num_patches: int
    vision_features: VisionFeatures

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def lengths(self) -> list[int]:
        """n_g: tokens of each group."""
        if self.patch_mask is None:  # no tensor is read, so that the encoding of whole images can be compiled
            return [self.num_patches + self.vision_features.extra_tokens] * len(self)
        return (self.patch_mask.sum(-1) + self.vision_features.extra_tokens).tolist()

    @property
    def masks(self) -> torch.Tensor:
        """`patch_mask`, written out."""
        if self.patch_mask is not None:
            return self.patch_mask
        return torch.ones(len(self), self.num_patches, dtype=torch.bool)

    def select(self, indices: Sequence[int]) -> "PatchGroups":
        """Some of the groups, in the order of `indices`."""
        first, index = indices[0], torch.tensor(indices)
        if list(indices) == list(range(first, first + len(indices))):
            pixel_values = self.pixel_values[first : first + len(indices)]  # a view, not a copy
        else:
            pixel_values = self.pixel_values[to_device(index, self.pixel_values.device)]
        patch_mask = None if self.patch_mask is None else self.patch_mask[index]
        kinds = tuple(self.kinds[g] for g in indices)
        return PatchGroups(pixel_values, patch_mask, kinds, self.num_patches, self.vision_features)


@dataclass(frozen=True)
class EncodedGroups:
    """Groups as the language model reads them.

    `features`: `G` tensors `[n_g, D]`; `kinds`: of each group; `content_keys`: the background cache's key of each, None
    for object groups, and where the cache is not in use or cannot tell what the tower does.
    """

    features: list[torch.Tensor]
    kinds: tuple[int, ...]
    content_keys: tuple[bytes | None, ...]

    @property
    def are_keyed(self) -> bool:
        """Whether every background has its key."""
        return all(
            key is not None or kind == OBJECT for key, kind in zip(self.content_keys, self.kinds, strict=True)
        )

    @property
    def lengths(self) -> list[int]:
        """n_g: tokens of each group."""
        return [feature.shape[0] for feature in self.features]

    def select(self, indices: Sequence[int]) -> "EncodedGroups":
        """The groups with these indices, one of them several times where beams share it; no tensor is copied."""
        return EncodedGroups(
            [self.features[g] for g in indices],
            tuple(self.kinds[g] for g in indices),
            tuple(self.content_keys[g] for g in indices),
        )


def group_features(
    model,
    pixel_values: torch.Tensor,
    patch_mask: torch.Tensor | None = None,
    group_kind: torch.Tensor | None = None,
    vision_features: VisionFeatures | None = None,
    adapters: list[str] | None = None,
) -> EncodedGroups:
    """Vision tokens of groups, those of backgrounds from the cache where it is in use and has them.

    Args:
        model: the `BackdropModel`.
        pixel_values, patch_mask, group_kind: see `BackdropModel.get_image_features`.
        vision_features: the tower's states to take; None: the model's own.
        adapters: peft's adapter of each group, see `group_adapters`; None: the call names none.

    Raises:
        ValueError: the groups do not fit the model, see `check_groups`.
    """
    groups = check_groups(model.config, pixel_values, patch_mask, group_kind, vision_features)
    features: list = [None] * len(groups)
    keys: list[bytes | None] = [None] * len(groups)
    for adapter in [None] if adapters is None else sorted(set(adapters)):
        members = [g for g in range(len(groups)) if adapters is None or adapters[g] == adapter]
        part = groups if len(members) == len(groups) else groups.select(members)
        with one_adapter(adapter, *vision_modules(model)):
            found = _encode(model, part, adapter)
        for g, feature, key in zip(members, *found, strict=True):
            features[g], keys[g] = feature, key
    if model.config.raster_order:
        features = in_raster_order(features, groups)
    return EncodedGroups(features, groups.kinds, tuple(keys))


def given_image_embeds(
    pixel_values: torch.Tensor | None, image_embeds: torch.Tensor | None, mm_encoder_outputs: dict | None
) -> torch.Tensor | None:
    """Vision tokens `[n, D]` that are given in one of two forms, None: in neither.

    Args:
        image_embeds: the tokens.
        mm_encoder_outputs: transformers' form, what `get_image_features` returned under "image".

    Raises:
        ValueError: images are given in more than one form.
    """
    encoded = (mm_encoder_outputs or {}).get("image")
    forms = {"pixel_values": pixel_values, "image_embeds": image_embeds, "mm_encoder_outputs": encoded}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"You cannot specify both {given[0]} and {given[1]} at the same time")
    if encoded is None:
        return image_embeds
    tokens = encoded.pooler_output
    return tokens.flatten(0, -2) if isinstance(tokens, torch.Tensor) else torch.cat(list(tokens))


def check_groups(
    config: BackdropConfig,
    pixel_values: torch.Tensor,
    patch_mask: torch.Tensor | None,
    group_kind: torch.Tensor | None,
    vision_features: VisionFeatures | None = None,
) -> PatchGroups:
    """The groups with their defaults filled in; see `BackdropModel.get_image_features`.

    Raises:
        ValueError: a shape or a kind is not the model's, or a group owns no patch.
    """
    side, patches = config.vision_config.image_size, config.num_patches
    if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
        raise ValueError(f"pixel_values is {tuple(pixel_values.shape)}; wanted (groups, 3, {side}, {side}).")
    groups = pixel_values.shape[0]
    if not groups:
        raise ValueError(
            "pixel_values has 0 groups; wanted at least one, or no pixel_values for a prompt without images."
        )
    patch_mask, group_kind = host_copies([patch_mask, group_kind])
    if patch_mask is not None:
        patch_mask = _checked_mask(patch_mask, groups, patches)
    kinds = [BACKGROUND] * groups if group_kind is None else group_kind.tolist()
    if len(kinds) != groups or not set(kinds) <= {BACKGROUND, OBJECT}:
        raise ValueError(f"group_kind is {kinds}; wanted {groups} values, 0 (background) or 1 (object).")
    if OBJECT in kinds and not config.trained_on_groups:
        logger.warning_once(
            "This model was not finetuned on patch groups, and an image was split into background and objects: "
            "answers may be worse than on the whole image. Finetune it with a Backdrop recipe."
        )
    features = vision_features or config.vision_features()
    return PatchGroups(pixel_values, patch_mask, tuple(kinds), patches, features)


def _checked_mask(patch_mask: torch.Tensor, groups: int, patches: int) -> torch.Tensor:
    """A mask on the CPU as bool; see `check_groups`."""
    if tuple(patch_mask.shape) != (groups, patches):
        raise ValueError(f"patch_mask is {tuple(patch_mask.shape)}; wanted ({groups}, {patches}).")
    patch_mask = patch_mask.bool()
    if not bool(patch_mask.any(-1).all()):
        empty = [g for g, owns in enumerate(patch_mask.any(-1).tolist()) if not owns]
        raise ValueError(f"patch_mask: groups {empty} own no patch; wanted at least one each.")
    return patch_mask


def encode_by_kind(
    model, groups: PatchGroups, layers_pass: Callable[..., list[torch.Tensor] | None] | None = None
) -> list[torch.Tensor]:
    """Groups through tower and projector, apart by kind only where the kinds have modules of their own.

    Args:
        layers_pass: see `encode_groups`; only for the tower of the backgrounds.

    Returns:
        `G` tensors `[n_g, D]`.
    """
    config = model.config
    if not (config.separate_vision_towers or config.separate_projectors):
        return _encode_alike(model, groups, BACKGROUND, layers_pass)
    features: list = [None] * len(groups)
    for kind in sorted(set(groups.kinds)):
        members = [g for g, other in enumerate(groups.kinds) if other == kind]
        part = groups if len(members) == len(groups) else groups.select(members)
        for g, feature in zip(members, _encode_alike(model, part, kind, layers_pass), strict=True):
            features[g] = feature
    return features


def in_raster_order(features: list[torch.Tensor], groups: PatchGroups) -> list[torch.Tensor]:
    """Features where each background and the objects behind it have shared their tokens out in the grid's order.

    Both keep their numbers of tokens. Pairs whose patches overlap are two images, and stay as they are.
    """
    features = list(features)
    if groups.patch_mask is None:
        return features
    for g, pair in enumerate(zip(groups.kinds, groups.kinds[1:], strict=False)):
        masks = groups.patch_mask[g : g + 2]
        if pair != (BACKGROUND, OBJECT) or bool((masks[0] & masks[1]).any()):
            continue
        patches = torch.cat([mask.nonzero().squeeze(-1) for mask in masks])
        both = torch.cat(features[g : g + 2])
        count = features[g].shape[0]
        merged = both[to_device(patches.argsort(), both.device)]
        features[g], features[g + 1] = merged[:count], merged[count:]
    return features


def _encode_alike(model, groups: PatchGroups, kind: int, layers_pass=None) -> list[torch.Tensor]:
    """All groups through the tower and projector of one kind."""
    config = model.config
    tower, projector = model.vision_modules(kind)
    states = encode_groups(
        tower,
        groups.pixel_values,
        groups.patch_mask if config.masked_attention else None,
        list(groups.vision_features.layers),
        groups.vision_features.strategy,
        layers_pass,
    )
    if not config.masked_attention and groups.patch_mask is not None:
        kept = nn.functional.pad(groups.patch_mask, (groups.vision_features.extra_tokens, 0), value=True)
        owned = [to_device(mask.nonzero().squeeze(-1), states[0].device) for mask in kept]
        states = [state[index] for state, index in zip(states, owned, strict=True)]
    return list(projector(torch.cat(states)).split([state.shape[0] for state in states]))


def _encode(model, groups: PatchGroups, adapter: str | None) -> tuple[list[torch.Tensor], list[bytes | None]]:
    """(features, content keys) of groups, by the cache where it is in use and can tell what the tower does."""
    cache = model.cache_in_use
    if adapter is None and cache is not None and row_adapters(*vision_modules(model)) is not None:
        cache = None  # peft has names for a batch of the tower's own making, and they are nobody's
    run_key = None if cache is None else tokens_run_key(model, groups.vision_features)
    if cache is None or run_key is None:
        return encode_by_kind(model, groups), [None] * len(groups)
    return _encode_with_cache(model, groups, cache, run_key, adapter)


def _encode_with_cache(
    model, groups: PatchGroups, cache: BackgroundCache, run_key: bytes, adapter: str | None
) -> tuple[list[torch.Tensor], list[bytes | None]]:
    """(features, content keys): backgrounds from the cache, or encoded one by one and stored; the objects together.

    Kernels choose by shape in which order they add, so the last bits of a group depend on what shares its pass. A
    background has a pass of its own, and the objects' pass holds the objects alone: what is stored for a key depends on
    the key alone, and a miss and a hit of one call are equal bit for bit.
    """
    backgrounds = [g for g, kind in enumerate(groups.kinds) if kind == BACKGROUND]
    objects = [g for g, kind in enumerate(groups.kinds) if kind != BACKGROUND]
    context = in_namespace(model, run_key, adapter)
    hashed = content_keys(groups.pixel_values, groups.masks, backgrounds, context)
    tokens = groups.lengths
    known: dict[bytes, torch.Tensor] = {}
    computed = sum(tokens[g] for g in objects)
    for g, key in hashed.items():
        if key not in known:  # the same background twice in one batch is encoded once
            known[key], was_stored = _load_background(model, groups, g, key, cache)
            computed += 0 if was_stored else tokens[g]
    cache.record_tokens(sum(tokens) - computed, computed)
    encoded: dict[int, torch.Tensor] = {g: known[key] for g, key in hashed.items()}
    if objects:
        layers_pass = None
        # The run key is of the background's tower, without an adapter that a call names.
        separate = model.config.separate_vision_towers or adapter is not None
        if model.compiled_reuse is not None and not separate:
            layers_pass = partial(model.compiled_reuse.tower_layers, model, run_key)
        encoded |= zip(objects, encode_by_kind(model, groups.select(objects), layers_pass), strict=True)
    return [encoded[g] for g in range(len(groups))], [hashed.get(g) for g in range(len(groups))]


def _load_background(
    model, groups: PatchGroups, g: int, key: bytes, cache: BackgroundCache
) -> tuple[torch.Tensor, bool]:
    """(features `[n_g, D]` of background g, whether the cache had them); what it lacks is computed and stored."""
    device = model.multi_modal_projector.linear_2.weight.device
    # Offloaded weights are on "meta", where no tensor can be read.
    stored = cache.get("tokens", key, [torch.device("cpu") if device.type == "meta" else device])
    if stored is not None:
        return stored[0], True
    alone = groups.select([g])
    # Neither the batch's memory layout nor the background's place in it may choose a kernel.
    alone = replace(alone, pixel_values=alone.pixel_values.clone(memory_format=torch.contiguous_format))
    started = synchronized_clock(device)
    (features,) = encode_by_kind(model, alone)
    cache.put("tokens", key, (features,), synchronized_clock(device) - started)
    return features, False
