"""Steps that ladders and ablations are made of: train a recipe, make rows, score. Each is done once and can be cut off.

A step's folder holds `done.json` with the digest of everything the step depends on, written last; a step whose digest
is there is not run again, and a training that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import yaml
from transformers.trainer_utils import get_last_checkpoint

from backdrop.evaluation.answering import Answerer, load
from backdrop.evaluation.metrics import METRICS, figures
from backdrop.evaluation.predictions import Predictions, model_fingerprint, write_atomically
from backdrop.evaluation.scenes import FORMS, MAX_NEW_TOKENS, answer_form, scene_questions
from backdrop.hub_export.export import load_checkpoint

from .assemble import ModelArguments
from .stages import recipe_digest

# What a recipe does to the model before anything trains; the rest is how it trains.
SWITCHES = tuple(f.name for f in fields(ModelArguments) if f.name not in ("model", "int8_threshold"))
DONE, STARTED = "done.json", "started.json"
WEIGHT_FILES = ("*.safetensors", "config.json", "processor_config.json", "detector.json")


@dataclass(frozen=True)
class SceneScore:
    """Questions about the made scenes that every model of an experiment is asked, and in which forms.

    Attributes:
        scenes, questions, seed, split: see `scene_questions`.
        forms: names of `backdrop.evaluation.scenes.FORMS`.
    """

    forms: tuple[str, ...] = ("split",)
    scenes: int = 300
    questions: int = 3
    seed: int = 0
    split: str = "validation"

    def __post_init__(self):
        unknown = sorted(set(self.forms) - set(FORMS))
        if unknown or not self.forms:
            raise ValueError(f"score.forms has {unknown or 'no form'}; wanted some of {', '.join(FORMS)}.")


def folder_digest(folder: str | Path) -> str:
    """Names a model folder by its weights, detector and configuration; a Hub id by itself."""
    found = hashlib.sha256()
    paths = sorted(path for pattern in WEIGHT_FILES for path in Path(folder).glob(pattern))
    if not paths:
        return str(folder)
    for path in paths:
        with path.open("rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]


def step(folder: Path, inputs: dict, work: Callable[[], None]) -> bool:
    """Does `work` unless the folder says that it was done with the same inputs; whether it did."""
    digest = recipe_digest(inputs)
    mark = folder / DONE
    if mark.is_file() and json.loads(mark.read_text())["digest"] == digest:
        return False
    started = folder / STARTED
    if started.is_file() and json.loads(started.read_text())["digest"] != digest:
        shutil.rmtree(folder)  # this step with other inputs
    elif folder.is_dir() and any(folder.iterdir()) and not started.is_file():
        raise ValueError(
            f"{folder} holds files of something else; wanted a new or empty folder for this step."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(started, json.dumps({"digest": digest}) + "\n")
    work()
    write_atomically(mark, json.dumps({"digest": digest, "inputs": inputs}, indent=2, default=str) + "\n")
    return True


def train_stage(recipe: dict, start: str | Path, folder: Path) -> Path:
    """Runs the recipe from `start` in a process of its own; the folder of the finished model.

    Raises:
        RuntimeError: the run failed; its last line is in the message, all of it in `train.log`.
    """
    out = folder / "model"
    recipe = {**recipe, "model": str(start), "output_dir": str(out)}

    def work() -> None:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        command = [sys.executable, "-m", "backdrop.train.sft", "--config", str(path)]
        if out.is_dir() and get_last_checkpoint(str(out)):
            command += ["--resume_from_checkpoint", get_last_checkpoint(str(out))]
        run_logged(command, folder / "train.log")

    step(folder, {"recipe": recipe, "start": folder_digest(start)}, work)
    return out


def scene_rows(start: str | Path, options: dict, folder: Path) -> Path:
    """Rows of groups made by the processor of `start` (`backdrop.train.scene_dataset`); their folder.

    They depend on the image processor and the detector alone: models that split alike share them.
    """
    inputs = {"options": options, "images": images_digest(start)}
    own = folder / recipe_digest(inputs)
    rows = own / "rows"

    def work() -> None:
        command = [sys.executable, "-m", "backdrop.train.scene_dataset", "--model", str(start)]
        for name, value in (options | {"out": rows}).items():
            command += [f"--{name}", str(value)]
        run_logged(command, own / "rows.log")

    step(own, inputs, work)
    return rows


def images_digest(folder: str | Path) -> str:
    """Names what a model folder does to images: the image processor's settings and the detector's weights."""
    settings = json.loads(Path(folder, "processor_config.json").read_text())["image_processor"]
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(Path(folder).glob("detector.*")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def run_logged(command: list[str], log: Path) -> None:
    """Runs a command with its output appended to a file."""
    with log.open("a") as file:
        result = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(
            f"{' '.join(command[2:5])} ended with {result.returncode}: {lines[-1]} (see {log})"
        )


def score_scenes(model: Path, score: SceneScore, folder: Path) -> dict[str, list[dict]]:
    """Answers of a model in each form: form -> records, one per question. A cut-off run goes on."""
    loaded = None
    found = {}
    for name in score.forms:
        form = FORMS[name]
        header = {
            "form": name,
            "split": score.split,
            "scenes": score.scenes,
            "questions": score.questions,
            "seed": score.seed,
        }
        if loaded is None:
            is_adapter = Path(model, "adapter_config.json").is_file()
            loaded = load_checkpoint(model) if is_adapter else load(str(model), "cpu")
            loaded[0].eval()
        predictions = Predictions(folder / f"{name}.jsonl", header | model_fingerprint(*loaded, str(model)))
        answerer = Answerer(*loaded, form.mode, form.tolerance, MAX_NEW_TOKENS)
        cases = scene_questions(
            score.split, score.scenes, score.seed, score.questions, form.disturb, form.earlier == "reference"
        )
        answer_form(answerer, form, cases, predictions, 32, score.scenes)
        found[name] = [record for record in predictions.records if record["prediction"] is not None]
    return found


def exact_match(records: list[dict], baseline: list[dict] | None = None) -> dict:
    """Share of exact answers with its 95% interval over backgrounds, or the paired difference to another run's."""
    metric = METRICS["exact"]
    if baseline is not None:
        by_id = {record["id"]: record for record in baseline}
        records = [record for record in records if record["id"] in by_id]
        baseline = [by_id[record["id"]] for record in records]
    counts = [
        metric.counts([r["prediction"] for r in rows], [r["answers"] for r in records])
        for rows in (records, baseline)
        if rows is not None
    ]
    own = figures(metric, counts[0], [r["background"] for r in records], [[]] * len(records), *counts[1:])[""]
    return {**own[metric.headline], "questions": own["questions"]}
