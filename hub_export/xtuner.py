"""Checkpoints in XTuner's own layout: the language model, `visual_encoder/` and `projector/` in one folder.

What XTuner trained with LoRA is an adapter instead (`llm_adapter/`, `visual_encoder_adapter/`), and a tower that stayed
frozen is not there: base model and tower are then named by the caller.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .original_llava import merge_adapter
from .parts import LlavaParts, load_language_model, load_tokenizer, load_tower
from .weights import check_names, find_file, of_other_repositories, read_json, read_tensors

LAYERS = {"0": "linear_1", "2": "linear_2"}


def is_xtuner(source: str | Path, hub_kwargs: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of this layout."""
    return find_file(source, "projector/config.json", hub_kwargs) is not None


def load_xtuner(
    source: str | Path, base: str | Path | None, tower: str | Path | None, hub_kwargs: Mapping[str, Any]
) -> LlavaParts:
    """The parts of a checkpoint of this layout.

    Args:
        source: folder or Hub id.
        base: the language model, where the source holds none or an adapter of it.
        tower: the tower, likewise.
        hub_kwargs: of `source`; base and tower are other repositories.

    Raises:
        ValueError: a part is not there and not named, or its weights do not fit: named.
    """
    elsewhere = of_other_repositories(hub_kwargs)
    whole = find_file(source, "config.json", hub_kwargs) is not None
    if whole == (base is not None):
        raise ValueError(
            f"{str(source)!r} holds its language model; wanted no base model (base is {str(base)!r})."
            if whole
            else f"{str(source)!r} holds no language model; wanted the one that it was trained on as base (--base)."
        )
    part = load_language_model(base or source, hub_kwargs if whole else elsewhere)
    check_names(f"the language model of {str(base or source)!r}", (), part.left_over)
    language = part.model
    if _has(source, "llm_adapter", hub_kwargs):
        language = merge_adapter(language, _folder(source, "llm_adapter", hub_kwargs), {})
    if find_file(source, "visual_encoder/config.json", hub_kwargs) is not None:
        tower, elsewhere = _folder(source, "visual_encoder", hub_kwargs), {}
    if tower is None:
        raise ValueError(
            f"{str(source)!r} holds no visual_encoder: its tower stayed as it was; wanted it named as tower (--tower)."
        )
    vision = load_tower(tower, elsewhere, language.dtype)
    if _has(source, "visual_encoder_adapter", hub_kwargs):
        vision = merge_adapter(vision, _folder(source, "visual_encoder_adapter", hub_kwargs), {})
    tokenizer = load_tokenizer(base or source, hub_kwargs if whole else of_other_repositories(hub_kwargs))
    return LlavaParts(vision, language, _projector(source, hub_kwargs), tower, tokenizer)


def _projector(source: str | Path, hub_kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    values = read_json(source, "projector/config.json", hub_kwargs) or {}
    found = {"depth": values.get("depth", 2), "hidden_act": values.get("hidden_act", "gelu")}
    wanted = {"depth": 2, "hidden_act": "gelu"}
    if found != wanted or not values.get("bias", True):
        raise ValueError(
            f"the projector of {str(source)!r} has {found}; wanted {wanted}, with a bias, as LLaVA-1.5."
        )
    stored = read_tensors(_folder(source, "projector", hub_kwargs), r".*", {})
    rename = re.compile(r"model\.(\d+)\.(\w+)")
    return {rename.sub(lambda m: f"{LAYERS.get(m[1], m[1])}.{m[2]}", name): stored[name] for name in stored}


def _has(source: str | Path, folder: str, hub_kwargs: Mapping[str, Any]) -> bool:
    return find_file(source, f"{folder}/adapter_config.json", hub_kwargs) is not None


def _folder(source: str | Path, name: str, hub_kwargs: Mapping[str, Any]) -> Path:
    """A folder of the checkpoint on this machine, fetched whole from the Hub where it is there."""
    if Path(source).is_dir():
        return Path(source) / name
    from huggingface_hub import snapshot_download

    hub = {key: hub_kwargs[key] for key in ("revision", "token", "cache_dir") if key in hub_kwargs}
    return Path(snapshot_download(str(source), allow_patterns=[f"{name}/*"], **hub)) / name
