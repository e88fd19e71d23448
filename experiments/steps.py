"""Steps that ladders and ablations are made of: train a recipe, make rows, score. Each is done once and can be cut off.

A step's folder holds `done.json` with the digest of everything the step depends on, written last; a step whose digest
is there is not run again, and a training that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import yaml
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig

from backdrop.data.atomic import write_atomically
from backdrop.data.load import examples
from backdrop.data.rows import BadRows
from backdrop.evaluation.answering import Answerer, load
from backdrop.evaluation.metrics import METRICS, Metric, figures
from backdrop.evaluation.predictions import (
    Predictions,
    model_fingerprint,
    read_predictions,
)
from backdrop.evaluation.run import PREDICTIONS, evaluate_examples
from backdrop.evaluation.tasks import task
from backdrop.hub_export.checkpoint import ADAPTER_FILES, load_checkpoint
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.scenes.exam import BATCH, FORMS, MAX_NEW_TOKENS, answer_form, scene_questions
from backdrop.scenes.world import Split
from backdrop.train.assemble import ModelArguments, assemble
from backdrop.train.stages import recipe_digest

# Keys of a recipe that change the model before training; the others say how it trains.
SWITCHES = tuple(f.name for f in fields(ModelArguments) if f.name not in ("model", "int8_threshold"))
DONE, STARTED = "done.json", "started.json"
WEIGHT_FILES = ("*.safetensors", "config.json", "processor_config.json", "detector.json")


@dataclass(frozen=True)
class SceneScore:
    """Questions about the made scenes that every model of an experiment is asked, and in which forms.

    Attributes:
        forms: names of `backdrop.scenes.exam.FORMS`.
        scenes, questions, seed, split: see `scene_questions`.
        images_last: the image stands behind its question, not before it.
        loaded: how the model is loaded for it: load_in_8bit, load_in_4bit, int8_threshold, dtype.
    """

    forms: tuple[str, ...] = ("split",)
    scenes: int = 300
    questions: int = 3
    seed: int = 0
    split: Split = "validation"
    images_last: bool = False
    loaded: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.forms) - set(FORMS))
        if unknown or not self.forms:
            raise ValueError(f"score.forms has {unknown or 'no form'}; wanted some of {', '.join(FORMS)}.")

    @property
    def metric(self) -> Metric:
        """The metric that its questions are scored by: exact match."""
        return METRICS["exact"]

    def records(self, model: Path, folder: Path) -> dict[str, list[dict]]:
        """Answers in each form: form -> records, one per question."""
        loaded, processor = load_for_scoring(model, self.loaded, folder)
        found = {}
        for name in self.forms:
            form = FORMS[name]
            header = {"form": name, "split": self.split, "scenes": self.scenes, "questions": self.questions}
            header |= {"seed": self.seed, "loaded": self.loaded, "images_last": self.images_last}
            header |= model_fingerprint(loaded, processor, str(model))
            predictions = Predictions(folder / f"{name}.jsonl", header, replace=True)
            answerer = Answerer(
                loaded, processor, form.mode, form.tolerance, MAX_NEW_TOKENS, self.images_last
            )
            cases = scene_questions(
                self.split, self.scenes, self.seed, self.questions, form.disturb, form.earlier == "reference"
            )
            answer_form(answerer, form, cases, predictions, BATCH, self.scenes)
            found[name] = [record for record in predictions.records if record["prediction"] is not None]
        return found


@dataclass(frozen=True)
class DataScore:
    """A public data set that every model of an experiment is scored on; see `backdrop.evaluation.run`.

    Attributes:
        data, source, split, images, limit: which questions.
        forms: modes of `backdrop eval`.
        tolerance: of the mode matched.
        loaded: how the model is loaded for it.
    """

    data: str
    source: str
    split: str = "validation"
    images: str | None = None
    limit: int | None = None
    forms: tuple[str, ...] = ("split",)
    tolerance: float = 0.0
    batch_size: int = 16
    loaded: dict = field(default_factory=dict)

    @property
    def metric(self) -> Metric:
        """The dataset's own metric."""
        return task(self.data).metric

    def records(self, model: Path, folder: Path) -> dict[str, list[dict]]:
        """Answers in each mode: mode -> records."""
        loaded, processor = load_for_scoring(model, self.loaded, folder)
        found = {}
        for mode in self.forms:
            rows = examples(
                self.data,
                self.source,
                split=self.split,
                images=self.images,
                limit=self.limit,
                streaming=True,
                bad_rows=BadRows(),
            )
            header = {"source": self.source, "split": self.split, "limit": self.limit, "loaded": self.loaded}
            evaluate_examples(
                loaded,
                processor,
                rows,
                data=self.data,
                mode=mode,
                out=folder / mode,
                header=header | model_fingerprint(loaded, processor, str(model)),
                tolerance=self.tolerance if mode == "matched" else 0.0,
                batch_size=self.batch_size,
                replace=True,
            )
            found[mode] = read_predictions(folder / mode / PREDICTIONS)[1]
        return found


def read_score(options: dict) -> SceneScore | DataScore:
    """The score that a matrix or a chain describes: a `DataScore` where it names `data`, else a `SceneScore`.

    Raises:
        ValueError: a key that this kind of score does not have.
    """
    kind = DataScore if "data" in options else SceneScore
    unknown = sorted(set(options) - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(f"score has unknown keys {unknown}; wanted {sorted(f.name for f in fields(kind))}.")
    return kind(**{**options, "forms": tuple(options.get("forms", ("split",)))})


def load_for_scoring(
    model: Path, loaded: dict, folder: Path
) -> tuple[BackdropForConditionalGeneration, BackdropProcessor]:
    """Model and processor of a finished stage; an adapter is merged, the language model quantised where asked for.

    An adapter is merged first, while its base is not quantised yet, and the merged model is written to `folder`.
    """
    if loaded and Path(model, ADAPTER_FILES[0]).is_file():
        merged = folder / "merged"
        for part in load_checkpoint(model):
            part.save_pretrained(merged)
        model = merged
    if loaded:
        names = {f.name for f in fields(ModelArguments)}
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a cast at every matrix product
        arguments = ModelArguments(model=str(model), **{k: v for k, v in loaded.items() if k in names})
        made = assemble(arguments, ModelConfig(**{k: v for k, v in loaded.items() if k not in names}))
    else:
        made = load(str(model))
    made[0].eval()
    return made


def folder_digest(folder: str | Path) -> str:
    """Names a model folder by its weights, detector and configuration; a Hub id by itself."""
    found = hashlib.sha256()
    paths = sorted(path for pattern in WEIGHT_FILES for path in Path(folder).glob(pattern))
    if not paths:
        return str(folder)
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.sha256()
            while block := file.read(2**20):
                content.update(block)
            found.update(path.name.encode() + content.digest())
    return found.hexdigest()[:16]


def step(folder: Path, inputs: dict, work: Callable[[], None]) -> bool:
    """Runs `work` unless the folder says that it was done with the same inputs.

    Files of the same step with other inputs are removed first; those of a run that was cut off stay.

    Returns:
        Whether it ran.

    Raises:
        ValueError: the folder holds files of something else.
    """
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


def require_start(start: str | Path, made_by: str | None = None) -> None:
    """Refuses an experiment whose first model is not there yet, before anything is written.

    Args:
        start: folder of the model that the experiment starts from.
        made_by: the command that makes it.

    Raises:
        ValueError: the folder is not there or holds no model.
    """
    if not Path(start, "config.json").is_file():
        first = f"make it first: {made_by}" if made_by else "wanted the folder of a finished model"
        raise ValueError(f"start is {str(start)!r}, where no model is; {first}")


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
        command = [sys.executable, "-m", "backdrop", "train", "--config", str(path)]
        if out.is_dir() and get_last_checkpoint(str(out)):
            command += ["--resume_from_checkpoint", get_last_checkpoint(str(out))]
        run_logged(command, folder / "train.log")

    step(folder, {"recipe": recipe, "start": folder_digest(start)}, work)
    return out


def scene_rows(start: str | Path, options: dict, folder: Path) -> Path:
    """Rows of groups made by the processor of `start` (`backdrop scenes rows`); their folder.

    They depend on the image processor and the detector alone: models that split alike share them.
    """
    inputs = {"options": options, "images": images_digest(start)}
    own = folder / recipe_digest(inputs)
    rows = own / "rows"

    def work() -> None:
        command = [sys.executable, "-m", "backdrop", "scenes", "rows", "--model", str(start)]
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
            f"{' '.join(command[2:6])} ended with {result.returncode}: {lines[-1]} (see {log})"
        )


def headline(records: list[dict], metric: Metric, baseline: list[dict] | None = None) -> dict:
    """A metric's first figure with its 95% interval, or the paired difference to another run's.

    The interval resamples backgrounds of scenes, images of other data: questions about one of them are not independent.
    """
    if baseline is not None:
        by_id = {record["id"]: record for record in baseline}
        records = [record for record in records if record["id"] in by_id]
        baseline = [by_id[record["id"]] for record in records]
    answers = [record["answers"] for record in records]

    def counts(rows: list[dict]) -> np.ndarray:
        return metric.counts([record["prediction"] for record in rows], answers)

    other = None if baseline is None else counts(baseline)
    shared = [record.get("background", record["image_id"]) for record in records]
    own = figures(metric, counts(records), shared, [[]] * len(records), other)[""]
    return {**own[metric.headline], "questions": own["questions"]}
