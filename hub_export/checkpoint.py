"""Loads what training left: a checkpoint with weights, or an adapter, which is merged into its base."""

import json
import re
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedConfig

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor

from .extend import extend_model
from .model_folder import check_config

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Configuration fields that training may change and that no weight shows.
SWITCHES = ("trained_on_groups", "separator_token_ids", "masked_attention", "raster_order")


def load_checkpoint(
    checkpoint: str | Path,
) -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    """Model and processor of a checkpoint folder, an adapter merged into its base.

    The processor beside an adapter counts, else its base's. A `config.json` beside an adapter is the trained model's:
    it says which parts training added to the base, and whether it saw groups.

    Raises:
        ValueError: the folder holds no Backdrop model and no adapter of one.
    """
    folder = Path(checkpoint)
    if (folder / ADAPTER_FILES[0]).is_file():
        return _merged_adapter(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds neither config.json nor {ADAPTER_FILES[0]}; wanted a checkpoint of a Backdrop model."
        )
    return load_model(str(folder)), _load_processor(str(folder))


def load_model(name: str) -> BackdropForConditionalGeneration:
    """The model of a folder or a Hub id, in the dtype it was saved in.

    Raises:
        ValueError: it is no Backdrop model, or quantised.
    """
    check_config(name, BackdropConfig.get_config_dict(name)[0])
    return BackdropForConditionalGeneration.from_pretrained(name, dtype="auto")


def tower_config(config: BackdropConfig) -> PreTrainedConfig:
    """The vision tower's configuration: a built `BackdropConfig` holds an object, whatever it was built from.

    Raises:
        TypeError: it holds a dictionary, or none.
    """
    if not isinstance(config.vision_config, PreTrainedConfig):
        raise TypeError(
            f"vision_config is a {type(config.vision_config).__name__}; wanted the configuration of a tower."
        )
    return config.vision_config


def _load_processor(name: str) -> BackdropProcessor:
    # Without the flag, transformers asks at the terminal whether to run the code in an exported folder.
    return BackdropProcessor.from_pretrained(name, trust_remote_code=False)


def _merged_adapter(folder: Path) -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            f"{folder} holds an adapter, and merging it needs peft: pip install peft."
        ) from error
    adapter = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    base = adapter["base_model_name_or_path"]
    try:
        model = load_model(base)
    except (OSError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder} is an adapter of {base!r}, which cannot be loaded: {line}") from error
    if (folder / "config.json").is_file():
        trained = BackdropConfig.from_pretrained(folder)
        extend_model(
            model,
            num_prefusion_layers=trained.num_prefusion_layers,
            prefusion_rotary=trained.prefusion_rotary,
            separate_vision_towers=trained.separate_vision_towers,
            separate_projectors=trained.separate_projectors,
        )
        # What no weight says: a model that was trained with a switch is not run without it.
        for name in SWITCHES:
            setattr(model.config, name, getattr(trained, name))
    modules = {name.rpartition(".")[-1] for name, _ in model.named_modules()}
    for name in adapter["modules_to_save"] or ():
        if name not in modules:
            raise ValueError(
                f"{folder} trained the module {name!r}, which its base {base!r} does not have; wanted the trained "
                "model's config.json beside the adapter."
            )
    rows = _embedding_rows(folder / ADAPTER_FILES[1])
    if rows not in (None, model.get_input_embeddings().weight.shape[0]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    beside = (folder / "processor_config.json").is_file()
    return model, _load_processor(str(folder) if beside else base)


def _embedding_rows(path: Path) -> int | None:
    """Number of embedding rows that an adapter saved with the whole table; None: it saved no table."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if re.search(r"embed_tokens\.(base_layer\.)?weight$", name):
                return file.get_slice(name).get_shape()[0]
    return None
