"""A new model from a vision tower and a language model that never met: between them a new projector.

It sees nothing before its projector is trained (`backdrop train --config align`), and reads groups only after a finetune.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from backdrop.modeling.configuration_backdrop import BackdropConfig, tower_prefix_tokens
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.detector_choice_backdrop import load_detector
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.processing_backdrop import BackdropProcessor

from .convert import complete, image_options, new_template
from .parts import (
    join,
    language_config_of,
    load_language_model,
    load_tokenizer,
    load_tower,
    probe,
    tower_config_of,
)
from .weights import check_names

# What DINOv3's positions are moved by in training, at random: a group and its reuse must see the same positions.
MOVED_POSITIONS = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")


def build(
    vision: str | Path,
    language: str | Path,
    *,
    image_side: int | None = None,
    vision_feature_layer: int | list[int] = -2,
    separators: bool = True,
    detector: str | None = None,
    seed: int = 0,
    weights: bool = True,
    **hub_kwargs: Any,
) -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    """Model and processor of two parts, folders or Hub ids.

    Args:
        vision: a tower of one fixed resolution (CLIP, SigLIP, SigLIP 2, DINOv2, DINOv3 ViT), or an image-text pair with one.
        language: any decoder that AutoModelForCausalLM loads; its chat template is kept, with images placed in it.
        image_side: pixels; None: what the tower's own image processor gives. DINOv2 and DINOv3 take any multiple of
            their patch size.
        vision_feature_layer: which of the tower's hidden states the projector reads, -2 as in LLaVA.
        separators: add the four separator tokens, started from the mean of the words that describe them.
        detector: see `convert`.
        seed: of the new projector.
        weights: False makes the model on the meta device, from configurations and tokenizer alone: for a dry run.
        hub_kwargs: `token`, `cache_dir`, ...

    Raises:
        ValueError: a tower that cannot be encoded by groups, a decoder whose head or layers do more than decoders do,
            weights that are missing or left over: named.
    """
    vision_config = tower_config_of(vision, hub_kwargs)
    strategy = "default" if _prefix_tokens(vision_config) else "full"
    fields = {"vision_feature_layer": vision_feature_layer, "vision_feature_select_strategy": strategy}
    tokenizer = load_tokenizer(language, hub_kwargs)
    options = image_options(vision, hub_kwargs)
    if image_side is not None:
        options |= _sized(options, image_side)
    side = BackdropImageProcessor(patch_size=vision_config.patch_size, **options).image_side
    if weights:
        model = _with_weights(vision, language, side, seed, fields, hub_kwargs)
    else:
        language_config = language_config_of(language, hub_kwargs)
        fit_tower(vision_config, None, side)
        config = BackdropConfig(
            vision_config=vision_config, text_config=language_config, image_token_id=0, **fields
        )
        with torch.device("meta"):
            model = BackdropForConditionalGeneration._from_config(config, dtype=language_config.dtype)
        model.generation_config = GenerationConfig.from_model_config(language_config)
    image_processor = BackdropImageProcessor(patch_size=vision_config.patch_size, **options)
    source_template = tokenizer.chat_template
    if isinstance(source_template, dict):
        source_template = source_template.get("default")
    template = new_template(source_template, tokenizer)
    processor = complete(model, tokenizer, image_processor, template=template, separators=separators)
    if detector is not None:
        processor.image_processor.set_detector(load_detector(detector))
    return model, processor


def save_outline(
    model: BackdropForConditionalGeneration, processor: BackdropProcessor, folder: str | Path
) -> list[str]:
    """Writes what a dry run reads of a model: configuration and processor, no weights; the files' names."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; wanted a new folder.")
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sorted(path.name for path in folder.iterdir())


def fit_tower(config: PreTrainedConfig, tower: PreTrainedModel | None, side: int) -> None:
    """Makes a tower one of this resolution, where it was made for several.

    Rotary positions have no size. A table that the tower interpolates for other sizes is interpolated once, by the
    tower's own function, so that it computes what it computed for such images before.

    Args:
        config: the tower's; its `image_size` is changed.
        tower: its position table is replaced; None: there are no weights.
        side: of the images, pixels.

    Raises:
        ValueError: the tower has one resolution, and it is another.
    """
    if side == config.image_size:
        return
    rotary, table = (
        config.model_type == "dinov3_vit",
        config.model_type in ("dinov2", "dinov2_with_registers"),
    )
    if not rotary and not table:
        raise ValueError(
            f"Images would be {side} x {side}, but a {config.model_type!r} tower has one resolution, "
            f"{config.image_size}; wanted images of that side."
        )
    if side < config.patch_size:
        raise ValueError(f"image_side is {side}; wanted at least one patch, {config.patch_size} pixels.")
    if table and tower is not None:
        embeddings = tower.embeddings
        old = embeddings.position_embeddings  # [1, 1 + P, D]
        with torch.no_grad():
            like = old.new_zeros(1, 1 + (side // config.patch_size) ** 2, old.shape[-1])
            new = embeddings.interpolate_pos_encoding(like, side, side)
        embeddings.position_embeddings = nn.Parameter(new.to(old.dtype).contiguous())
    config.image_size = side


def _with_weights(
    vision: str | Path,
    language: str | Path,
    side: int,
    seed: int,
    fields: dict[str, Any],
    hub_kwargs: dict[str, Any],
) -> BackdropForConditionalGeneration:
    part = load_language_model(language, hub_kwargs)
    check_names(f"the language model of {str(language)!r}", (), part.left_over)
    tower = load_tower(vision, hub_kwargs, part.model.dtype)
    for name in MOVED_POSITIONS:
        if hasattr(tower.config, name):
            setattr(tower.config, name, None)
    fit_tower(tower.config, tower, side)
    vocab_size = part.model.config.vocab_size
    before = probe(part.model, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = join(tower, part.model, None, **fields)
    if not torch.equal(probe(model, vocab_size), before):
        raise ValueError(
            f"{part.model.config.model_type!r} models compute more than their embeddings, layers and head (logits that are "
            "scaled or capped, embeddings for each layer); wanted a decoder like Llama, Qwen, Mistral or Gemma 3."
        )
    return model


def _prefix_tokens(vision_config: PreTrainedConfig) -> int:
    try:
        return tower_prefix_tokens(vision_config)
    except KeyError:
        BackdropConfig(vision_config=vision_config)  # refuses it by name
        raise


def _sized(options: dict[str, Any], side: int) -> dict[str, Any]:
    """Options of image steps that end in another size."""
    square = {"height": side, "width": side}
    if not options.get("do_center_crop"):
        return {"size": square}
    return {"size": {"shortest_edge": side}, "crop_size": square}
