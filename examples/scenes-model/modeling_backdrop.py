"""Backdrop: a LLaVA-style model that takes an image as groups of patches, background first.

`BackdropModel.forward` is the architecture: embed the ids, encode the groups, put their tokens where the placeholders
are, run prefusion, run the language model. Training, evaluation, generation and the background cache all go through it.
With one group of all patches, no separators and untrained prefusion it computes what `LlavaForConditionalGeneration`
computes.

Beside this file: encoding of groups, prefusion, generation and prefill, the cache, loading, outputs, arguments.

Shapes: `B` rows, `L` positions, `G` groups of all rows in order of appearance, `P` patches, `S` image side,
`n_g` tokens of group g, `D` text width.
"""

import torch
from torch import nn
from transformers import AutoModel, Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple, torch_compilable_check

from .arguments_backdrop import (
    ATTENTION_ARGUMENTS,
    attention_function,
    refuse_arguments,
    refuse_unknown,
    taken_by,
)
from .cache_access_backdrop import BackgroundCacheMixin
from .captured_reuse_backdrop import run_language_model
from .configuration_backdrop import BACKGROUND, OBJECT, BackdropConfig
from .generation_backdrop import BackdropGenerationMixin
from .group_features_backdrop import given_image_embeds, group_features
from .outputs_backdrop import BackdropCausalLMOutputWithPast, BackdropModelOutputWithPast, kept_positions
from .prefix_pass_backdrop import release_background
from .prefusion_backdrop import BackdropPrefusion
from .projector_backdrop import BackdropProjector
from .several_processes_backdrop import runs_every_part, with_every_kind, without_blanks
from .strict_loading_backdrop import StrictLoadingMixin


class BackdropPreTrainedModel(BackgroundCacheMixin, StrictLoadingMixin, PreTrainedModel):
    """What the model with and without its head have in common: loading, initialisation, embeddings, the cache."""

    config_class = BackdropConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Buffers in checkpoints of older transformers versions; and the detector's weights, because vLLM reads every
    # *.safetensors file of a folder.
    _keys_to_ignore_on_load_unexpected = [r"position_ids$", r"rotary_emb\.inv_freq$", r"^detector\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.language_model.set_input_embeddings(value)


class BackdropModel(BackdropPreTrainedModel):
    """Tower, projector, prefusion and language model, without the head."""

    head_prefix = "lm_head."

    def __init__(self, config: BackdropConfig):
        super().__init__(config)
        config.check_servable()
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = BackdropProjector(config)
        if config.separate_vision_towers:
            self.object_vision_tower = AutoModel.from_config(config.vision_config)
        if config.separate_projectors:
            self.object_multi_modal_projector = BackdropProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.num_prefusion_layers:
            self.prefusion = BackdropPrefusion(
                self.language_model, config.num_prefusion_layers, config.prefusion_rotary
            )
        self.post_init()

    def vision_modules(self, kind: int) -> tuple[nn.Module, nn.Module]:
        """(tower, projector) that encode groups of this kind, `BACKGROUND` or `OBJECT`."""
        of_object = kind == OBJECT
        tower = (
            self.object_vision_tower
            if of_object and self.config.separate_vision_towers
            else self.vision_tower
        )
        projector = (
            self.object_multi_modal_projector
            if of_object and self.config.separate_projectors
            else self.multi_modal_projector
        )
        return tower, projector

    @torch.no_grad()
    def copy_background_encoder(self) -> None:
        """Starts the object groups' own tower and projector, where they exist, as copies of the background's."""
        if self.config.separate_vision_towers:
            self.object_vision_tower.load_state_dict(self.vision_tower.state_dict())
        if self.config.separate_projectors:
            self.object_multi_modal_projector.load_state_dict(self.multi_modal_projector.state_dict())

    def placeholders(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Where the image placeholders are: of ids `[B, L]`, or of embeddings `[B, L, D]` without ids; bool `[B, L]`."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def tokens_per_group(self, patch_mask: torch.Tensor) -> list[int]:
        """Tokens that each group yields: its patches, and the CLS token where it is kept. `patch_mask [G, P]`."""
        return (patch_mask.sum(-1) + self.config.extra_tokens_per_group).tolist()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        group_kind: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Vision tokens of patch groups, those of backgrounds from the background cache where it is on and has them.

        Args:
            pixel_values: `[G, 3, S, S]`, normalised.
            patch_mask: `[G, P]` bool; None: every group owns every patch.
            group_kind: `[G]`, 0 background, 1 object; None: all background.
            vision_feature_layer, vision_feature_select_strategy: as in the configuration, for this call; None: its own.

        Returns:
            `.pooler_output`: a list of `G` tensors `[n_g, D]`.

        Raises:
            ValueError: a shape or kind is not the model's, or a group owns no patch.
            TypeError: another argument; the tower's hidden states and attentions are not kept.
        """
        refuse_arguments(
            "get_image_features", [k for k, v in kwargs.items() if v is not None and v is not False]
        )
        features = self.config.vision_features(vision_feature_layer, vision_feature_select_strategy)
        encoded = group_features(self, pixel_values, patch_mask, group_kind, features)
        return BaseModelOutputWithPooling(pooler_output=encoded.features)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        group_kind: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BackdropModelOutputWithPast | tuple:
        """One forward for everything.

        Args:
            input_ids: `[B, L]`; or `inputs_embeds [B, L, D]`, exactly one of the two.
            pixel_values, patch_mask, group_kind: the groups of all rows in order, see `get_image_features`.
            attention_mask: `[B, L]`, 0 at padding, or any form that the language model takes.
            position_ids: `[B, L]` or `[1, L]`; None: counted from what `past_key_values` holds.
            image_embeds: `[sum n_g, D]` vision tokens, given instead of pixels.
            mm_encoder_outputs: the same as what `get_image_features` returned, under "image": transformers' form.
            vision_feature_layer, vision_feature_select_strategy: see `get_image_features`.
            kwargs: what the language model and its attention take.

        Returns:
            `last_hidden_state [B, L, D]` and what the language model returns beside it.

        Raises:
            ValueError: ids and embeddings, or pixels and vision tokens, are both given; or groups and placeholders do
                not fit.
            TypeError: an argument that nobody takes.
        """
        refuse_unknown(type(self).__name__, kwargs, self.argument_takers)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        image_embeds = given_image_embeds(pixel_values, image_embeds, mm_encoder_outputs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        blanks = 0
        if image_embeds is None and runs_every_part(self):
            groups = (pixel_values, patch_mask, group_kind)
            pixel_values, patch_mask, group_kind, blanks = with_every_kind(self, inputs_embeds, *groups)
        if pixel_values is not None:
            choice = (vision_feature_layer, vision_feature_select_strategy)
            encoded = self.get_image_features(pixel_values, patch_mask, group_kind, *choice, return_dict=True)
            inputs_embeds, image_embeds = without_blanks(inputs_embeds, encoded.pooler_output, blanks)
        going_on = past_key_values is not None and past_key_values.get_seq_length() > 0
        inputs_embeds = self._replace_placeholders(input_ids, inputs_embeds, image_embeds, going_on)
        if self.config.num_prefusion_layers:
            if past_key_values is None and (
                self.config.text_config.use_cache if use_cache is None else use_cache
            ):
                past_key_values = DynamicCache(config=self.config.text_config)
            if position_ids is None:
                seen = past_key_values.get_seq_length() if past_key_values is not None else 0
                positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
                position_ids = (positions + seen).unsqueeze(0)
            inputs_embeds = self.prefusion(
                inputs_embeds,
                self.language_model.rotary_emb,
                attention_mask,
                position_ids,
                past_key_values,
                **{name: kwargs[name] for name in ATTENTION_ARGUMENTS if name in kwargs},
            )
        outputs = run_language_model(
            self,
            past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        release_background(past_key_values)
        result = BackdropModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_embeds,
        )
        return result.to_tuple() if return_dict is False else result

    def argument_takers(self) -> list:
        """The functions whose arguments `forward` takes too: of the language model and of its attention."""
        attention = attention_function(self.config.text_config._attn_implementation)
        return [type(self.language_model).forward, *attention]

    def _replace_placeholders(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_embeds: torch.Tensor | None,
        going_on: bool,
    ) -> torch.Tensor:
        """`inputs_embeds [B, L, D]` with `image_embeds [sum n_g, D]` where the placeholders are.

        Where a sequence is `going_on` without images, a placeholder is one that was generated or drafted: text, as in
        LLaVA.
        """
        is_image = self.placeholders(input_ids, inputs_embeds).to(inputs_embeds.device)
        if image_embeds is None:
            if input_ids is not None and not going_on and not torch.compiler.is_compiling():
                found = int(is_image.sum())
                if found:
                    raise ValueError(
                        f"Image features and image tokens do not match, tokens: {found}, features 0: the prompt has "
                        "image placeholders, but no pixel_values were given."
                    )
            return inputs_embeds
        found, given = is_image.sum(), image_embeds.shape[0]
        torch_compilable_check(
            found == given,
            lambda: f"Image features and image tokens do not match, tokens: {int(found)}, features {given}",
        )
        image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), image_embeds)


class BackdropForConditionalGeneration(BackdropPreTrainedModel, BackdropGenerationMixin):
    """Backdrop with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: BackdropConfig):
        super().__init__(config)
        self.model = BackdropModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        group_kind: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """See `BackdropModel.get_image_features`."""
        choice = (vision_feature_layer, vision_feature_select_strategy)
        return self.model.get_image_features(pixel_values, patch_mask, group_kind, *choice, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        group_kind: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> BackdropCausalLMOutputWithPast:
        """`BackdropModel.forward`, then the head.

        Args:
            labels: `[B, L]`, -100 where no loss is taken.
            kwargs: what the language model, its attention and the loss function take.
            logits_to_keep: logits of that many last positions, 0: of all; a tensor: of these positions (`[n]`, or
                `[B, n]` for each row its own), or of those where a bool mask `[B, L]` is true.

        Returns:
            `logits [B, n, vocab]` (under a mask `[n, vocab]`) and, with labels, the mean cross-entropy of the next
            token as `loss`.
        """
        of_loss = taken_by(kwargs, lambda: [self.loss_function])
        others = {name: value for name, value in kwargs.items() if name not in of_loss}
        refuse_unknown(type(self).__name__, others, self.model.argument_takers)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            patch_mask=patch_mask,
            group_kind=group_kind,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_embeds=image_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **others,
        )
        logits = self.lm_head(kept_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return BackdropCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = [
    "BACKGROUND",
    "OBJECT",
    "BackdropForConditionalGeneration",
    "BackdropModel",
    "BackdropPreTrainedModel",
]
