"""A model and its processor as a folder for the Hugging Face Hub, loadable with nothing of ours installed.

The folder is built beside its place and renamed into it: what is there is complete, at any moment.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id
from packaging.requirements import Requirement
from PIL import Image

import backdrop.modeling
import backdrop.processing
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration, BackdropModel
from backdrop.processing.detector_choice_backdrop import is_hub_id
from backdrop.processing.detector_files_backdrop import DESCRIPTION_NAME, DETECTOR_FILES, TRANSFORMERS
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.processing_backdrop import BackdropProcessor

from .checkpoint import ADAPTER_FILES, load_checkpoint
from .extend import fold_prefusion
from .model_card import SAMPLE, Figure, licence_text, model_card, notice_text, recorded_base

MODEL_CLASSES = {
    "AutoConfig": BackdropConfig,
    # The base model, not the one with a head: engines such as vLLM put their own head on it.
    "AutoModel": BackdropModel,
    "AutoModelForImageTextToText": BackdropForConditionalGeneration,
    "AutoModelForMultimodalLM": BackdropForConditionalGeneration,
}
PROCESSOR_CLASSES = {"AutoProcessor": BackdropProcessor, "AutoImageProcessor": BackdropImageProcessor}
PLACES = ("_name_or_path", "name_or_path", "_commit_hash")
MAX_SHARD_SIZE = "5GB"
# Distributions that the exported code imports; their bounds are the package's own.
LOADING_REQUIREMENTS = ("numpy", "pillow", "safetensors", "torch", "transformers")
# By these an earlier export is known from a checkpoint, which nobody wants replaced.
EXPORT_MARKS = ("README.md", "LICENSE", "requirements.txt", "modeling_backdrop.py")
EXPORTED_NAMES = re.compile(
    r"[^.].*\.(py|json|jinja|safetensors|model|txt)|README\.md|sample\.png|LICENSE|NOTICE|additional_chat_templates"
)


def export(
    model: BackdropForConditionalGeneration,
    processor: BackdropProcessor,
    out: str | Path,
    base_model: str | None = None,
    licence: str = "apache-2.0",
    notes: str = "",
    *,
    language: Sequence[str] = (),
    figures: Sequence[Figure] = (),
    sample: Path | None = None,
    questions: Sequence[str] = (),
) -> list[str]:
    """Writes the complete folder, or nothing.

    Args:
        model, processor: they must fit each other; the processor's detector weights go along if it has them.
        out: new, empty, or an earlier export, which is replaced.
        base_model: Hub id of the model that this one was made from.
        licence: of the model's weights, as the Hub spells licences.
        notes: Markdown for the model card: training data, figures.
        language, figures: see `model_card`.
        sample, questions: a picture (PNG) for the card, and questions about it that the model answers rightly.

    Returns:
        The names of the files written.

    Raises:
        ValueError: model and processor do not fit, or `out` holds something else.
    """
    if base_model is not None:
        validate_repo_id(base_model)
    if (sample is None) != (not questions):
        raise ValueError(
            "A sample picture and questions about it belong together; one of the two is missing."
        )
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
        for name in ("generation_config.json", "tokenizer_config.json"):
            if (building / name).is_file():
                values = without_places(_read_json(building / name))
                (building / name).write_text(
                    json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
        about: dict[str, Any] = {"language": language, "figures": figures, "questions": questions}
        if sample is not None:
            shutil.copyfile(sample, building / SAMPLE)
        texts = folder_texts(building, model.config, out.name, base_model, licence, notes, **about)
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
    *,
    language: Sequence[str] = (),
    figures: Sequence[Figure] = (),
    sample: Path | None = None,
    questions: Sequence[str] = (),
) -> list[str]:
    """`export` of a folder that `save_pretrained`, the converter or a trainer wrote; an adapter is merged first.

    Args:
        checkpoint: holds weights and processor, or a peft adapter, whose base is loaded from where it says.
        out, base_model, licence, notes, language, figures, sample, questions: see `export`; `base_model` None: what the checkpoint's card,
            or that of one before it, says.
        fold: prefusion layers become the first layers of the language model, as serving engines need them.
    """
    model, processor = load_checkpoint(checkpoint)
    if fold:
        fold_prefusion(model)
    base = base_model or recorded_base(checkpoint)
    about: dict[str, Any] = {
        "language": language,
        "figures": figures,
        "sample": sample,
        "questions": questions,
    }
    return export(model, processor, out, base, licence, notes, **about)


# ---- checks


def _check_classes(model: object, processor: object) -> None:
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


def code_files() -> dict[str, Path]:
    """The code of an exported folder by name: custom code on the Hub can import flat siblings only."""
    found: dict[str, Path] = {}
    for package in (backdrop.modeling, backdrop.processing):
        (folder,) = package.__path__
        for source in sorted(Path(folder).glob("*.py")):
            if source.name == "__init__.py":
                continue
            if source.name in found:
                raise ValueError(f"Two code files are named {source.name}; wanted unique names.")
            found[source.name] = source
    return found


def folder_texts(
    folder: Path,
    config: BackdropConfig,
    name: str,
    base_model: str | None,
    licence: str,
    notes: str,
    **about: Any,
) -> dict[str, str]:
    """Card, licences and requirements by file name; `folder` holds the processor's files already.

    Args:
        about: `language`, `figures` and `questions` of `model_card`. Else as `export`.
    """
    detector, detector_licence = _detector_source(folder)
    images = BackdropImageProcessor.from_pretrained(folder)
    texts = {
        "README.md": model_card(
            config,
            name,
            base_model,
            licence,
            detector,
            notes,
            detector_licence=detector_licence,
            fit=images.fit,
            own_padding=images.own_padding,
            **about,
        ),
        "LICENSE": licence_text(licence, detector, detector_licence),
        "requirements.txt": _requirements(ultralytics=detector_licence is None),
    }
    if detector is not None and detector_licence is None:
        texts["NOTICE"] = notice_text(detector)
    return texts


def _copy_code(folder: Path) -> None:
    for name, source in code_files().items():
        shutil.copyfile(source, folder / name)


def _add_auto_maps(folder: Path) -> None:
    """`save_pretrained` maps no class, or only the saved one; the Hub needs them all."""
    config_path, processor_path = folder / "config.json", folder / "processor_config.json"
    config, processor = _read_json(config_path), _read_json(processor_path)
    config["auto_map"] = _auto_map(MODEL_CLASSES)
    # AutoImageProcessor reads the nested part alone.
    processor["auto_map"] = processor["image_processor"]["auto_map"] = _auto_map(PROCESSOR_CLASSES)
    for path, values in ((config_path, without_places(config)), (processor_path, processor)):
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def without_places(value: Any) -> Any:
    """JSON without the fields in which transformers notes where this machine had something."""
    if isinstance(value, dict):
        return {name: without_places(item) for name, item in value.items() if name not in PLACES}
    return [without_places(item) for item in value] if isinstance(value, list) else value


def _auto_map(classes: Mapping[str, type]) -> dict[str, str]:
    return {auto: f"{cls.__module__.rpartition('.')[-1]}.{cls.__name__}" for auto, cls in classes.items()}


def _detector_source(folder: Path) -> tuple[str | None, str | None]:
    """The checkpoint that the folder's detector weights came from, and their licence if transformers runs them.

    None for what there is not.
    """
    name = _read_json(folder / "processor_config.json")["image_processor"].get("detector")
    if name is not None and Path(name).name != name and not is_hub_id(name):
        raise ValueError(
            f"The processor's detector is {name!r}, which is no file here; wanted a file, or a name that ultralytics or the "
            "Hub knows everywhere."
        )
    if not all((folder / file).is_file() for file in DETECTOR_FILES):
        return None, None
    description = _read_json(folder / DESCRIPTION_NAME)
    licence = description["license"] if description.get("kind") == TRANSFORMERS else None
    return description["source"], licence


def _requirements(ultralytics: bool) -> str:
    """What loading needs, and what splitting with ultralytics needs, with the bounds of the installed package."""
    declared = [Requirement(line) for line in metadata.requires("backdrop-vlm") or ()]
    loading = [item for item in declared if item.marker is None and item.name in LOADING_REQUIREMENTS]
    splitting = [item for item in declared if item.name == "ultralytics" and '"detector"' in str(item.marker)]
    lines = [f"{item.name}{item.specifier}" for item in loading]
    if ultralytics:
        lines.append("# Only to split ordinary images into background and objects (AGPL-3.0):")
        lines += [f"{item.name}{item.specifier}" for item in splitting]
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
