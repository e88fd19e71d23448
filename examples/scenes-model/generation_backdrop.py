"""Generation with images: encoded once, fed without what is cached, shared between beams, told apart from drafts."""

import inspect

import torch
from transformers import GenerationMixin
from transformers.generation import LogitsProcessor

from .adapter_rows_backdrop import adapter_hooks_removed_on_error, group_adapters
from .configuration_backdrop import VisionFeatures
from .group_features_backdrop import given_image_embeds, group_features
from .prefill_backdrop import plan_prefill, prefill_images, prefill_inputs
from .prefix_rules_backdrop import generation_refusal
from .prompt_layout_backdrop import PromptBatch, rows_of_groups, unseen_tokens

VISUAL_INPUTS = ("pixel_values", "patch_mask", "group_kind", "image_embeds")


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
        mm_encoder_outputs=None,
        prompt_length=None,
        **kwargs,
    ):
        """Encodes the images once, at the first step, and feeds the vision tokens that are not cached yet.

        `group_index [G']` (set by beam and multi-sequence expansion) says which group each of the expanded rows'
        groups is, so that no image is encoded twice. `prompt_length` (set where this model drafts for another) says how
        many of the ids are the prompt: a placeholder behind it is text. The other arguments are transformers' and
        `forward`'s.
        """
        # transformers calls no step of a draft the first.
        wants_images = is_first_iteration or prompt_length is not None or not kwargs.get("use_cache", True)
        image_embeds = (
            given_image_embeds(pixel_values, image_embeds, mm_encoder_outputs) if wants_images else None
        )
        if wants_images and (pixel_values is not None or image_embeds is not None):
            prompt_ids = self._prompt_ids(input_ids, inputs_embeds)
            length = prompt_ids.shape[1]
            seen = 0 if next_sequence_length is None else length - next_sequence_length
            prompt = PromptBatch(prompt_ids, attention_mask, kwargs.get("position_ids")).first(prompt_length)
            if pixel_values is None:
                if seen:
                    image_embeds = self._unseen_vision_tokens(prompt.input_ids, image_embeds, seen)
            # Where the cache holds every image there is nothing to encode.
            elif not seen or bool(self.model.placeholders(prompt.input_ids[:, seen:]).any()):
                refusal = generation_refusal(self, {**kwargs, "inputs_embeds": inputs_embeds})
                # The plan reads the prompt before the images are encoded: a read afterwards waits for the device.
                plan = plan_prefill(self.model, prompt, past_key_values, seen, refusal)
                features = self.config.vision_features(vision_feature_layer, vision_feature_select_strategy)
                lengths = self._group_lengths(pixel_values, patch_mask, features)
                adapters = group_adapters(self.model, prompt.input_ids, lengths, seen, group_index)
                encoded = group_features(self.model, pixel_values, patch_mask, group_kind, features, adapters)
                if group_index is not None:
                    encoded = encoded.select(group_index.tolist())
                cached, image_embeds = prefill_images(self.model, plan, encoded, past_key_values)
                if cached != seen:
                    next_sequence_length = length - cached
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if image_embeds is not None:
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

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        """Images are encoded here only for a prompt that is fed in chunks, which transformers gives their share each.

        Elsewhere `prepare_inputs_for_generation` encodes them, which knows what of the prompt is cached.
        """
        if generation_config.prefill_chunk_size is None:
            return model_kwargs
        return super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )

    def _get_candidate_generator(self, *, input_ids, model_kwargs, assistant_model=None, **kwargs):
        """Drafts, by another model or from the prompt itself, that propose text alone.

        A draft model gets what it takes: a text model no images, a `BackdropForConditionalGeneration` the groups, which
        it encodes by itself.
        """
        if assistant_model is not None:
            taken = _parameters(assistant_model.forward, assistant_model.prepare_inputs_for_generation)
            dropped = {name for name in (*VISUAL_INPUTS, "mm_encoder_outputs") if name not in taken}
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in dropped}
            if "prompt_length" in taken:
                model_kwargs["prompt_length"] = input_ids.shape[1]
        generator = super()._get_candidate_generator(
            input_ids=input_ids, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )
        propose = generator.get_candidates

        def propose_text(input_ids, **kwargs):
            """The candidates up to the first placeholder, which would be taken for one of the prompt's."""
            candidates, logits = propose(input_ids, **kwargs)
            known = input_ids.shape[1]
            placeholders = (candidates[0, known:] == self.config.image_token_id).nonzero()
            if len(placeholders):
                kept = int(placeholders[0])
                candidates = candidates[:, : known + kept]
                logits = None if logits is None else logits[:, :kept]
            return candidates, logits

        generator.get_candidates = propose_text
        return generator

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Repeats rows for beams or several sequences; their groups follow the rows by index, not by copy."""
        visual = {name: model_kwargs.pop(name) for name in VISUAL_INPUTS if name in model_kwargs}
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


def _parameters(*functions) -> set[str]:
    """The names of their parameters."""
    return {name for function in functions for name in inspect.signature(function).parameters}
