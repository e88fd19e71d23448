"""Backdrop: a LLaVA-style model that takes an image as groups of patches, background first.

`BackdropModel.forward` is the architecture: embed the ids, encode the groups, put their tokens where the placeholders
are, run prefusion, run the language model. Training, evaluation, generation and the memo of backgrounds all go
through it. With one group of all patches, no separators and untrained prefusion it computes what
`LlavaForConditionalGeneration` computes.

Shapes: `B` rows, `L` columns, `G` groups of all rows in order of appearance, `P` patches, `S` image side,
`n_g` tokens of group g, `D` text width.
"""

import os
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import AutoModel, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple, logging

from .background_cache_backdrop import BackgroundCache, content_keys, joined_key, synchronized_clock
from .background_folder_backdrop import BackgroundFolder
from .background_prefix_backdrop import (
    keeps_prefixes,
    load_background_prefix,
    prompt_rows,
    release_background,
    rows_of_groups,
)
from .configuration_backdrop import BackdropConfig
from .grouped_vision_backdrop import encode_groups
from .prefusion_backdrop import BackdropPrefusion

logger = logging.get_logger(__name__)

BACKGROUND, OBJECT = 0, 1


@dataclass
class BackdropModelOutputWithPast(BaseModelOutputWithPast):
    """`image_hidden_states [sum n_g, D]`: the vision tokens that replaced the placeholders."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class BackdropCausalLMOutputWithPast(ModelOutput):
    """As LLaVA's; `image_hidden_states [sum n_g, D]`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class BackdropProjector(nn.Module):
    """LLaVA's two-layer MLP from tower width to text width."""

    def __init__(self, config: BackdropConfig):
        super().__init__()
        width = config.vision_config.hidden_size * len(config.feature_layers)
        text_width = config.text_config.hidden_size
        self.linear_1 = nn.Linear(width, text_width, bias=config.multimodal_projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text_width, text_width, bias=config.multimodal_projector_bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class BackdropPreTrainedModel(PreTrainedModel):
    config_class = BackdropConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _keys_of_the_head: str | None = None
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # Buffers that checkpoints of older transformers versions carry; and vLLM reads every *.safetensors of a folder, the
    # detector's too.
    _keys_to_ignore_on_load_unexpected = [r"position_ids$", r"rotary_emb\.inv_freq$", r"^detector\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ):
        """As transformers', but a weight that is missing, left over or of another shape is an error that names it.

        Raises:
            ValueError: the checkpoint does not fit the configuration.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        problems = []
        for title in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(title) or ())
            if title == "unexpected_keys" and cls._keys_of_the_head:
                names = [name for name in names if not name.startswith(cls._keys_of_the_head)]
            if names:
                shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
                problems.append(f"{len(names)} {title.replace('_', ' ')} ({shown})")
        if problems:
            raise ValueError(
                f"The checkpoint {pretrained_model_name_or_path!r} does not fit {cls.__name__}: {'; '.join(problems)}. "
                "No weight is ever left at random silently."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As transformers', always under our own names: a model that was converted in this process would otherwise be
        written in LLaVA's layout, which does not load again."""
        return super().save_pretrained(
            save_directory, *args, save_original_format=save_original_format, **kwargs
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.language_model.set_input_embeddings(value)

    @property
    def background_cache(self) -> BackgroundCache | None:
        """The memo of backgrounds, None while it is off."""
        return self.base_model._background_cache

    def enable_background_cache(
        self,
        max_bytes: int = 2 * 2**30,
        prefixes: bool = True,
        host_max_bytes: int = 0,
        folder: str | os.PathLike | None = None,
        folder_max_bytes: int = 16 * 2**30,
    ) -> BackgroundCache:
        """Keeps vision tokens and language-model prefixes of backgrounds and reuses them; answers do not change.

        Args:
            max_bytes: bound on everything kept where the model is; the least recently used is evicted first.
            prefixes: keep keys and values of the language model too, not vision tokens alone.
            host_max_bytes: bound on what is kept in the host's memory after eviction; useful beside a GPU.
            folder: a folder for what is to outlive this process; several processes may share it.
            folder_max_bytes: bound on its bytes.
        """
        prefixes_work = keeps_prefixes(self.config.text_config)
        if prefixes and not prefixes_work:
            logger.warning(
                f"{self.config.text_config.model_type} is no full-attention decoder: the background cache keeps vision "
                "tokens only."
            )
        self.base_model._background_cache = BackgroundCache(
            max_bytes,
            prefixes and prefixes_work,
            host_max_bytes,
            None if folder is None else BackgroundFolder(folder, folder_max_bytes),
        )
        return self.background_cache

    def disable_background_cache(self) -> None:
        """Forgets the memo and computes everything again."""
        self.base_model._background_cache = None


class BackdropModel(BackdropPreTrainedModel):
    """Tower, projector, prefusion and language model, without the head."""

    # Not among the keys to ignore: vLLM, which puts a head of its own on this class, would not load it then.
    _keys_of_the_head = "lm_head."

    def __init__(self, config: BackdropConfig):
        super().__init__(config)
        _check_servable(config)
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
        self._background_cache: BackgroundCache | None = None
        self.post_init()

    def vision_modules(self, kind: int) -> tuple[nn.Module, nn.Module]:
        """(tower, projector) that encode groups of this kind."""
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

    def group_tokens(self, patch_mask: torch.Tensor) -> list[int]:
        """Tokens that each group yields: its patches, and the CLS token where it is kept. `patch_mask [G, P]`."""
        return (patch_mask.sum(-1) + self.config.extra_tokens_per_group).tolist()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        group_kind: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Vision tokens of patch groups, background groups from the memo where it is on and has them.

        Args:
            pixel_values: `[G, 3, S, S]`, normalised.
            patch_mask: `[G, P]` bool; None: every group owns every patch.
            group_kind: `[G]`, 0 background, 1 object; None: all background.

        Returns:
            `.pooler_output`: a list of `G` tensors `[n_g, D]`.
        """
        features, _ = self._group_features(pixel_values, patch_mask, group_kind)
        return BaseModelOutputWithPooling(pooler_output=features)

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
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BackdropModelOutputWithPast | tuple:
        """One forward for everything.

        Args:
            input_ids: `[B, L]`; or `inputs_embeds [B, L, D]`, exactly one of the two.
            pixel_values, patch_mask, group_kind: the groups of all rows in order, see `get_image_features`.
            image_embeds: `[sum n_g, D]` vision tokens, given instead of pixels.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and image_embeds is not None:
            raise ValueError("You cannot specify both pixel_values and image_embeds at the same time")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_embeds = torch.cat(
                self.get_image_features(pixel_values, patch_mask, group_kind, return_dict=True).pooler_output
            )
        inputs_embeds = self._replace_placeholders(input_ids, inputs_embeds, image_embeds)
        if self.config.num_prefusion_layers:
            if past_key_values is None and (
                self.config.text_config.use_cache if use_cache is None else use_cache
            ):
                past_key_values = DynamicCache(config=self.config.text_config)
            if position_ids is None:
                seen = past_key_values.get_seq_length() if past_key_values is not None else 0
                columns = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
                position_ids = (columns + seen).unsqueeze(0)
            inputs_embeds = self.prefusion(
                inputs_embeds, self.language_model.rotary_emb, attention_mask, position_ids, past_key_values
            )
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
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

    def _replace_placeholders(self, input_ids, inputs_embeds, image_embeds):
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            is_image = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            is_image = (input_ids == self.config.image_token_id).to(inputs_embeds.device)
        if image_embeds is None:
            # One column is a decoding step: a generated placeholder is text, as in LLaVA.
            if input_ids is not None and input_ids.shape[1] > 1 and not torch.compiler.is_compiling():
                found = int(is_image.sum())
                if found:
                    raise ValueError(
                        f"Image features and image tokens do not match, tokens: {found}, features 0: the prompt has "
                        "image placeholders, but no pixel_values were given."
                    )
            return inputs_embeds
        if not torch.compiler.is_compiling() and int(is_image.sum()) != image_embeds.shape[0]:
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {int(is_image.sum())}, "
                f"features {image_embeds.shape[0]}"
            )
        image_embeds = image_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), image_embeds)

    def _group_features(self, pixel_values, patch_mask, group_kind):
        """(features, memo keys) of the groups; a key is None for object groups and while the memo is off."""
        patch_mask, kinds = self._check_groups(pixel_values, patch_mask, group_kind)
        keys: list[bytes | None] = [None] * len(kinds)
        if not self._memo_is_active():
            return self._ordered(self._encode(pixel_values, patch_mask, kinds), patch_mask, kinds), keys
        store = self._background_cache
        context = self.memo_context(*self.vision_modules(BACKGROUND))
        device = self.multi_modal_projector.linear_2.weight.device
        devices = [torch.device("cpu") if device.type == "meta" else device]
        known: dict[bytes, torch.Tensor] = {}
        to_encode, reused = [], 0
        backgrounds = [g for g, kind in enumerate(kinds) if kind == BACKGROUND]
        hashed = content_keys(pixel_values, patch_mask, backgrounds, context)
        tokens = self.group_tokens(patch_mask)
        for g, kind in enumerate(kinds):
            if kind == OBJECT:
                to_encode.append(g)
                continue
            keys[g] = hashed[g]
            if keys[g] in known:  # the same background twice in one batch
                reused += tokens[g]
                continue
            stored = store.get("tokens", keys[g], devices)
            if stored is None:
                to_encode.append(g)
                known[keys[g]] = None
            else:
                known[keys[g]] = stored[0]
                reused += tokens[g]
        encoded = {}
        if to_encode:
            rows = torch.tensor(to_encode)
            started = synchronized_clock(device)
            values = self._encode(
                pixel_values[rows.to(pixel_values.device)],
                patch_mask[rows.to(patch_mask.device)],
                [kinds[g] for g in to_encode],
            )
            encoded = dict(zip(to_encode, values, strict=True))
            per_token = (synchronized_clock(device) - started) / sum(tokens[g] for g in to_encode)
        for g, value in encoded.items():
            if keys[g] is not None:
                known[keys[g]] = value
                store.put("tokens", keys[g], (value,), per_token * tokens[g])
        store.record_tokens(reused, sum(tokens[g] for g in to_encode))
        features = [encoded[g] if keys[g] is None else known[keys[g]] for g in range(len(kinds))]
        return self._ordered(features, patch_mask, kinds), keys

    def _ordered(self, features: list[torch.Tensor], patch_mask, kinds: list[int]) -> list[torch.Tensor]:
        """With `raster_order` a background and the objects after it share their tokens out in the grid's order."""
        if not self.config.raster_order:
            return features
        features = list(features)
        for g, pair in enumerate(zip(kinds, kinds[1:], strict=False)):
            if pair != (BACKGROUND, OBJECT) or bool((patch_mask[g] & patch_mask[g + 1]).any()):
                continue
            places = torch.cat([mask.nonzero().squeeze(-1) for mask in patch_mask[g : g + 2]])
            both = torch.cat(features[g : g + 2])
            count = features[g].shape[0]
            merged = both[places.argsort().to(both.device)]
            features[g], features[g + 1] = merged[:count], merged[count:]
        return features

    def _check_groups(self, pixel_values, patch_mask, group_kind):
        side, patches = self.config.vision_config.image_size, self.config.num_patches
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, side, side):
            raise ValueError(
                f"pixel_values is {tuple(pixel_values.shape)}; wanted (groups, 3, {side}, {side})."
            )
        groups = pixel_values.shape[0]
        if patch_mask is None:
            patch_mask = torch.ones(groups, patches, dtype=torch.bool, device=pixel_values.device)
        if tuple(patch_mask.shape) != (groups, patches):
            raise ValueError(f"patch_mask is {tuple(patch_mask.shape)}; wanted ({groups}, {patches}).")
        patch_mask = patch_mask.bool()
        if not bool(patch_mask.any(-1).all()):
            empty = [g for g, owns in enumerate(patch_mask.any(-1).tolist()) if not owns]
            raise ValueError(f"patch_mask: groups {empty} own no patch; wanted at least one each.")
        kinds = [BACKGROUND] * groups if group_kind is None else group_kind.tolist()
        if len(kinds) != groups or not set(kinds) <= {BACKGROUND, OBJECT}:
            raise ValueError(f"group_kind is {kinds}; wanted {groups} values, 0 (background) or 1 (object).")
        if OBJECT in kinds and not self.config.trained_on_groups:
            logger.warning_once(
                "This model was not finetuned on patch groups, and an image was split into background and objects: "
                "answers may be worse than on the whole image. Finetune it with a Backdrop recipe."
            )
        return patch_mask, kinds

    def _encode(self, pixel_values, patch_mask, kinds: list[int]) -> list[torch.Tensor]:
        """Groups through tower and projector, apart by kind only where the kinds have modules of their own."""
        separate = self.config.separate_vision_towers or self.config.separate_projectors
        parts = sorted(set(kinds)) if separate else [None]
        features: list = [None] * len(kinds)
        for part in parts:
            members = [g for g, kind in enumerate(kinds) if part in (None, kind)]
            tower, projector = self.vision_modules(BACKGROUND if part is None else part)
            rows = None if len(members) == len(kinds) else torch.tensor(members)
            own = patch_mask if rows is None else patch_mask[rows.to(patch_mask.device)]
            states = encode_groups(
                tower,
                pixel_values if rows is None else pixel_values[rows.to(pixel_values.device)],
                own if self.config.masked_attention else torch.ones_like(own),
                self.config.vision_feature_layer,
                self.config.vision_feature_select_strategy,
            )
            if not self.config.masked_attention:
                kept = nn.functional.pad(own, (self.config.extra_tokens_per_group, 0), value=True)
                states = [state[mask.to(state.device)] for state, mask in zip(states, kept, strict=True)]
            projected = projector(torch.cat(states)).split([state.shape[0] for state in states])
            for g, value in zip(members, projected, strict=True):
                features[g] = value
        return features

    def _memo_is_active(self) -> bool:
        cache = self._background_cache
        return cache is not None and not cache.bypassed and not self.training and not torch.is_grad_enabled()

    def memo_context(self, *modules: nn.Module) -> bytes:
        """What a stored value depends on beyond its input: weights, adapters, dtype, attention, namespace."""
        autocast = [
            f"{kind}={torch.get_autocast_dtype(kind)}"
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]
        settings = (
            self.config.vision_config._attn_implementation,
            self.config.text_config._attn_implementation,
            self.config.feature_layers,
            self.config.vision_feature_select_strategy,
            self.config.prefusion_rotary,
            self.config.masked_attention,
            str(self.dtype),
            autocast,
            torch.get_float32_matmul_precision(),
        )
        store = self._background_cache
        if store.folder is not None:
            # Another process may run another version, or another configuration of the same weights.
            settings += (
                torch.__version__,
                transformers.__version__,
                self.device.type,
                self.config.to_json_string(),
            )
        return joined_key(store.namespace.encode(), repr(settings).encode(), store.weights_key(*modules))


class BackdropForConditionalGeneration(BackdropPreTrainedModel, GenerationMixin):
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

    def get_image_features(self, pixel_values, patch_mask=None, group_kind=None, **kwargs):
        """See `BackdropModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, patch_mask, group_kind, **kwargs)

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
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> BackdropCausalLMOutputWithPast:
        """See `BackdropModel.forward`. `labels [B, L]` with -100 where no loss is taken; logits `[B, L, vocab]`,
        or the last `logits_to_keep` columns (0: all; a tensor: the columns, or a bool mask `[B, L]`)."""
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
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(_keep_columns(outputs.last_hidden_state, logits_to_keep))
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

    def generate(self, *args, logits_processor: LogitsProcessorList | None = None, **kwargs):
        """As transformers' `generate`; separator tokens are never generated."""
        processors = LogitsProcessorList(logits_processor or [])
        if self.config.separator_token_ids is not None:
            # An offloaded model says "meta", where no tensor can be read.
            device = "cpu" if self.device.type == "meta" else self.device
            processors.append(SuppressTokensLogitsProcessor(self.config.separator_token_ids, device=device))
        return super().generate(*args, logits_processor=processors, **kwargs)

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
        **kwargs,
    ):
        """Encodes the images once, at the first step, and feeds the vision tokens that are not cached yet.

        `group_index [G']` (set by beam and multi-sequence expansion) says which group each of the expanded rows'
        groups is, so that no image is encoded twice.
        """
        wants_images = is_first_iteration or not kwargs.get("use_cache", True)
        if wants_images and pixel_values is not None:
            features, keys = self.model._group_features(pixel_values, patch_mask, group_kind)
            index = list(range(len(features))) if group_index is None else group_index.tolist()
            features = [features[i] for i in index]
            if inputs_embeds is None:
                length = input_ids.shape[1]
                seen = length - next_sequence_length if next_sequence_length is not None else 0
                rows = rows_of_groups(input_ids, self.config.image_token_id, [f.shape[0] for f in features])
                wants_all_states = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
                if seen == 0 and not wants_all_states:
                    kinds = [0] * len(keys) if group_kind is None else group_kind.tolist()
                    seen = self._load_prefix(
                        input_ids,
                        attention_mask,
                        kwargs.get("position_ids"),
                        rows,
                        [kinds[i] for i in index],
                        features,
                        [keys[i] for i in index],
                        past_key_values,
                    )
                    next_sequence_length = length - seen if seen else next_sequence_length
                features = _unseen_features(features, rows, input_ids[:, :seen] == self.config.image_token_id)
            image_embeds = torch.cat(features) if features else None
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
        of the columns that were left to compute, the last ones of the prompt among them, and the filled
        `past_key_values`. No gradients. With the cache off nothing is left out.

        Args:
            input_ids: `[B, L]`, padded on the left if at all; the others as in `forward`.

        Returns:
            `input_ids [B, L - c]`, `position_ids [B, L - c]`, `attention_mask [B, L]`, `image_embeds`,
            `past_key_values` with the first c columns, `use_cache`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        position_ids = position_ids.expand(input_ids.shape[0], -1)
        past_key_values, image_embeds, seen = DynamicCache(config=self.config.text_config), None, 0
        if pixel_values is not None:
            features, keys = self.model._group_features(pixel_values, patch_mask, group_kind)
            rows = rows_of_groups(input_ids, self.config.image_token_id, [f.shape[0] for f in features])
            kinds = [0] * len(keys) if group_kind is None else group_kind.tolist()
            seen = self._load_prefix(
                input_ids, attention_mask, position_ids, rows, kinds, features, keys, past_key_values
            )
            features = _unseen_features(features, rows, input_ids[:, :seen] == self.config.image_token_id)
            image_embeds = torch.cat(features) if features else None
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "position_ids": position_ids[:, seen:],
            "image_embeds": image_embeds,
            "past_key_values": past_key_values,
            "use_cache": True,
        }

    def _load_prefix(
        self, input_ids, attention_mask, position_ids, rows, kinds, features, keys, past_key_values
    ) -> int:
        """Fills an empty cache with what is known of the leading backgrounds; how many columns."""
        usable = (
            self.model._memo_is_active()
            and self.background_cache.prefixes
            and not self.config.raster_order
            and isinstance(past_key_values, Cache)
            and past_key_values.get_seq_length() == 0
            and (attention_mask is None or attention_mask.ndim == 2)
            and (position_ids is None or position_ids.ndim == 2)
        )
        if not usable:
            return 0
        separators = self.config.separator_token_ids
        layout = prompt_rows(
            input_ids,
            attention_mask,
            rows,
            kinds,
            [feature.shape[0] for feature in features],
            self.config.image_token_id,
            None if separators is None else separators[1],
        )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        modules = [self.model.language_model]
        if self.config.num_prefusion_layers:
            modules.append(self.model.prefusion)
        return load_background_prefix(
            self.model,
            input_ids,
            position_ids.expand(input_ids.shape[0], -1),
            layout,
            features,
            keys,
            past_key_values,
            self.model.memo_context(*modules),
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Repeats rows for beams or several sequences; their groups follow the rows by index, not by copy."""
        visual_names = ("pixel_values", "patch_mask", "group_kind", "image_embeds")
        visual = {name: model_kwargs.pop(name) for name in visual_names if name in model_kwargs}
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

    def _rows_for_expansion(self, input_ids, pixel_values, patch_mask, batch):
        groups = pixel_values.shape[0]
        if input_ids is not None and input_ids.shape[1] > 0:
            if patch_mask is None:
                tokens = [self.config.num_patches + self.config.extra_tokens_per_group] * groups
            else:
                tokens = self.model.group_tokens(patch_mask)
            return rows_of_groups(input_ids, self.config.image_token_id, tokens)
        if batch == 0 or groups % batch:
            raise ValueError(
                f"With inputs_embeds, {groups} groups cannot be told apart over {batch} rows for beams or several "
                "sequences; pass input_ids."
            )
        return [tuple(range(r * groups // batch, (r + 1) * groups // batch)) for r in range(batch)]


def _check_servable(config: BackdropConfig) -> None:
    """vLLM's Transformers backend builds the model with its own attention; what it cannot run right must not start."""
    if config.text_config._attn_implementation != "vllm":
        return
    if config.num_prefusion_layers:
        raise ValueError(
            f"num_prefusion_layers is {config.num_prefusion_layers}: vLLM gives no attention to layers outside the "
            "language model. Fold them into it: backdrop export MODEL OUT --fold-prefusion"
        )
    if config.raster_order:
        raise ValueError(
            "raster_order is True: tokens of two groups are mixed, but vLLM encodes each group by itself; wanted False."
        )


def _keep_columns(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
        if logits_to_keep.dtype == torch.bool:
            return hidden[logits_to_keep]
        return torch.take_along_dim(hidden, logits_to_keep[..., None], dim=1)
    if isinstance(logits_to_keep, int):
        logits_to_keep = slice(-logits_to_keep, None)
    return hidden[:, logits_to_keep, :]


def _unseen_features(features, rows, seen_placeholders: torch.Tensor) -> list[torch.Tensor]:
    """Per row, its vision tokens without those whose placeholders are cached already (`seen_placeholders [B, c]`)."""
    unseen = []
    for groups, seen in zip(rows, seen_placeholders.sum(-1).tolist(), strict=True):
        for g in groups:
            skip = min(seen, features[g].shape[0])
            seen -= skip
            if skip < features[g].shape[0]:
                unseen.append(features[g][skip:])
    return unseen


__all__ = ["BackdropForConditionalGeneration", "BackdropModel", "BackdropPreTrainedModel"]
