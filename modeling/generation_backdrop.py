"""Generation with images: encoded once, fed without what is cached, shared between beams, told apart from drafts."""

import inspect

import torch
from transformers import GenerationMixin

from .group_features_backdrop import EncodedGroups, given_image_embeds, group_features
from .prefill_backdrop import plan_prefill, prefill_images, prefill_inputs
from .prefix_rules_backdrop import generation_refusal
from .prompt_layout_backdrop import PromptBatch, rows_of_groups

VISUAL_INPUTS = ("pixel_values", "patch_mask", "group_kind", "image_embeds")


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
        if wants_images and pixel_values is not None:

            def encode() -> EncodedGroups:
                encoded = group_features(self.model, pixel_values, patch_mask, group_kind)
                return encoded if group_index is None else encoded.select(group_index.tolist())

            if inputs_embeds is not None:
                features = encode().features
                image_embeds = torch.cat(features) if features else None
            else:
                length = input_ids.shape[1]
                seen = 0 if next_sequence_length is None else length - next_sequence_length
                prompt = PromptBatch(input_ids, attention_mask, kwargs.get("position_ids")).first(
                    prompt_length
                )
                # Where the cache holds every image there is nothing to encode.
                if not seen or bool((prompt.input_ids[:, seen:] == self.config.image_token_id).any()):
                    # The plan reads the prompt before the images are encoded: a read afterwards waits for the device.
                    refusal = generation_refusal(self, kwargs)
                    plan = plan_prefill(self.model, prompt, past_key_values, seen, refusal)
                    cached, image_embeds = prefill_images(self.model, plan, encode(), past_key_values)
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

    @torch.no_grad()
    def prepare_prefill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        group_kind: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
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
        return prefill_inputs(self.model, prompt, pixel_values, patch_mask, group_kind)

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
        batch = input_ids.shape[0] if input_ids is not None else 0
        pixel_values, image_embeds = visual.get("pixel_values"), visual.get("image_embeds")
        if expand_size > 1 and pixel_values is not None:
            rows = self._rows_for_expansion(input_ids, pixel_values, visual.get("patch_mask"), batch)
            order = [g for row in rows for _ in range(expand_size) for g in row]
            visual["group_index"] = torch.tensor(order, device=pixel_values.device)
        if expand_size > 1 and image_embeds is not None:
            placeholders = (input_ids == self.config.image_token_id).sum(-1).tolist()
            parts = image_embeds.split(placeholders)
            visual["image_embeds"] = torch.cat([part for part in parts for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        return input_ids, {**model_kwargs, **visual}

    def _rows_for_expansion(self, input_ids, pixel_values, patch_mask, batch: int) -> list[tuple[int, ...]]:
        """Which groups belong to which of the `batch` rows."""
        groups = pixel_values.shape[0]
        if input_ids is not None and input_ids.shape[1] > 0:
            if patch_mask is None:
                tokens = [self.config.num_patches + self.config.extra_tokens_per_group] * groups
            else:
                tokens = self.model.tokens_per_group(patch_mask)
            return rows_of_groups(input_ids, self.config.image_token_id, tokens)
        if batch == 0 or groups % batch:
            raise ValueError(
                f"With inputs_embeds, {groups} groups cannot be told apart over {batch} rows for beams or several "
                "sequences; pass input_ids."
            )
        return [tuple(range(r * groups // batch, (r + 1) * groups // batch)) for r in range(batch)]


def _parameters(*functions) -> set[str]:
    """The names of their parameters."""
    return {name for function in functions for name in inspect.signature(function).parameters}
