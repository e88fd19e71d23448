"""Generation with images: encoded once, fed without what is cached, shared between beams."""

import torch
from transformers import GenerationMixin
from transformers.generation import LogitsProcessor

from .adapter_rows_backdrop import adapter_hooks_removed_on_error, group_adapters
from .configuration_backdrop import VisionFeatures
from .group_features_backdrop import group_features
from .prefill_backdrop import plan_prefill, prefill_images, prefill_inputs
from .prompt_layout_backdrop import PromptBatch, rows_of_groups, unseen_tokens


class NoSeparators(LogitsProcessor):
    """Separators mark groups in a prompt and are never an answer: their scores become minus infinity.

    A class of its own: where a caller's processor and one that `generate` makes are of one class, transformers keeps the
    caller's alone.
    """

    supports_continuous_batching = True

    def __init__(self, token_ids: list[int]):
        self.token_ids = torch.tensor(token_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores [rows, vocabulary]` with no chance for the separators."""
        self.token_ids = self.token_ids.to(scores.device)
        return scores.index_fill(-1, self.token_ids, -torch.inf)


# Transformers looks for "GenerationMixin" in the names of a model's bases.
class BackdropGenerationMixin(GenerationMixin):
    """transformers' generation for a model whose base (`self.model`) is a `BackdropModel`."""

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        pixel_values=None,
        patch_mask=None,
        group_kind=None,
        group_index=None,
        image_embeds=None,
        vision_feature_layer=None,
        vision_feature_select_strategy=None,
        **kwargs,
    ):
        """Encodes the images once, at the first step, and feeds the vision tokens that are not cached yet.

        `group_index [G']` (set by beam and multi-sequence expansion) says which group each of the expanded rows'
        groups is, so that no image is encoded twice. The other arguments are transformers' and `forward`'s.
        """
        wants_images = is_first_iteration or not kwargs.get("use_cache", True)
        if wants_images and (pixel_values is not None or image_embeds is not None):
            prompt_ids = self._prompt_ids(input_ids, inputs_embeds)
            length = prompt_ids.shape[1]
            seen = length - next_sequence_length if next_sequence_length is not None else 0
        if wants_images and pixel_values is not None:
            wants_all_states = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
            load = not wants_all_states and inputs_embeds is None
            prompt = PromptBatch(prompt_ids, attention_mask, kwargs.get("position_ids"))
            plan = plan_prefill(self.model, prompt, past_key_values, seen, load)
            features = self.config.vision_features(vision_feature_layer, vision_feature_select_strategy)
            adapters = group_adapters(
                self.model, prompt_ids, self._group_lengths(pixel_values, patch_mask, features), seen, group_index
            )
            encoded = group_features(self.model, pixel_values, patch_mask, group_kind, features, adapters)
            if group_index is not None:
                encoded = encoded.select(group_index.tolist())
            cached, image_embeds = prefill_images(self.model, plan, encoded, past_key_values)
            if cached != plan.cached:
                next_sequence_length = length - cached
        elif wants_images and image_embeds is not None and seen:
            image_embeds = self._unseen_vision_tokens(prompt_ids, image_embeds, seen)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if wants_images and image_embeds is not None:
            model_inputs["image_embeds"] = image_embeds
        return model_inputs

    def generate(self, *args, **kwargs):
        """As transformers' `generate`; separator tokens are never generated."""
        with adapter_hooks_removed_on_error(self):
            return super().generate(*args, **kwargs)

    def _get_logits_processor(self, *args, logits_processor=None, **kwargs):
        # Behind the caller's own, whatever they ask for, and before what sampling cuts down to the likeliest tokens.
        processors = list(logits_processor or ())
        if self.config.separator_token_ids is not None:
            processors.append(NoSeparators(self.config.separator_token_ids))
        return super()._get_logits_processor(*args, logits_processor=processors, **kwargs)

    @torch.no_grad()
    def prepare_prefill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        group_kind: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> dict:
        """Inputs for `forward` with everything that the background cache knows already in them.

        For users of `forward` who do not call `generate`: `model(**model.prepare_prefill(**inputs))` gives the logits
        of the positions that were left to compute, the last ones of the prompt among them, and the filled
        `past_key_values`. No gradients. With the cache off nothing is left out.

        Args:
            input_ids: `[B, L]`, padded on the left if at all; the others as in `forward`.

        Returns:
            `input_ids [B, L - c]`, `position_ids [B, L - c]`, `attention_mask [B, L]`, `image_embeds`,
            `past_key_values` with the first c positions, `use_cache`.

        Raises:
            ValueError: the groups do not fit the model or the placeholders.
        """
        prompt = PromptBatch(input_ids, attention_mask, position_ids)
        features = self.config.vision_features(vision_feature_layer, vision_feature_select_strategy)
        return prefill_inputs(self.model, prompt, pixel_values, patch_mask, group_kind, features)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Repeats rows for beams or several sequences; their groups follow the rows by index, not by copy."""
        visual_names = ("pixel_values", "patch_mask", "group_kind", "image_embeds")
        visual = {name: model_kwargs.pop(name) for name in visual_names if name in model_kwargs}
        pixel_values, image_embeds = visual.get("pixel_values"), visual.get("image_embeds")
        if expand_size > 1 and (pixel_values is not None or image_embeds is not None):
            prompt_ids = self._prompt_ids(input_ids, model_kwargs.get("inputs_embeds"))
            past_key_values = model_kwargs.get("past_key_values")
            cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        if expand_size > 1 and pixel_values is not None:
            features = self.config.vision_features(
                model_kwargs.get("vision_feature_layer"), model_kwargs.get("vision_feature_select_strategy")
            )
            tokens = self._group_lengths(pixel_values, visual.get("patch_mask"), features)
            rows, _ = rows_of_groups(prompt_ids, self.config.image_token_id, tokens, cached)
            order = [g for row in rows for _ in range(expand_size) for g in row]
            visual["group_index"] = torch.tensor(order, device=pixel_values.device)
        if expand_size > 1 and image_embeds is not None:
            parts, _ = self._vision_tokens_by_row(prompt_ids, image_embeds, cached)
            visual["image_embeds"] = torch.cat([part for part in parts for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        return input_ids, {**model_kwargs, **visual}

    def _group_lengths(self, pixel_values, patch_mask, features: VisionFeatures) -> list[int]:
        """Tokens of each of the `G` groups."""
        groups = pixel_values.shape[0]
        patches = [self.config.num_patches] * groups if patch_mask is None else patch_mask.sum(-1).tolist()
        return [count + features.extra_tokens for count in patches]

    def _prompt_ids(self, input_ids, inputs_embeds) -> torch.Tensor:
        """The prompt as ids `[B, L]`; of an embedded one only the placeholders are known, the rest is -1."""
        if inputs_embeds is None:
            return input_ids
        is_image = self.model.placeholders(None, inputs_embeds)
        return torch.where(is_image, self.config.image_token_id, -1)

    def _vision_tokens_by_row(
        self, prompt_ids, image_embeds, cached: int
    ) -> tuple[tuple[torch.Tensor, ...], int]:
        """`image_embeds [n, D]` cut into rows, and the column from which placeholders were counted, 0 or `cached`."""
        is_image = self.model.placeholders(prompt_ids)
        for first in (0, cached):
            counts = is_image[:, first:].sum(-1).tolist()
            if sum(counts) == image_embeds.shape[0]:
                return image_embeds.split(counts), first
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {int(is_image.sum())}, "
            f"features {image_embeds.shape[0]}"
        )

    def _unseen_vision_tokens(self, prompt_ids, image_embeds, cached: int) -> torch.Tensor | None:
        """`image_embeds [n, D]` without those whose placeholders are cached."""
        parts, first = self._vision_tokens_by_row(prompt_ids, image_embeds, cached)
        seen = self.model.placeholders(prompt_ids)[:, first:cached]
        return unseen_tokens(list(parts), [(r,) for r in range(len(parts))], seen)
