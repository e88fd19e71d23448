"""LLaVA checkpoints of every layout to Backdrop: names mapped, nothing missing, nothing left over, nothing random."""

import logging
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.processing_utils import ImagesKwargs, ProcessorMixin

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.detector_choice_backdrop import load_detector
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.processing_backdrop import BackdropProcessor

from .chat_template import VICUNA_SYSTEM_PROMPT, chat_template
from .checkpoint import tower_config
from .extend import extend_model
from .model_folder import check_not_quantised
from .original_llava import is_original, load_original
from .parts import LlavaParts, join
from .source_template import is_vicuna, keep_template
from .tokens import prepare_tokens
from .weights import of_other_repositories
from .xtuner import is_xtuner, load_xtuner

logger = logging.getLogger(__name__)
# LLaVA's parameter names, in the layout before transformers 4.52 and in the ones since.
KEY_MAPPING = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
    r"^vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^vision_tower\.(?!vision_model\.)": "model.vision_tower.",
}


def convert(
    source: str | Path,
    *,
    base: str | Path | None = None,
    tower: str | Path | None = None,
    separators: bool = True,
    num_prefusion_layers: int = 0,
    prefusion_rotary: bool = True,
    separate_vision_towers: bool = False,
    separate_projectors: bool = False,
    detector: str | None = None,
    fit: str | None = None,
    template: str | None = None,
    system_prompt: str | None = None,
    **hub_kwargs: Any,
) -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    """Backdrop model and processor from a LLaVA: transformers' (`LlavaForConditionalGeneration`), the original's, XTuner's.

    Args:
        source: folder or Hub id, in any number of shards and any key layout; one copy of the weights is held.
        base: the language model that an adapter or a lone projector of the original layout was trained on.
        tower: vision tower, instead of the one that a checkpoint of the original layout names.
        separators: add the four separator tokens, started from the mean of the words that describe them.
        num_prefusion_layers, prefusion_rotary, separate_vision_towers, separate_projectors: see `extend_model`.
        detector: see `load_detector`; the folder will hold its weights. None: no detector.
        fit: what becomes of images that are not square, "crop", "pad" or "stretch"; None: what the checkpoint does.
        template: Jinja text of a chat template to use in place of the source's own; see `keep_template`.
        system_prompt: the system message of conversations without one; None: that of the template.
        hub_kwargs: `revision`, `token`, `cache_dir`, ...

    Raises:
        ValueError: not a fixed-resolution LLaVA, weights missing or left over (named), or a chat template that cannot be used.
    """
    parts = None
    if is_xtuner(source, hub_kwargs):
        parts = load_xtuner(source, base, tower, hub_kwargs)
    elif is_original(values := PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0]):
        parts = load_original(source, values, base, tower, hub_kwargs)
    elif base is not None or tower is not None:
        raise ValueError(
            f"{str(source)!r} is of model type {values.get('model_type')!r}; base and tower are for checkpoints of the "
            "original LLaVA's layout or XTuner's."
        )
    if parts is None:
        model, tokenizer, image_processor = _from_transformers(source, hub_kwargs)
    else:
        model, tokenizer, image_processor = _from_parts(parts, hub_kwargs)
    if template is None:
        template = _source_template(source, tokenizer, hub_kwargs)
    processor = complete(
        model,
        tokenizer,
        image_processor,
        template=new_template(template, tokenizer, system_prompt),
        separators=separators,
        num_prefusion_layers=num_prefusion_layers,
        prefusion_rotary=prefusion_rotary,
        separate_vision_towers=separate_vision_towers,
        separate_projectors=separate_projectors,
    )
    if fit is not None:
        processor.image_processor.fit = fit
    if detector is not None:
        processor.image_processor.set_detector(load_detector(detector))
    return model, processor


def _from_transformers(
    source: str | Path, hub_kwargs: dict[str, Any]
) -> tuple[BackdropForConditionalGeneration, PreTrainedTokenizerBase, BackdropImageProcessor]:
    source_config = AutoConfig.from_pretrained(source, **hub_kwargs)
    if source_config.model_type != "llava":
        raise ValueError(
            f"{str(source)!r} is a {source_config.model_type!r} model; wanted 'llava' (LlavaForConditionalGeneration "
            "with a tower of one fixed resolution)."
        )
    check_not_quantised(str(source), source_config.to_dict())
    config = _backdrop_config(source_config)
    model = BackdropForConditionalGeneration.from_pretrained(
        source, config=config, key_mapping=KEY_MAPPING, dtype="auto", **hub_kwargs
    )
    model.generation_config = _generation_config(source, model, hub_kwargs)
    tokenizer = AutoTokenizer.from_pretrained(source, **hub_kwargs)
    return model, tokenizer, image_processor_of(source, config, hub_kwargs)


def _from_parts(
    parts: LlavaParts, hub_kwargs: dict[str, Any]
) -> tuple[BackdropForConditionalGeneration, PreTrainedTokenizerBase, BackdropImageProcessor]:
    model = join(
        parts.tower,
        parts.language_model,
        parts.projector,
        vision_feature_layer=parts.layer,
        vision_feature_select_strategy=parts.strategy,
    )
    hub = of_other_repositories(hub_kwargs)
    image_processor = image_processor_of(parts.tower_source, model.config, hub, do_pad=parts.pad)
    return model, parts.tokenizer, image_processor


def complete(
    model: BackdropForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: BackdropImageProcessor,
    *,
    template: str,
    separators: bool = True,
    **parts: Any,
) -> BackdropProcessor:
    """Gives a model what every new one gets, wherever its weights came from; the processor that fits it.

    Args:
        tokenizer: the language model's; the placeholder and the separators are added to it.
        template: the chat template, Jinja.
        separators: see `convert`.
        parts: see `extend_model`.
    """
    prepare_tokens(model, tokenizer, separators)
    extend_model(model, **parts)
    return BackdropProcessor(
        image_processor,
        tokenizer,
        use_separators=separators,
        extra_tokens_per_group=model.config.extra_tokens_per_group,
        chat_template=template,
    )


def new_template(
    source: str | None, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None
) -> str:
    """The chat template of a new model: its source's own, or LLaVA-1.5's where that has none or writes LLaVA-1.5's turns.

    Warns where the template marks no answers, which assistant-only loss needs.

    Args:
        source: Jinja text; None: there is none.
        tokenizer: the source's.
        system_prompt: see `convert`.
    """
    if source is None or is_vicuna(source, tokenizer):
        return chat_template(VICUNA_SYSTEM_PROMPT if system_prompt is None else system_prompt)
    kept = keep_template(source, tokenizer, system_prompt)
    if not kept.marked:
        logger.warning(
            "The chat template ends answers in no token that could be found, so they are not marked: assistant_only_loss is "
            "off for this model. Train on prompt/completion rows, or give a template with {% generation %} marks."
        )
    return kept.text


def _source_template(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, hub_kwargs: dict[str, Any]
) -> str | None:
    """The template that a checkpoint comes with: its processor's, else its tokenizer's; of several, the default one."""
    try:
        found = ProcessorMixin.get_processor_dict(source, **hub_kwargs)[0].get("chat_template")
    except OSError:
        found = None
    found = found or tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def _backdrop_config(llava: LlavaConfig) -> BackdropConfig:
    if getattr(llava.vision_config, "num_register_tokens", 0):
        raise ValueError(
            f"vision_config.num_register_tokens is {llava.vision_config.num_register_tokens}: LLaVA gives registers to its "
            "language model as if they were patches; wanted a tower without them."
        )
    return BackdropConfig(
        vision_config=llava.vision_config,
        text_config=llava.text_config,
        image_token_id=llava.image_token_id,
        projector_hidden_act=llava.projector_hidden_act,
        multimodal_projector_bias=llava.multimodal_projector_bias,
        vision_feature_layer=llava.vision_feature_layer,
        vision_feature_select_strategy=llava.vision_feature_select_strategy,
        tie_word_embeddings=llava.tie_word_embeddings,
    )


def _generation_config(
    source: str | Path, model: BackdropForConditionalGeneration, hub_kwargs: dict[str, Any]
) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source, **hub_kwargs)
    except OSError:
        return GenerationConfig.from_model_config(model.config)


def image_processor_of(
    source: str | Path, config: BackdropConfig, hub_kwargs: dict[str, Any], **changes: Any
) -> BackdropImageProcessor:
    """The image processor of a checkpoint's own image steps.

    Args:
        source: folder or Hub id.
        config: of the model whose tower takes the images.
        hub_kwargs: `revision`, `token`, ...
        changes: of the checkpoint's own options.

    Raises:
        ValueError: they end in another size than the tower takes.
    """
    options = image_options(source, hub_kwargs) | changes
    tower = tower_config(config)
    processor = BackdropImageProcessor(patch_size=tower.patch_size, **options)
    side = processor.image_side
    if side != tower.image_size:
        raise ValueError(
            f"The image processor of {str(source)!r} gives {side} x {side} images, but its tower takes "
            f"{tower.image_size} x {tower.image_size}; wanted one fixed resolution."
        )
    return processor


def image_options(source: str | Path, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's own image steps, read from its processor's attributes, so that class defaults count too."""
    try:
        found = AutoImageProcessor.from_pretrained(source, backend="pil", **hub_kwargs)
    except ValueError:  # DINOv3's has no such backend; its options are the same
        found = AutoImageProcessor.from_pretrained(source, **hub_kwargs)
    names = [
        name for name in ImagesKwargs.__annotations__ if name in vars(found) and name != "input_data_format"
    ]
    options = {name: getattr(found, name) for name in names}
    # None means "no" in transformers' classes; here it would mean our default.
    for name in ("do_resize", "do_center_crop", "do_pad", "do_rescale", "do_normalize"):
        options[name] = bool(options.get(name))
    return options
