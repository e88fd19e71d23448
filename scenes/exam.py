"""Accuracy on made scenes with backgrounds that training never saw, in every form that Backdrop answers in.

    backdrop scenes exam --llava runs/llava-model --model examples/scenes-model --scenes 4000 \\
        --questions 3 --seed 0 --out docs/results/data/scenes-accuracy.json

All forms are asked the same questions about the same frames, so that their differences are paired:

* ``llava``: the whole frame as one group (of the model given with --llava).
* ``split``: the detector's groups.
* ``cached``: `split` after an earlier frame of the same background, vision tokens and prefixes kept.
* ``exact``: an earlier frame's background in place of this one's, matched with tolerance 0.
* ``matched``: the same with both frames as a camera sends them (noise, JPEG, light), tolerance 10;
  ``llava_disturbed`` is its plain counterpart on the same disturbed frames.
* ``stale``: the reference is the earlier frame with its objects, so that the background contradicts the fresh group.
  Only questions whose answer or object changed are asked, and only where the matcher takes the reference.

Cut off, the command goes on where it stopped (a file per form in --work).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from backdrop.evaluation.answering import Answerer, PreparedImages, load
from backdrop.evaluation.predictions import Predictions, model_fingerprint

from .exam_report import form_report, write_report
from .rows import STALE_OVERRIDDEN
from .world import (
    FAMILIES,
    Question,
    Scene,
    Split,
    background_seeds,
    disturbed,
    render_scene,
    scene_family,
)

CAMERA_TOLERANCE = 10.0  # grey levels, what BackgroundMatcher's docstring names for cameras
MAX_NEW_TOKENS = 16
# Questions answered together. More are slower for the small model on a CPU: activations no longer fit the allocator's
# cache and are mapped afresh at every layer.
BATCH = 32


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a frame; `old_answer` is the earlier frame's answer to it, None where it could not be asked."""

    id: str
    question: Question
    old_answer: str | None


@dataclass(frozen=True)
class SceneCase:
    """Two frames of one background, and what is asked about the later one.

    Attributes:
        number: of the scene, from 0.
        earlier, scene: the frames as they are drawn.
        earlier_image, image: the frames as the model sees them (RGB), disturbed or not.
        questions: about the later frame.
    """

    number: int
    earlier: Scene
    scene: Scene
    earlier_image: Image.Image
    image: Image.Image
    questions: tuple[SceneQuestion, ...]

    @property
    def background(self) -> str:
        """What questions share that are not independent of each other."""
        return f"{self.scene.family}/{self.scene.background_seed}"


def scene_questions(
    split: Split, scenes: int, seed: int, questions: int, disturb: bool = False, stale: bool = False
) -> Iterator[SceneCase]:
    """Scene by scene, each a function of its number and the seed alone.

    Args:
        scenes: how many.
        questions: asked about each, or all that it has.
        disturb: both frames pass through a camera's noise, light and JPEG, with seeds of their own.
        stale: only those of the same questions whose answer differs between the frames or whose object changed.
    """
    for number in range(scenes):
        rng = random.Random(f"eval/{split}/{seed}/{number}")
        place = rng.choice(FAMILIES), rng.choice(background_seeds(split))
        earlier, scene = (render_scene(*place, rng.randrange(2**31)) for _ in range(2))
        chosen = rng.sample(range(len(scene.questions)), min(questions, len(scene.questions)))
        asked = []
        for k in chosen:
            question = scene.questions[k]
            old_answer = _answer_in(earlier, question)
            if not stale or old_answer != question.answer or _object_changed(earlier, scene, question):
                asked.append(SceneQuestion(f"{number}/{k}", question, old_answer))
        images = earlier.image, scene.image
        if disturb:
            images = disturbed(earlier.image, 2 * number), disturbed(scene.image, 2 * number + 1)
        yield SceneCase(number, earlier, scene, images[0], images[1], tuple(asked))


def _named_class(family: str, question: Question) -> str | None:
    """The detector class that a question names, such as the bus of "What colour is the bus?"."""
    words = question.question.rstrip("?").split()
    return next((name for name in scene_family(family).named_classes if name in words), None)


def _answer_in(frame: Scene, question: Question) -> str | None:
    """A frame's answer to another frame's question, whatever its wording."""

    def asked_for(of: Question) -> tuple[str, str | None]:
        return of.topic, _named_class(frame.family, of)

    same = (other.answer for other in frame.questions if asked_for(other) == asked_for(question))
    return next(same, None)


def _object_changed(earlier: Scene, scene: Scene, question: Question) -> bool:
    """Whether an object that the answer hangs on came, left or moved between the frames."""
    if question.about == "background":
        return False
    names = scene_family(scene.family).answered_by[question.topic]
    if not names:
        named = _named_class(scene.family, question)
        names = () if named is None else (named,)
    boxes = [sorted(o.xyxy for o in frame.objects if o.name in names) for frame in (earlier, scene)]
    return boxes[0] != boxes[1]


# ---- forms


@dataclass(frozen=True)
class Form:
    """How a form is answered.

    Attributes:
        model: which of the two models, "llava" or "model".
        mode: of the `Answerer`.
        earlier: what becomes of the earlier frame: "unused", "seen" before this one, or "reference", objects and all.
        baselines: forms that its answers are compared with.
    """

    model: str
    mode: str
    earlier: str = "unused"
    disturb: bool = False
    tolerance: float = 0.0
    baselines: tuple[str, ...] = ("llava",)


FORMS = {
    "llava": Form("llava", "llava", baselines=()),
    "split": Form("model", "split"),
    "cached": Form("model", "cached", earlier="seen", baselines=("llava", "split")),
    "exact": Form("model", "matched", earlier="seen", baselines=("llava", "split")),
    "llava_disturbed": Form("llava", "llava", disturb=True),
    "matched": Form(
        "model",
        "matched",
        earlier="seen",
        disturb=True,
        tolerance=CAMERA_TOLERANCE,
        baselines=("llava", "llava_disturbed"),
    ),
    "stale": Form("model", "matched", earlier="reference", baselines=("llava", "split")),
}


def _prepare(answerer: Answerer, form: Form, cases: list[SceneCase]) -> list[PreparedImages]:
    """The frames, prepared one by one, so that each can reuse its own earlier frame and no other."""
    if form.earlier == "unused":
        return answerer.prepare([[case.image] for case in cases])
    matcher = answerer.processor.background_matching
    prepared = []
    for case in cases:
        if matcher is not None:
            matcher.clear()
        if form.earlier == "seen":
            answerer.prepare([[case.earlier_image]])
        else:
            matcher.max_overridden = STALE_OVERRIDDEN
            (seen,) = answerer.processor.image_processor.model_images([case.earlier_image])
            matcher.add(seen, np.ones((seen.shape[0] // matcher.patch_size) ** 2, dtype=bool))
        prepared += answerer.prepare([[case.image]])
    return prepared


def answer_form(
    answerer: Answerer,
    form: Form,
    cases: Iterator[SceneCase],
    predictions: Predictions,
    rows: int,
    total: int,
) -> None:
    """Asks a form's questions, `rows` at a time, and appends the records."""
    done = predictions.done
    waiting: list[tuple[SceneCase, list[SceneQuestion]]] = []
    for case in tqdm(cases, total=total, unit=" scenes"):
        left = [question for question in case.questions if question.id not in done]
        if left:
            waiting.append((case, left))
        if sum(len(questions) for _, questions in waiting) >= rows:
            predictions.append(_ask(answerer, form, waiting))
            waiting = []
    if waiting:
        predictions.append(_ask(answerer, form, waiting))


def _ask(answerer: Answerer, form: Form, waiting: list[tuple[SceneCase, list[SceneQuestion]]]) -> list[dict]:
    prepared = _prepare(answerer, form, [case for case, _ in waiting])
    asked = [
        (case, images, question)
        for (case, questions), images in zip(waiting, prepared, strict=True)
        for question in questions
    ]
    # Where the matcher refused the stale background nothing contradicts the fresh patches, so nothing is asked.
    put = [row for row in asked if form.earlier != "reference" or row[1].matched]
    texts = iter(
        answerer.answer([images for _, images, _ in put], [q.question.question for _, _, q in put])
        if put
        else ()
    )
    records = []
    for case, images, question in asked:
        text = next(texts) if form.earlier != "reference" or images.matched else None
        records.append(
            {
                "id": question.id,
                "image_id": str(case.number),
                "background": case.background,
                "family": case.scene.family,
                "topic": question.question.topic,
                "about": question.question.about,
                "question": question.question.question,
                "answers": [question.question.answer],
                "old_answer": question.old_answer,
                "prediction": text,
                **images.reuse,
            }
        )
    return records


def run_scenes(
    models: dict[str, tuple],
    sources: dict[str, str],
    *,
    scenes: int,
    questions: int,
    work: Path,
    seed: int = 0,
    split: Split = "test",
    batch_size: int = BATCH,
    forms: tuple[str, ...] = tuple(FORMS),
) -> dict:
    """Answers of all forms, and the report.

    Args:
        models: "llava" and "model" -> (model, processor).
        sources: the same -> folder or Hub id, for the fingerprint; a folder's last name is reported.
        work: folder of the records, one file per form.
        forms: which; each needs its baselines among them.
    """
    done: dict[str, list[dict]] = {}
    for name in forms:
        form = FORMS[name]
        model, processor = models[form.model]
        header = {"form": name, "split": split, "scenes": scenes, "questions": questions, "seed": seed}
        header |= model_fingerprint(model, processor, sources[form.model])
        predictions = Predictions(work / f"{name}.jsonl", header)
        answerer = Answerer(model, processor, form.mode, form.tolerance, MAX_NEW_TOKENS)
        cases = scene_questions(split, scenes, seed, questions, form.disturb, form.earlier == "reference")
        print(f"{name}: {Path(sources[form.model]).name}", flush=True)
        answer_form(answerer, form, cases, predictions, batch_size, scenes)
        done[name] = predictions.records
    return {
        "models": {name: Path(source).name for name, source in sources.items()},
        "scenes": scenes,
        "questions_per_scene": questions,
        "split": split,
        "seed": seed,
        "interval": "95%, bootstrap over backgrounds",
        "forms": {
            name: form_report(
                records,
                {baseline: done[baseline] for baseline in FORMS[name].baselines},
                contradicting=FORMS[name].earlier == "reference",
            )
            for name, records in done.items()
        },
    }


def run_exam(
    llava: str,
    model: str,
    out: Path,
    *,
    scenes: int = 4000,
    questions: int = 3,
    split: Split = "test",
    seed: int = 0,
    batch_size: int = BATCH,
    work: Path = Path("runs/scenes-accuracy"),
) -> dict:
    """Loads both models, asks the questions of all forms, and writes the report: JSON at `out`, a table (.md) beside it.

    Args:
        llava: model that sees whole images: a folder or a Hub id.
        model: model that sees groups.
        scenes, questions, split, seed, work: see `run_scenes`.
        batch_size: questions answered together.
    """
    sources = {"llava": llava, "model": model}
    report = run_scenes(
        {name: load(source) for name, source in sources.items()},
        sources,
        scenes=scenes,
        questions=questions,
        work=work,
        seed=seed,
        split=split,
        batch_size=batch_size,
    )
    write_report(report, out)
    return report
