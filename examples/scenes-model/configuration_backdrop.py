"""Configuration of Backdrop, a LLaVA-style model whose image patches come in groups."""

from dataclasses import dataclass

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .model_code_backdrop import save_model_code

# The two group kinds, the values of `group_kind`.
BACKGROUND, OBJECT = 0, 1
# CLS tokens that a tower puts before its patch tokens, by the tower's `model_type`; registers come on top.
TOWER_PREFIX_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
}
# LLaVA-1.5 pads Llama's 32,000 embedding rows so that the placeholder fits.
DEFAULT_TEXT = {"model_type": "llama", "vocab_size": 32064}


@dataclass(frozen=True)
class VisionFeatures:
    """Which of a tower's states become vision tokens.

    Attributes:
        layers: indices into the tower's hidden states, concatenated on the width.
        strategy: "default" drops the CLS token of each group, "full" keeps it.
        extra_tokens: tokens that a group yields beyond its patches (the CLS token, when it is kept).
    """

    layers: tuple[int, ...]
    strategy: str
    extra_tokens: int


class BackdropConfig(PreTrainedConfig):
    """Everything that decides which function the model computes.

    The fields that LLaVA has too have LLaVA's names, so that a converted checkpoint reads the same.

    Fields:
        vision_config, text_config: configurations of the tower (`TOWER_PREFIX_TOKENS`) and of the decoder.
        image_token_id: id of the `<image>` placeholder; each one is replaced by one patch token.
        separator_token_ids: ids of [BG_START], [BG_END], [OBJ_START], [OBJ_END]; None: no separators.
        vision_feature_layer: index into the tower's hidden states (0 = embeddings), or several to concatenate.
        vision_feature_select_strategy: "default" drops each group's CLS token (and registers), "full" keeps them.
        separate_vision_towers: object groups have a tower of their own (started as a copy).
        separate_projectors: object groups have a projector of their own (started as a copy).
        num_prefusion_layers: decoder layers before the language model, over image and text tokens.
        prefusion_rotary: whether those layers see rotary positions.
        masked_attention: tokens of a group attend to their own group alone. False (for ablations): the tower sees the
            group's whole image, its unowned patches black, and the group's tokens are taken from that; groups are
            still independent of each other.
        raster_order: tokens of a background and the objects after it are put back into the order of the grid (LLaVA's
            order; for ablations: what reading backgrounds first changes). No separators, and no prefix to reuse.
        trained_on_groups: False for a converted, not yet finetuned model, which warns once when it splits.

    Raises:
        ValueError: a field has a value that cannot work, or two fields contradict each other.
    """

    model_type = "backdrop"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    separator_token_ids: list[int] | None = None
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: str = "default"
    separate_vision_towers: bool = False
    separate_projectors: bool = False
    num_prefusion_layers: int = 0
    prefusion_rotary: bool = True
    masked_attention: bool = True
    raster_order: bool = False
    trained_on_groups: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _sub_config(self.vision_config, "vision_config", "clip_vision_model")
        self.text_config = _sub_config(self.text_config or DEFAULT_TEXT, "text_config", "llama")
        # LLaVA's configurations keep this switch in the text part.
        if self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True
        super().__post_init__(**kwargs)
        self.check_fields()

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As transformers'; where an `auto_map` names the code, as in an exported folder, the code goes along."""
        auto_map = getattr(self, "auto_map", None)
        if auto_map:
            self.auto_map = save_model_code(save_directory, auto_map)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def check_servable(self) -> None:
        """Refuses what vLLM's Transformers backend, which builds the model with its own attention, cannot run right.

        Raises:
            ValueError: the model is being built for vLLM, and has prefusion layers or raster order.
        """
        if self.text_config._attn_implementation != "vllm":
            return
        if self.num_prefusion_layers:
            raise ValueError(
                f"num_prefusion_layers is {self.num_prefusion_layers}: vLLM gives no attention to layers outside the "
                "language model. Fold them into it: backdrop export MODEL OUT --fold-prefusion"
            )
        if self.raster_order:
            raise ValueError(
                "raster_order is True: tokens of two groups are mixed, but vLLM encodes each group by itself; wanted "
                "False."
            )

    def check_fields(self) -> None:
        """Refuses fields that do not fit each other; called when the configuration is built, and after a field is set.

        Raises:
            ValueError: names the field, its value and what was wanted.
        """
        tower = self.vision_config.model_type
        if tower not in TOWER_PREFIX_TOKENS:
            raise ValueError(
                f"vision_config.model_type is {tower!r}; groups can be encoded apart by {sorted(TOWER_PREFIX_TOKENS)}."
            )
        self.vision_features()
        if self.num_prefusion_layers < 0:
            raise ValueError(f"num_prefusion_layers is {self.num_prefusion_layers}; wanted 0 or more.")
        if self.separator_token_ids is not None and len(self.separator_token_ids) != 4:
            raise ValueError(
                f"separator_token_ids has {len(self.separator_token_ids)} ids; wanted the 4 of "
                "[BG_START], [BG_END], [OBJ_START], [OBJ_END]."
            )
        if self.raster_order and self.separator_token_ids is not None:
            raise ValueError(
                "raster_order is True, but there are separators, which have no place in the grid; wanted a model without "
                "them."
            )
        vocab_size = self.text_config.vocab_size
        for name, token_id in self.special_token_ids.items():
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{name} has the token id {token_id}, but the embedding table has {vocab_size} rows: "
                    "it is too small for its tokenizer. Resize the token embeddings and save the model again."
                )

    def vision_features(
        self,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> VisionFeatures:
        """The model's own choice of features, or, as LLaVA's `forward` takes it, that of one call.

        Args:
            vision_feature_layer, vision_feature_select_strategy: None: as in this configuration.

        Raises:
            ValueError: names the field, its value and what was wanted.
        """
        tower, depth = self.vision_config.model_type, self.vision_config.num_hidden_layers
        layer = self.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        layers = (layer,) if isinstance(layer, int) else tuple(layer)
        strategy = vision_feature_select_strategy or self.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy is {strategy!r}; wanted 'default' or 'full'.")
        if strategy == "default" and tower_prefix_tokens(self.vision_config) == 0:
            raise ValueError(
                f"vision_feature_select_strategy='default' drops the CLS token, which {tower!r} does not have; "
                "wanted 'full'."
            )
        for index in layers:
            if not -depth - 1 <= index <= depth:
                raise ValueError(f"vision_feature_layer is {index}; the tower has {depth} layers.")
        if len(layers) != len(self.feature_layers):
            raise ValueError(
                f"vision_feature_layer is {list(layers)}; wanted {len(self.feature_layers)}, as many as the model's "
                "projector takes."
            )
        extra_tokens = tower_prefix_tokens(self.vision_config) if strategy == "full" else 0
        if self.raster_order and extra_tokens:
            raise ValueError(
                "raster_order is True, but the CLS token, which has no place in the grid, is kept; wanted "
                "vision_feature_select_strategy 'default'."
            )
        return VisionFeatures(layers, strategy, extra_tokens)

    @property
    def feature_layers(self) -> list[int]:
        """`vision_feature_layer` as a list."""
        layers = self.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Placeholder and separators by name."""
        names = ("[BG_START]", "[BG_END]", "[OBJ_START]", "[OBJ_END]")
        return {
            "<image>": self.image_token_id,
            **dict(zip(names, self.separator_token_ids or (), strict=False)),
        }

    @property
    def num_patches(self) -> int:
        """P: patches in the tower's grid."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def extra_tokens_per_group(self) -> int:
        """Tokens that a group yields beyond its patches (the CLS token, when it is kept)."""
        return self.vision_features().extra_tokens


def tower_prefix_tokens(vision_config: PreTrainedConfig) -> int:
    """C: tokens that a tower puts before its patch tokens, CLS and registers; "default" drops them all.

    Raises:
        KeyError: groups cannot be encoded apart by a tower of this type.
    """
    return TOWER_PREFIX_TOKENS[vision_config.model_type] + getattr(vision_config, "num_register_tokens", 0)


def _sub_config(value: dict | PreTrainedConfig | None, name: str, default_type: str) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    values = dict(value or {})
    model_type = values.pop("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{name}.model_type is {model_type!r}; wanted a model type that transformers knows.")
    return CONFIG_MAPPING[model_type](**values)


__all__ = ["BackdropConfig"]
