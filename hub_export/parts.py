"""A model from parts that were trained apart: a vision tower, a projector, a language model.

The parts' modules become the model's own: there is one copy of the weights, in the language model's dtype.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration, BackdropProjector

from .weights import check_names, quiet_loading

# What a checkpoint of an image-text pair holds beside its vision tower.
TEXT_HALF = re.compile(r"(text_model|text_projection|visual_projection|logit_scale|logit_bias)\b.*")
PROBE_LENGTH = 6


@dataclass
class Part:
    """A loaded model, and the names in its checkpoint that are none of its own."""

    model: PreTrainedModel
    left_over: list[str] = field(default_factory=list)


@dataclass
class LlavaParts:
    """What a LLaVA is made of, and where its processor's parts are.

    Attributes:
        tower, language_model: with their weights, of one dtype.
        projector: weights by `BackdropProjector`'s names.
        tower_source: checkpoint that holds the image processor's configuration.
        tokenizer: the language model's.
        pad: images are padded to squares, not cropped.
        layer, strategy: `vision_feature_layer` and `vision_feature_select_strategy`.
    """

    tower: PreTrainedModel
    language_model: PreTrainedModel
    projector: dict[str, torch.Tensor]
    tower_source: str | Path
    tokenizer: PreTrainedTokenizerBase
    pad: bool = True
    layer: int = -2
    strategy: str = "default"


def tower_config_of(source: str | Path, hub_kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """Configuration of the vision tower that a checkpoint is, or holds (CLIP, SigLIP).

    Raises:
        ValueError: a model type that transformers does not know.
    """
    values = PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0]
    config = _known_config(source, values)
    return getattr(config, "vision_config", None) or config


def load_tower(
    source: str | Path,
    hub_kwargs: Mapping[str, Any],
    dtype: torch.dtype | str = "auto",
    state: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """A vision tower with its weights.

    Args:
        source: folder or Hub id of a tower, or of an image-text pair whose tower is taken.
        hub_kwargs: `revision`, `token`, ...
        dtype: of its weights; "auto": as they are stored.
        state: the tower's weights in their published layout, instead of the source's.

    Raises:
        ValueError: weights are missing or left over, named; or groups cannot be encoded apart by such a tower.
    """
    config = tower_config_of(source, hub_kwargs)
    BackdropConfig(
        vision_config=config, vision_feature_select_strategy="full"
    )  # refuses towers that cannot be used
    weights: dict[str, Any] = {"pretrained_model_name_or_path": source, **hub_kwargs}
    if state is not None:
        weights = {"pretrained_model_name_or_path": None, "state_dict": dict(state)}
    with quiet_loading():
        model, info = MODEL_MAPPING[type(config)].from_pretrained(
            config=config, dtype=dtype, output_loading_info=True, **weights
        )
    left_over = [name for name in info["unexpected_keys"] if not TEXT_HALF.match(name)]
    check_names(f"the tower of {str(source)!r}", info["missing_keys"], left_over)
    return model


def load_language_model(
    source: str | Path,
    hub_kwargs: Mapping[str, Any],
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype | str = "auto",
) -> Part:
    """A decoder with its head and its weights, streamed from the shards into one copy.

    Args:
        source: folder or Hub id.
        hub_kwargs: `revision`, `token`, ...
        config: the decoder's, where the source's own says something else; None: the source's.
        dtype: of its weights; "auto": as they are stored.

    Raises:
        ValueError: no decoder, or weights are missing, named. What is left over is the caller's to judge.
    """
    if config is None:
        config = language_config_of(source, hub_kwargs)
    with quiet_loading():
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, **hub_kwargs
        )
    check_names(f"the language model of {str(source)!r}", info["missing_keys"], ())
    return Part(model, sorted(info["unexpected_keys"]))


def language_config_of(source: str | Path, hub_kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """Configuration of the decoder that a checkpoint is.

    Raises:
        ValueError: transformers knows no causal language model of this type, or the model sees or hears.
    """
    config = _known_config(source, PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0])
    other = [name for name in ("vision_config", "audio_config") if getattr(config, name, None) is not None]
    if other or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = f" with a {other[0]}" if other else ""
        raise ValueError(
            f"{str(source)!r} is a {config.model_type!r} model{reason}; wanted a language model that reads text alone "
            "(AutoModelForCausalLM)."
        )
    return config


def load_tokenizer(source: str | Path, hub_kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The language model's tokenizer, padding on the left; one without a padding token pads with its last one."""
    tokenizer = AutoTokenizer.from_pretrained(source, **hub_kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def join(
    tower: PreTrainedModel,
    language_model: PreTrainedModel,
    projector: Mapping[str, torch.Tensor] | None,
    **fields: Any,
) -> BackdropForConditionalGeneration:
    """The model of these parts; their modules are its own from now on.

    Args:
        tower: its dtype is the language model's.
        language_model: a decoder with its head.
        projector: weights by `BackdropProjector`'s names; None: a new one.
        fields: of `BackdropConfig`, such as `vision_feature_layer`.

    Raises:
        ValueError: the decoder keeps its parts elsewhere than decoders do, or its head does more than multiply.
    """
    config = BackdropConfig(
        vision_config=tower.config, text_config=language_model.config, image_token_id=0, **fields
    )
    check_decoder(language_model)
    head = language_model.get_output_embeddings()
    with torch.device("meta"):
        model = BackdropForConditionalGeneration._from_config(config, dtype=language_model.dtype)
    inside = BackdropProjector(config)
    if projector is None:
        for module in inside.modules():
            model._init_weights(module)
    else:
        names = inside.state_dict().keys()
        check_names("the projector", names - projector.keys(), projector.keys() - names)
        inside.load_state_dict(projector)
    model.model.vision_tower = tower
    model.model.language_model = language_model.base_model
    model.model.multi_modal_projector = inside.to(language_model.dtype)
    model.lm_head = head
    model.tie_weights()
    model.generation_config = language_model.generation_config
    return model.eval()


def check_decoder(language_model: PreTrainedModel) -> None:
    """Refuses a decoder that is not a table of embeddings, layers and a linear head.

    Raises:
        ValueError: says what it has instead.
    """
    name, head = language_model.config.model_type, language_model.get_output_embeddings()
    body = language_model.base_model
    if not isinstance(getattr(body, "embed_tokens", None), nn.Embedding):
        raise ValueError(
            f"{name!r} models keep no embedding table as embed_tokens; wanted a decoder like Llama, Qwen or Gemma."
        )
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"the head of {name!r} models has a bias, or is no linear layer; wanted one without."
        )
    if MODEL_MAPPING.get(type(language_model.config), None) is not type(body):
        raise ValueError(
            f"AutoModel gives no {type(body).__name__} for {name!r}; wanted a decoder that it builds."
        )


@torch.no_grad()
def probe(language_model: nn.Module, vocab_size: int) -> torch.Tensor:
    """Logits `[1, 6, vocab]` of a few tokens: computed before and after `join`, they tell whether it kept the function.

    Decoders that scale or cap their logits in the head's class, or read more than embeddings, do not stay the same.
    """
    ids = torch.linspace(1, vocab_size - 1, PROBE_LENGTH).long()[None]
    return language_model.eval()(input_ids=ids.to(language_model.device), use_cache=False).logits


def _known_config(source: str | Path, values: Mapping[str, Any]) -> PreTrainedConfig:
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{str(source)!r} is of model type {model_type!r}; wanted one that transformers knows."
        )
    return CONFIG_MAPPING[model_type].from_dict(dict(values))
