"""Stages of training: a note beside every finished checkpoint, and recipes that start from a certain stage only."""

import hashlib
import json
from pathlib import Path

from backdrop.hub_export.model_folder import check_known

STAGE_FILE = "backdrop_stage.json"


def read_stage(folder: str | Path) -> dict | None:
    """The note of the run that wrote the folder; None if there is none (a converted model, a Hub id)."""
    path = Path(folder, STAGE_FILE)
    return json.loads(path.read_text()) if path.is_file() else None


def check_start(model: str, wanted: str | None) -> None:
    """Refuses a checkpoint that is unfinished or not of the stage that a recipe starts from.

    Raises:
        ValueError: another stage, no stage, an unfinished checkpoint, one that is quantised, or another kind of model.
    """
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"model is {model!r}, which holds no config.json; wanted a finished checkpoint (resume the run that writes it)."
        )
    if folder.is_dir():
        check_known(folder)
    if wanted is None:
        return
    note = read_stage(model)
    if note is None:
        raise ValueError(
            f"model is {model!r}, which names no stage; wanted a checkpoint of stage {wanted!r}."
        )
    if note["stage"] != wanted:
        raise ValueError(f"model is {model!r} of stage {note['stage']!r}; wanted stage {wanted!r}.")


def write_stage(folder: str | Path, stage: str | None, recipe: dict) -> None:
    """Writes the note: the stage's name, the recipe and its digest, and the note of the checkpoint it started from."""
    note = {"stage": stage, "recipe": recipe, "recipe_digest": recipe_digest(recipe)}
    note["start"] = read_stage(recipe["model"]) if recipe.get("model") else None
    Path(folder, STAGE_FILE).write_text(json.dumps(note, indent=2, default=str) + "\n")


def recipe_digest(recipe: dict) -> str:
    """A digest of the recipe's content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:16]
