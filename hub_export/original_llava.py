"""Checkpoints in the layout of LLaVA's own repository and of those that share it (BakLLaVA, LLaVA++, XTuner).

The language model and the projector are one checkpoint (`model.mm_projector.*`); the tower is another, which the
configuration names (`mm_vision_tower`), or lies beside them (`model.vision_tower.vision_tower.*`). Training with LoRA
left an adapter and `non_lora_trainables.bin`, pre-alignment a projector alone (`mm_projector.bin`); both need the language
model that they were trained on.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from .parts import LlavaParts, Part, load_language_model, load_tokenizer, load_tower
from .weights import check_names, find_file, of_other_repositories, read_pickled, read_tensors

ADAPTER_CONFIG = "adapter_config.json"
BESIDE_ADAPTER = "non_lora_trainables.bin"
PROJECTOR_ALONE = "mm_projector.bin"
PROJECTOR = re.compile(r"model\.mm_projector\.(\d+)\.(weight|bias)")
TOWER_PREFIX = "model.vision_tower.vision_tower."
# The family in an architecture's name -> transformers' model type.
DECODERS = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen": "qwen2",
    "Qwen2": "qwen2",
    "Phi": "phi3",
    "Phi3": "phi3",
    "Gemma": "gemma",
}
# mm_vision_select_feature -> vision_feature_select_strategy
STRATEGIES = {"patch": "default", "cls_patch": "full"}
# Fields of the configuration that are not the language model's.
OF_LLAVA = re.compile(
    r"(mm_|image_|vision_|tune_mm|freeze_mm|unfreeze_mm|use_mm|tokenizer_|s2).*|model_type|architectures|auto_map|_name_or_path"
)


def is_original(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of this layout."""
    return "mm_vision_tower" in values or "mm_projector_type" in values


def load_original(
    source: str | Path,
    values: Mapping[str, Any],
    base: str | Path | None,
    tower: str | Path | None,
    hub_kwargs: Mapping[str, Any],
) -> LlavaParts:
    """The parts of a checkpoint of this layout.

    Args:
        source: folder or Hub id.
        values: its `config.json`.
        base: the language model that an adapter or a lone projector was trained on.
        tower: instead of the one that the configuration names.
        hub_kwargs: of `source`; base and tower are other repositories.

    Raises:
        ValueError: a variable resolution, a projector of another form, weights missing or left over: named.
    """
    check_fixed(source, values)
    tower = tower or values.get("mm_vision_tower")
    if tower is None:
        raise ValueError(f"{str(source)!r} has no mm_vision_tower; wanted its tower named (--tower).")
    elsewhere = of_other_repositories(hub_kwargs)
    config = text_config(source, values)
    if find_file(source, ADAPTER_CONFIG, hub_kwargs) is not None:
        part, beside = _merged(source, _wanted_base(source, base, "an adapter"), config, hub_kwargs)
    elif (path := find_file(source, PROJECTOR_ALONE, hub_kwargs)) is not None:
        part = load_language_model(_wanted_base(source, base, "a projector alone"), elsewhere, config)
        beside = read_pickled(path)
        check_names(
            f"{str(source)!r}", (), [*part.left_over, *(n for n in beside if not PROJECTOR.fullmatch(n))]
        )
    else:
        if base is not None:
            raise ValueError(
                f"{str(source)!r} is a whole checkpoint; wanted no base model (base is {str(base)!r})."
            )
        part = load_language_model(source, hub_kwargs, config)
        beside = read_tensors(source, rf"{PROJECTOR.pattern}|{re.escape(TOWER_PREFIX)}.*", hub_kwargs)
        check_names(f"{str(source)!r}", (), set(part.left_over) - beside.keys())
    of_tower = {
        name.removeprefix(TOWER_PREFIX): value
        for name, value in beside.items()
        if name.startswith(TOWER_PREFIX)
    }
    vision = load_tower(tower, elsewhere, part.model.dtype, of_tower or None)
    return LlavaParts(
        tower=vision,
        language_model=part.model,
        projector=projector_of(source, beside),
        tower_source=tower,
        tokenizer=load_tokenizer(base or source, elsewhere if base else hub_kwargs),
        pad=values.get("image_aspect_ratio") == "pad",
        layer=values.get("mm_vision_select_layer", -2),
        strategy=STRATEGIES[values.get("mm_vision_select_feature", "patch")],
    )


def check_fixed(source: str | Path, values: Mapping[str, Any]) -> None:
    """Refuses what Backdrop has no form for.

    Raises:
        ValueError: names the field and its value.
    """
    refused = {
        "image_aspect_ratio": lambda v: "anyres" in str(v),
        "mm_patch_merge_type": lambda v: str(v).startswith("spatial"),
        "s2": bool,
        "mm_resampler_type": lambda v: v not in (None, "identity"),
        "mm_use_im_start_end": bool,
        "mm_vision_select_feature": lambda v: v not in (None, *STRATEGIES),
    }
    wanted = "a LLaVA with a tower of one fixed resolution, whose images are their patches and nothing else"
    for name, bad in refused.items():
        if bad(values.get(name)):
            raise ValueError(f"{str(source)!r} has {name} {values[name]!r}; wanted {wanted}.")
    kind = values.get("mm_projector_type", "linear")
    if kind != "mlp2x_gelu":
        raise ValueError(
            f"{str(source)!r} has mm_projector_type {kind!r}; wanted 'mlp2x_gelu', as LLaVA-1.5 has it."
        )


def text_config(source: str | Path, values: Mapping[str, Any]) -> PreTrainedConfig:
    """The language model's part of the configuration.

    Raises:
        ValueError: a family that is not known.
    """
    names = [*(values.get("architectures") or ()), str(values.get("model_type", "")).title().replace("_", "")]
    for name in names:
        family = re.sub(r"^Llava", "", name).removesuffix("ForCausalLM")
        if family in DECODERS:
            own = {key: value for key, value in values.items() if not OF_LLAVA.fullmatch(key)}
            return CONFIG_MAPPING[DECODERS[family]].from_dict(own)
    raise ValueError(f"{str(source)!r} has the architecture {names[0]!r}; wanted one of {sorted(DECODERS)}.")


def projector_of(source: str | Path, beside: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaVA's projector (`nn.Sequential`: 0 and 2 are linear) by `BackdropProjector`'s names.

    Raises:
        ValueError: there is none.
    """
    layers = {"0": "linear_1", "2": "linear_2"}
    found = {}
    for name, value in beside.items():
        match = PROJECTOR.fullmatch(name)
        if match:
            found[f"{layers.get(match[1], match[1])}.{match[2]}"] = value
    if not found:
        raise ValueError(f"{str(source)!r} holds no model.mm_projector weights; wanted its projector.")
    return found


def _merged(
    source: str | Path, base: str | Path, config: PreTrainedConfig, hub_kwargs: Mapping[str, Any]
) -> tuple[Part, dict[str, torch.Tensor]]:
    """The base model with an adapter merged in, and what was trained whole beside it."""
    elsewhere = of_other_repositories(hub_kwargs)
    part = load_language_model(base, elsewhere, config)
    check_names(f"{str(base)!r}", (), part.left_over)
    path = find_file(source, BESIDE_ADAPTER, hub_kwargs)
    beside = {} if path is None else {_bare(name): value for name, value in read_pickled(path).items()}
    own = {
        name: value
        for name, value in beside.items()
        if not (PROJECTOR.fullmatch(name) or name.startswith(TOWER_PREFIX))
    }
    names = part.model.state_dict().keys()
    check_names(f"{BESIDE_ADAPTER} of {str(source)!r}", (), own.keys() - names)
    part.model.load_state_dict(own, strict=False)
    return Part(merge_adapter(part.model, source, hub_kwargs)), beside


def merge_adapter(
    model: PreTrainedModel, source: str | Path, hub_kwargs: Mapping[str, Any]
) -> PreTrainedModel:
    """A model with an adapter of peft's merged into it, in place.

    Raises:
        ValueError: peft is not installed, or a weight of the adapter finds no place.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ValueError(
            f"{str(source)!r} holds an adapter, and merging it needs peft: pip install peft."
        ) from error
    hub = {name: hub_kwargs[name] for name in ("revision", "token", "cache_dir") if name in hub_kwargs}
    # Until transformers 5 a tower was one module deeper, and adapters of towers are from then.
    deeper = {} if hasattr(model, "vision_model") else {r"^vision_model\.": ""}
    adapted = PeftModel.from_pretrained(model, str(source), key_mapping=deeper or None, **hub)
    stored = read_tensors(source, r".*", hub, ("adapter_model.safetensors", "adapter_model.bin"))
    names, placed = (
        {_undeepened(name) for name in each} for each in (stored, get_peft_model_state_dict(adapted))
    )
    check_names(f"the adapter {str(source)!r}", placed - names, names - placed)
    return adapted.merge_and_unload()


def _undeepened(name: str) -> str:
    return name.replace("base_model.model.vision_model.", "base_model.model.", 1)


def _bare(name: str) -> str:
    """A name as the language model has it, without what training with an adapter put in front."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.")) else name


def _wanted_base(source: str | Path, base: str | Path | None, what: str) -> str | Path:
    if base is None:
        raise ValueError(
            f"{str(source)!r} is {what}; wanted the language model that it was trained on as base (--base)."
        )
    return base
