"""LLaVA checkpoints to Backdrop: names mapped, nothing missing, nothing left over, nothing random."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.processing_utils import ImagesKwargs

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.modeling.prefusion_backdrop import BackdropPrefusion
from backdrop.processing.detector_backdrop import ObjectDetector
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.processing_backdrop import IMAGE_TOKEN, SEPARATOR_TOKENS, BackdropProcessor

# LLaVA's parameter names, in the layout before transformers 4.52 and in the ones since.
KEY_MAPPING = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
    r"^vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^vision_tower\.(?!vision_model\.)": "model.vision_tower.",
}
# Prompt of the Vicuna models that LLaVA-1.5 is built on (vicuna_v1 in LLaVA's conversation.py).
VICUNA_SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# The words whose mean embedding a separator starts from.
SEPARATOR_WORDS = {
    "[BG_START]": "start of the background",
    "[BG_END]": "end of the background",
    "[OBJ_START]": "start of the objects",
    "[OBJ_END]": "end of the objects",
}


_IMAGES_FIRST = (
    "{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{%- for image in images %}{{- '<image>' }}{%- endfor %}"
    "{%- if images %}{{- '\\n' }}{%- endif %}"
    "{{- text_of(message) }}"
)
_IMAGES_IN_PLACE = (
    "{%- for part in message['content'] %}"
    "{%- if not loop.first and (part['type'] == 'image') != (loop.previtem['type'] == 'image') %}{{- '\\n' }}{%- endif %}"
    "{%- if part['type'] == 'image' %}{{- '<image>' }}{%- else %}{{- part['text'] }}{%- endif %}"
    "{%- endfor %}"
)


def chat_template(system_prompt: str = VICUNA_SYSTEM_PROMPT, images_first: bool = True) -> str:
    """LLaVA-1.5's prompt as a Jinja template with BOS and `{% generation %}` marks around answers.

    `<bos>SYSTEM USER: <image>\\nquestion ASSISTANT: answer</s>USER: ...`; the answer's marks include its EOS. Images
    stand together before the text, or, with `images_first` False, where the message has them, on a line of their own.
    """
    default = system_prompt.replace("\\", "\\\\").replace("'", "\\'")
    return (
        "{{- bos_token }}"
        "{%- set ns = namespace(system='" + default + "') %}"
        "{%- macro text_of(message) -%}"
        "{%- if message['content'] is string -%}{{ message['content'] }}"
        "{%- else -%}{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}"
        "{%- for message in messages if message['role'] == 'system' %}"
        "{%- set ns.system = text_of(message) %}{%- endfor %}"
        "{%- if ns.system %}{{- ns.system + ' ' }}{%- endif %}"
        "{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}"
        "{{- 'USER: ' }}"
        "{%- if message['content'] is string %}{{- message['content'] }}"
        "{%- else %}" + (_IMAGES_FIRST if images_first else _IMAGES_IN_PLACE) + "{%- endif %}"
        "{{- ' ' }}"
        "{%- elif message['role'] == 'assistant' %}"
        "{{- 'ASSISTANT:' }}"
        "{%- generation %}{{- ' ' + text_of(message) + eos_token }}{%- endgeneration %}"
        "{%- endif %}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
    )


def convert(
    source: str | Path,
    *,
    separators: bool = True,
    num_prefusion_layers: int = 0,
    prefusion_rotary: bool = True,
    separate_vision_towers: bool = False,
    separate_projectors: bool = False,
    detector: str | None = None,
    system_prompt: str = VICUNA_SYSTEM_PROMPT,
    **hub_kwargs,
) -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    """Backdrop model and processor from a `LlavaForConditionalGeneration` folder or Hub id.

    Args:
        source: safetensors in any number of shards, old or new key layout; one copy of the weights is held.
        separators: add the four separator tokens, started from the mean of the words that describe them.
        num_prefusion_layers, prefusion_rotary, separate_vision_towers, separate_projectors: see `extend_model`.
        detector: name or path of an ultralytics model whose weights the folder will hold; None: no detector.
        hub_kwargs: `revision`, `token`, `cache_dir`, ...

    Raises:
        ValueError: not a fixed-resolution LLaVA, or weights missing or left over (named).
    """
    source_config = AutoConfig.from_pretrained(source, **hub_kwargs)
    if source_config.model_type != "llava":
        raise ValueError(
            f"{str(source)!r} is a {source_config.model_type!r} model; wanted 'llava' (LlavaForConditionalGeneration "
            "with a tower of one fixed resolution)."
        )
    config = BackdropConfig(
        vision_config=source_config.vision_config,
        text_config=source_config.text_config,
        image_token_id=source_config.image_token_id,
        projector_hidden_act=source_config.projector_hidden_act,
        multimodal_projector_bias=source_config.multimodal_projector_bias,
        vision_feature_layer=source_config.vision_feature_layer,
        vision_feature_select_strategy=source_config.vision_feature_select_strategy,
        tie_word_embeddings=source_config.tie_word_embeddings,
    )
    model = BackdropForConditionalGeneration.from_pretrained(
        source, config=config, key_mapping=KEY_MAPPING, dtype="auto", **hub_kwargs
    )
    model.generation_config = _generation_config(source, model, hub_kwargs)
    tokenizer = AutoTokenizer.from_pretrained(source, **hub_kwargs)
    prepare_tokens(model, tokenizer, separators)
    extend_model(
        model,
        num_prefusion_layers=num_prefusion_layers,
        prefusion_rotary=prefusion_rotary,
        separate_vision_towers=separate_vision_towers,
        separate_projectors=separate_projectors,
    )
    image_processor = _image_processor(source, config, hub_kwargs)
    processor = BackdropProcessor(
        image_processor,
        tokenizer,
        use_separators=separators,
        extra_tokens_per_group=config.extra_tokens_per_group,
        chat_template=chat_template(system_prompt),
    )
    if detector is not None:
        image_processor.set_detector(ObjectDetector.from_name_or_path(detector))
    return model, processor


@torch.no_grad()
def prepare_tokens(
    model: BackdropForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    separators: bool = True,
    meaning: bool = True,
) -> None:
    """Adds placeholder and separators to the tokenizer, gives them rows, and tells the model's configuration.

    Rows are added only where the table has none left, so that LLaVA-1.5 (32,064 rows for 32,002 tokens) stays bit
    for bit what it was. Separators start as the mean of the words that describe them (`SEPARATOR_WORDS`), or, with
    `meaning` False, at random with the table's own spread.
    """
    BackdropProcessor.add_tokens(tokenizer, separators)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = model.config
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config.separator_token_ids = (
        tokenizer.convert_tokens_to_ids(list(SEPARATOR_TOKENS)) if separators else None
    )
    tables = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    if len(tokenizer) > rows and config.image_token_id >= rows:
        for table in tables.values():
            table[config.image_token_id] = 0
    for token, token_id in zip(SEPARATOR_TOKENS, config.separator_token_ids or (), strict=False):
        words = tokenizer(SEPARATOR_WORDS[token], add_special_tokens=False).input_ids
        for table in tables.values():
            start = (
                table[words].mean(0) if meaning else torch.randn_like(table[token_id]) * table[words].std()
            )
            table[token_id] = start
    config._check()


@torch.no_grad()
def extend_model(
    model: BackdropForConditionalGeneration,
    *,
    num_prefusion_layers: int = 0,
    prefusion_rotary: bool = True,
    separate_vision_towers: bool = False,
    separate_projectors: bool = False,
) -> None:
    """Gives a model the parts it does not have yet; what it computes stays the same until they are trained.

    Prefusion layers start as the identity, a tower or projector for objects as a copy of the background's.
    """
    config, base = model.config, model.model
    if num_prefusion_layers and not config.num_prefusion_layers:
        with torch.device(base.language_model.device):
            prefusion = BackdropPrefusion(base.language_model, num_prefusion_layers, prefusion_rotary)
        for module in prefusion.modules():
            model._init_weights(module)
        base.prefusion = prefusion.to(base.language_model.dtype)
        config.num_prefusion_layers, config.prefusion_rotary = num_prefusion_layers, prefusion_rotary
    elif num_prefusion_layers != config.num_prefusion_layers and num_prefusion_layers:
        raise ValueError(
            f"num_prefusion_layers is {num_prefusion_layers}, but the model has {config.num_prefusion_layers} already."
        )
    if separate_vision_towers and not config.separate_vision_towers:
        base.object_vision_tower = copy.deepcopy(base.vision_tower)
        config.separate_vision_towers = True
    if separate_projectors and not config.separate_projectors:
        base.object_multi_modal_projector = copy.deepcopy(base.multi_modal_projector)
        config.separate_projectors = True


def fold_prefusion(model: BackdropForConditionalGeneration) -> None:
    """Makes the prefusion layers the first layers of the language model.

    Prefusion runs over the whole sequence, causally, in front of the language model: as its first layers it computes the
    same, and serving engines, which know nothing of it, see a plain decoder. There is no way back.

    Raises:
        ValueError: prefusion without positions, which decoder layers always have.
    """
    config, base = model.config, model.model
    if not config.num_prefusion_layers:
        return
    if not config.prefusion_rotary:
        raise ValueError(
            "prefusion_rotary is False: these prefusion layers see no positions and cannot become layers of the language "
            "model, which do."
        )
    added = config.num_prefusion_layers
    layers = nn.ModuleList([*base.prefusion.layers, *base.language_model.layers])
    for i, layer in enumerate(layers):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = i
    base.language_model.layers = layers
    del base.prefusion
    # The language model holds the same configuration or a copy of it.
    for text_config in {id(c): c for c in (config.text_config, base.language_model.config)}.values():
        if getattr(text_config, "layer_types", None) is not None:
            text_config.layer_types = ["full_attention"] * added + list(text_config.layer_types)
        text_config.num_hidden_layers = len(layers)
    config.num_prefusion_layers = 0


def _generation_config(source, model, hub_kwargs) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source, **hub_kwargs)
    except OSError:
        return GenerationConfig.from_model_config(model.config)


def _image_processor(source, config: BackdropConfig, hub_kwargs) -> BackdropImageProcessor:
    """LLaVA's own image steps, read from its processor's attributes, so that class defaults count too."""
    found = AutoImageProcessor.from_pretrained(source, backend="pil", **hub_kwargs)
    names = [
        name for name in ImagesKwargs.__annotations__ if name in vars(found) and name != "input_data_format"
    ]
    options = {name: getattr(found, name) for name in names}
    # None means "no" in transformers' classes; here it would mean our default.
    for name in ("do_resize", "do_center_crop", "do_pad", "do_rescale", "do_normalize"):
        options[name] = bool(options.get(name))
    processor = BackdropImageProcessor(patch_size=config.vision_config.patch_size, **options)
    side = processor.image_side
    if side != config.vision_config.image_size:
        raise ValueError(
            f"The image processor of {str(source)!r} gives {side} x {side} images, but its tower takes "
            f"{config.vision_config.image_size} x {config.vision_config.image_size}; wanted one fixed resolution."
        )
    return processor
