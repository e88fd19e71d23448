"""A model and its processor as a folder for the Hugging Face Hub, loadable with nothing of ours installed.

The folder is built beside its place and renamed into it: what is there is complete, at any moment.
"""

import json
import os
import re
import shutil
import uuid
from importlib import metadata
from pathlib import Path

from huggingface_hub.utils import validate_repo_id
from packaging.requirements import Requirement
from PIL import Image
from safetensors import safe_open

import backdrop.modeling
import backdrop.processing
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration, BackdropModel
from backdrop.processing.detector_backdrop import DESCRIPTION_NAME
from backdrop.processing.image_processing_backdrop import DETECTOR_FILES, BackdropImageProcessor
from backdrop.processing.processing_backdrop import BackdropProcessor

from .extend import extend_model, fold_prefusion
from .model_card import licence_text, model_card, notice_text

MODEL_CLASSES = {
    "AutoConfig": BackdropConfig,
    # The base model, not the one with a head: engines such as vLLM put their own head on it.
    "AutoModel": BackdropModel,
    "AutoModelForImageTextToText": BackdropForConditionalGeneration,
    "AutoModelForMultimodalLM": BackdropForConditionalGeneration,
}
PROCESSOR_CLASSES = {"AutoProcessor": BackdropProcessor, "AutoImageProcessor": BackdropImageProcessor}
SWITCHES = ("trained_on_groups", "separator_token_ids", "masked_attention", "raster_order")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MAX_SHARD_SIZE = "5GB"
# Distributions that the exported code imports; their bounds are the package's own.
LOADING_REQUIREMENTS = ("numpy", "pillow", "safetensors", "torch", "transformers")
# By these an earlier export is known from a checkpoint, which nobody wants replaced.
EXPORT_MARKS = ("README.md", "LICENSE", "requirements.txt", "modeling_backdrop.py")
EXPORTED_NAMES = re.compile(
    r"[^.].*\.(py|json|jinja|safetensors|model|txt)|README\.md|LICENSE|NOTICE|additional_chat_templates"
)


def export(
    model: BackdropForConditionalGeneration,
    processor: BackdropProcessor,
    out: str | Path,
    base_model: str | None = None,
    licence: str = "apache-2.0",
    notes: str = "",
) -> list[str]:
    """Writes the complete folder, or nothing.

    Args:
        model, processor: they must fit each other; the processor's detector weights go along if it has them.
        out: new, empty, or an earlier export, which is replaced.
        base_model: Hub id of the model that this one was made from.
        licence: of the model's weights, as the Hub spells licences.
        notes: Markdown for the model card: training data, figures.

    Returns:
        The names of the files written.

    Raises:
        ValueError: model and processor do not fit, or `out` holds something else.
    """
    if base_model is not None:
        validate_repo_id(base_model)
    _check_classes(model, processor)
    _check_fit(model, processor)
    out = Path(out).resolve()
    _check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    building.mkdir()
    try:
        model.save_pretrained(building, max_shard_size=MAX_SHARD_SIZE)
        if (building / ADAPTER_FILES[0]).exists():
            raise ValueError("The model carries an adapter that is not merged; wanted plain weights.")
        processor.save_pretrained(building)
        _copy_code(building)
        _add_auto_maps(building)
        detector = _detector_source(building)
        texts = {
            "README.md": model_card(model.config, out.name, base_model, licence, detector, notes),
            "LICENSE": licence_text(licence, detector),
            "requirements.txt": _requirements(),
        }
        if detector is not None:
            texts["NOTICE"] = notice_text(detector)
        for name, text in texts.items():
            (building / name).write_text(text, encoding="utf-8")
        files = sorted(
            path.relative_to(building).as_posix() for path in building.rglob("*") if path.is_file()
        )
        _replace(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return files


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    base_model: str | None = None,
    licence: str = "apache-2.0",
    notes: str = "",
    fold: bool = False,
) -> list[str]:
    """`export` of a folder that `save_pretrained`, the converter or a trainer wrote; an adapter is merged first.

    Args:
        checkpoint: holds weights and processor, or a peft adapter, whose base is loaded from where it says.
        out, base_model, licence, notes: see `export`.
        fold: prefusion layers become the first layers of the language model, as serving engines need them.
    """
    model, processor = load_checkpoint(checkpoint)
    if fold:
        fold_prefusion(model)
    return export(model, processor, out, base_model, licence, notes)


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
    return _load(str(folder)), _load_processor(str(folder))


def _load(name: str) -> BackdropForConditionalGeneration:
    found = BackdropConfig.get_config_dict(name)[0].get("model_type")
    if found != BackdropConfig.model_type:
        raise ValueError(f"{name!r} is of model type {found!r}; wanted 'backdrop' (convert it first).")
    return BackdropForConditionalGeneration.from_pretrained(name, dtype="auto")


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
    adapter = _read_json(folder / ADAPTER_FILES[0])
    base = adapter["base_model_name_or_path"]
    try:
        model = _load(base)
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
    rows = _adapter_rows(folder / ADAPTER_FILES[1])
    if rows not in (None, model.get_input_embeddings().weight.shape[0]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    beside = (folder / "processor_config.json").is_file()
    return model, _load_processor(str(folder) if beside else base)


def _adapter_rows(path: Path) -> int | None:
    """Rows of the embedding table that an adapter brings along whole; None: it brings none."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if re.search(r"embed_tokens\.(base_layer\.)?weight$", name):
                return file.get_slice(name).get_shape()[0]
    return None


# ---- checks


def _check_classes(model, processor) -> None:
    wanted = ((model, BackdropForConditionalGeneration), (processor, BackdropProcessor))
    for found, cls in wanted:
        if not isinstance(found, cls):
            raise ValueError(
                f"{type(found).__module__}.{type(found).__name__} cannot be exported; wanted "
                f"{cls.__module__}.{cls.__name__} (an adapter merged, a model loaded with the package's own class)."
            )


def _check_fit(model: BackdropForConditionalGeneration, processor: BackdropProcessor) -> None:
    config, tokens = model.config, len(processor.tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise ValueError(
            f"The tokenizer has {tokens} tokens, but the embedding table has {rows} rows; wanted a row for each: "
            f"model.resize_token_embeddings({tokens})."
        )
    if processor.chat_template is None:
        raise ValueError("The processor's chat_template is None; wanted one, for pipelines and chats.")
    vision = config.vision_config
    blank = Image.new("RGB", (vision.image_size, vision.image_size))
    features = processor.image_processor(blank, split=False, return_tensors="np")
    values = (
        ("image_token_id", processor.image_token_id, config.image_token_id),
        ("separator_token_ids", processor.separator_token_ids, config.separator_token_ids),
        ("extra_tokens_per_group", processor.extra_tokens_per_group, config.extra_tokens_per_group),
        ("image side", features["pixel_values"].shape[-1], vision.image_size),
        ("number of patches", features["patch_mask"].shape[-1], config.num_patches),
    )
    for name, found, wanted in values:
        if found != wanted:
            raise ValueError(f"The processor's {name} is {found}; wanted the model's, {wanted}.")


def _check_replaceable(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; wanted a folder.")
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if names and not all(mark in names for mark in EXPORT_MARKS):
        raise ValueError(
            f"{out} is not empty and no earlier export; wanted a new or empty folder, or one to replace."
        )
    strangers = [name for name in names if not EXPORTED_NAMES.fullmatch(name)]
    if strangers:
        raise ValueError(
            f"{out} is an earlier export, but {strangers[0]!r} in it is not of the export's making; wanted it moved away."
        )


# ---- the folder's parts


def _copy_code(folder: Path) -> None:
    """The packages' files side by side: custom code on the Hub can import flat siblings only."""
    for package in (backdrop.modeling, backdrop.processing):
        for source in sorted(Path(package.__file__).parent.glob("*.py")):
            if source.name == "__init__.py":
                continue
            if (folder / source.name).exists():
                raise ValueError(f"Two code files are named {source.name}; wanted unique names.")
            shutil.copyfile(source, folder / source.name)


def _add_auto_maps(folder: Path) -> None:
    """`save_pretrained` maps no class, or only the saved one; the Hub needs them all."""
    config_path, processor_path = folder / "config.json", folder / "processor_config.json"
    config, processor = _read_json(config_path), _read_json(processor_path)
    config["auto_map"] = _auto_map(MODEL_CLASSES)
    # AutoImageProcessor reads the nested part alone.
    processor["auto_map"] = processor["image_processor"]["auto_map"] = _auto_map(PROCESSOR_CLASSES)
    for path, values in ((config_path, config), (processor_path, processor)):
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _auto_map(classes: dict[str, type]) -> dict[str, str]:
    return {auto: f"{cls.__module__.rpartition('.')[-1]}.{cls.__name__}" for auto, cls in classes.items()}


def _detector_source(folder: Path) -> str | None:
    """The checkpoint that the folder's detector weights came from, None without any."""
    name = _read_json(folder / "processor_config.json")["image_processor"].get("detector")
    if name is not None and Path(name).name != name:
        raise ValueError(
            f"The processor's detector is {name!r}, which is no file here; wanted a file, or a name that ultralytics "
            "knows everywhere."
        )
    if not all((folder / file).is_file() for file in DETECTOR_FILES):
        return None
    return _read_json(folder / DESCRIPTION_NAME)["source"]


def _requirements() -> str:
    """What loading needs, and what splitting needs, with the bounds of the installed package."""
    declared = [Requirement(line) for line in metadata.requires("backdrop-vlm")]
    loading = [item for item in declared if item.marker is None and item.name in LOADING_REQUIREMENTS]
    splitting = [item for item in declared if item.name == "ultralytics" and '"detector"' in str(item.marker)]
    lines = [
        *(f"{item.name}{item.specifier}" for item in loading),
        "# Only to split ordinary images into background and objects (AGPL-3.0):",
        *(f"{item.name}{item.specifier}" for item in splitting),
    ]
    return "\n".join(lines) + "\n"


def _replace(building: Path, out: Path) -> None:
    """Puts the finished folder in its place; an earlier one stays where it is until then, and on failure."""
    if not out.exists():
        os.rename(building, out)
        return
    retired = building.with_name(building.name + ".old")
    os.rename(out, retired)
    try:
        os.rename(building, out)
    except OSError:
        os.rename(retired, out)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
