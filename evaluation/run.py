"""Runs a model over a dataset in one mode: writes predictions as they come, then a summary with intervals.

Questions about one image are asked together, and the image is prepared once. The order of images is the dataset's:
with matching, the images before are the references. A run that goes on after it was cut off prepares the images
before again without asking about them, so that references and cache are what they would have been.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from backdrop.data.atomic import write_atomically
from backdrop.data.rows import BadRows, Example
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor

from .answering import Answerer, load, open_image
from .metrics import CONFIDENCE, RESAMPLES, Metric, caption_tokenizer, figures
from .predictions import Predictions, model_fingerprint, read_predictions
from .tasks import Task, task

logger = logging.getLogger(__name__)
PREDICTIONS, SUMMARY, TABLE = "predictions.jsonl", "summary.json", "summary.md"
WINDOW = 2048  # examples among which those of one image are brought together; bounds what is held of a stream


@dataclass(frozen=True)
class Question:
    """One question as it is asked and scored."""

    id: str
    question: str
    answers: list[str]
    question_type: str


@dataclass(frozen=True)
class ImageQuestions:
    """What is asked about one example's images; `images` are as in `Example`."""

    image_id: str
    images: list[dict]
    questions: list[Question]


def questions_of(example: Example) -> list[Question]:
    """Every turn as a question of its own, in a fresh conversation."""
    if len(example.turns) == 1:
        ((question, answer),) = example.turns
        return [Question(example.id, question, example.answers or [answer], example.question_type)]
    return [
        Question(f"{example.id}#{turn}", question, [answer], example.question_type)
        for turn, (question, answer) in enumerate(example.turns)
    ]


def by_image(examples: Iterable[Example], window: int = WINDOW) -> Iterator[ImageQuestions]:
    """Questions brought together by image, images in order of appearance, within windows of examples."""
    examples = iter(examples)
    while part := list(islice(examples, window)):
        together: dict[tuple[str, str], ImageQuestions] = {}
        for example in part:
            # A name alone is not enough: rows that share one may be about different images.
            content = _content_id(example.images)
            image_id = example.image_id or content
            first = together.setdefault((image_id, content), ImageQuestions(image_id, example.images, []))
            first.questions.extend(questions_of(example))
        yield from together.values()


def with_own_ids(examples: Iterable[Example], repeated: set[str]) -> Iterator[Example]:
    """The examples, of which those that repeat an earlier one's id get one of their own: `id~2`, `id~3`, ... in order.

    Args:
        repeated: takes the ids that occur more than once.
    """
    seen: Counter[str] = Counter()
    for example in examples:
        name = example.id
        while name in seen:
            repeated.add(example.id)
            seen[example.id] += 1
            name = f"{example.id}~{seen[example.id]}"
        seen[name] = 1
        yield example if name == example.id else replace(example, id=name)


def _content_id(images: list[dict]) -> str:
    """Equal for images with equal paths or bytes."""
    parts = [
        image["bytes"] if image.get("bytes") is not None else str(image["path"]).encode() for image in images
    ]
    return hashlib.blake2b(
        b"".join(hashlib.sha256(part).digest() for part in parts), digest_size=10
    ).hexdigest()


def answer_all(
    answerer: Answerer,
    asked: Iterable[ImageQuestions],
    predictions: Predictions,
    metric: Metric,
    batch_size: int,
) -> None:
    """Asks what `predictions` has no answer to, about `batch_size` questions at a time, and appends the records."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; wanted 1 or more.")
    done = predictions.done
    progress = tqdm(desc=answerer.mode, unit=" questions", initial=len(done))
    for batch in _batches(asked, batch_size):
        _answer_batch(answerer, batch, predictions, metric, batch_size, done, progress)
    progress.close()


def _batches(asked: Iterable[ImageQuestions], batch_size: int) -> Iterator[list[ImageQuestions]]:
    """Whole images until there are `batch_size` questions; what was answered already does not change the batches."""
    batch: list[ImageQuestions] = []
    for image in asked:
        batch.append(image)
        if sum(len(other.questions) for other in batch) >= batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _answer_batch(
    answerer: Answerer,
    batch: list[ImageQuestions],
    predictions: Predictions,
    metric: Metric,
    batch_size: int,
    done: Container[str],
    progress: tqdm,
) -> None:
    left = [[q for q in image.questions if q.id not in done] for image in batch]
    if answerer.mode in ("llava", "split"):  # nothing is remembered from image to image
        batch = [image for image, questions in zip(batch, left, strict=True) if questions]
        left = [questions for questions in left if questions]
    if not batch:
        return
    if bare := [item.questions[0].id for item in batch if not item.images]:
        raise ValueError(f"Row {bare[0]} has no image; wanted one or more in every row.")
    prepared = answerer.prepare([[open_image(image) for image in item.images] for item in batch])
    unanswered = [(i, question) for i, questions in enumerate(left) for question in questions]
    for first in range(0, len(unanswered), batch_size):
        part = unanswered[first : first + batch_size]
        texts = answerer.answer([prepared[i] for i, _ in part], [question.question for _, question in part])
        predictions.append(
            {
                "id": question.id,
                "image_id": batch[i].image_id,
                "question": question.question,
                "prediction": text,
                "answers": question.answers,
                "question_type": question.question_type,
                "score": metric.score(text, question.answers),
                **prepared[i].reuse,
            }
            for (i, question), text in zip(part, texts, strict=True)
        )
        progress.update(len(part))


# ---- summary


def _counts(metric: Metric, records: list[dict]) -> np.ndarray:
    return metric.counts([r["prediction"] for r in records], [r["answers"] for r in records])


def summarize(
    records: list[dict], scored_as: Task, baseline: list[dict] | None = None, seed: int = 0
) -> dict:
    """Figures of records, overall and by group; reuse; and with `baseline` the paired differences to its records.

    Raises:
        ValueError: the baseline's questions are others.
    """
    metric = scored_as.metric
    images = [record["image_id"] for record in records]
    groups = [scored_as.groups(record["question_type"]) for record in records]
    counts = _counts(metric, records)
    found = figures(metric, counts, images, groups, seed=seed)
    summary = {
        "metric": metric.name,
        "figures": list(metric.figures),
        "interval": f"{CONFIDENCE:.0%}, {RESAMPLES} resamples of images",
        "overall": found.pop(""),
        "by_group": found,
        "reuse": reuse(records),
    }
    if metric.needs_all:
        summary["tokenizer"] = caption_tokenizer()
    if baseline is not None:
        other = _same_questions(records, baseline)
        difference = figures(metric, counts, images, groups, _counts(metric, other), seed=seed)
        summary["difference"] = {"overall": difference.pop(""), "by_group": difference}
    return summary


def _same_questions(records: list[dict], baseline: list[dict]) -> list[dict]:
    by_id = {record["id"]: record for record in baseline}
    here = {record["id"] for record in records}
    missing, extra = here - by_id.keys(), by_id.keys() - here
    if missing or extra:
        raise ValueError(
            f"The baseline lacks {len(missing)} of {len(here)} questions and has {len(extra)} others; "
            "wanted the same questions."
        )
    other = [by_id[record["id"]] for record in records]
    for mine, theirs in zip(records, other, strict=True):
        if (mine["question"], mine["answers"]) != (theirs["question"], theirs["answers"]):
            raise ValueError(
                f"Question {mine['id']} or its answers differ in the baseline; wanted the same data."
            )
    return other


def reuse(records: list[dict]) -> dict[str, float]:
    """Shares over the images (each once): matched, patches taken from a known background, vision tokens reused."""
    once = list({record["image_id"]: record for record in records}.values())

    def share(part: str, of: str) -> float:
        return sum(record[part] for record in once) / sum(record[of] for record in once)

    return {
        "images_matched": share("matched", "images"),
        "patches_reused": share("patches_reused", "patches"),
        "vision_tokens_reused": share("tokens_reused", "tokens"),
    }


def _cell(value: dict, signed: bool = False) -> str:
    if value["value"] is None:
        return "-"
    form = "{:+.1f}" if signed else "{:.1f}"
    if value["low"] is None:
        return form.format(100 * value["value"])
    low, high = (form.format(100 * value[end]) for end in ("low", "high"))
    return f"{form.format(100 * value['value'])} [{low}, {high}]"


def markdown(summary: dict) -> str:
    """The summary as a table; figures times 100, intervals in brackets."""
    names = summary["figures"]
    difference = summary.get("difference")
    head = [*names, *(f"{name} - baseline" for name in names if difference)]
    lines = [
        "| questions about | count | images | " + " | ".join(head) + " |",
        "|---|---:|---:|" + "---:|" * len(head),
    ]
    for group, row in {"all": summary["overall"], **summary["by_group"]}.items():
        cells = [_cell(row[name]) for name in names]
        if difference:
            other = difference["overall"] if group == "all" else difference["by_group"][group]
            cells += [_cell(other[name], signed=True) for name in names]
        lines.append(f"| {group} | {row['questions']} | {row['images']} | " + " | ".join(cells) + " |")
    shares = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in summary["reuse"].items())
    if summary.get("bad_rows"):
        shares += f"; {summary['bad_rows']} bad rows left out"
    return "\n".join(
        [*lines, "", f"{summary['metric']}, times 100; intervals {summary['interval']}. {shares}.", ""]
    )


# ---- the whole


def evaluate_examples(
    model: BackdropForConditionalGeneration,
    processor: BackdropProcessor,
    examples: Iterable[Example],
    *,
    data: str,
    mode: str,
    out: Path,
    header: dict,
    tolerance: float = 0.0,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    baseline: Path | None = None,
    bad_rows: BadRows | None = None,
    replace: bool = False,
) -> dict:
    """Answers, scores and writes `predictions.jsonl`, `summary.json` and `summary.md` into `out`; the summary.

    Args:
        header: what the answers depend on besides mode, tolerance and `max_new_tokens`.
        baseline: predictions of another run on the same questions.
        bad_rows: where `examples` counts the rows that it leaves out.
        replace: predictions in `out` that depend on something else are begun anew.
    """
    scored_as = task(data)
    longest = max_new_tokens or scored_as.max_new_tokens
    # Before any work: a baseline that cannot be read, or a metric whose library is missing, must not cost a run.
    other = read_predictions(baseline)[1] if baseline is not None else None
    scored_as.metric.counts([], [])
    answerer = Answerer(model, processor, mode, tolerance, longest)
    tolerance_used = tolerance if mode == "matched" else None
    header = {"data": data, **header, "mode": mode, "tolerance": tolerance_used, "max_new_tokens": longest}
    predictions = Predictions(out / PREDICTIONS, header, replace)
    repeated: set[str] = set()
    asked = by_image(with_own_ids(examples, repeated))
    answer_all(answerer, asked, predictions, scored_as.metric, batch_size)
    summary = header | summarize(predictions.records, scored_as, other)
    if repeated:
        named = sorted(repeated)
        shown = ", ".join(named[:5]) + (", ..." if len(named) > 5 else "")
        logger.warning(
            f"{len(named)} ids name more than one row ({shown}); each later one is asked as id~2, id~3, ..."
        )
        summary["repeated_ids"] = named
    if baseline is not None:
        summary["baseline"] = baseline.name
    if bad_rows is not None:
        summary["bad_rows"] = len(bad_rows)
    write_atomically(out / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    write_atomically(out / TABLE, markdown(summary))
    return summary


def run_evaluation(
    model: str,
    data: str,
    source: str,
    *,
    split: str,
    images: str | None = None,
    mode: str = "split",
    tolerance: float = 0.0,
    out: Path,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    baseline: Path | None = None,
    device: str = "auto",
) -> dict:
    """`evaluate_examples` of a model (a folder or a Hub id) and a dataset by its name; see there."""
    from backdrop.data.load import examples

    task(data)
    loaded, processor = load(model, device)
    bad_rows = BadRows()
    rows = examples(
        data,
        source,
        split=split,
        images=images,
        limit=limit,
        streaming=True,
        bad_rows=bad_rows,
        check_images=True,
    )
    header = {"model": model, "source": source, "split": split, "limit": limit}
    header |= model_fingerprint(loaded, processor, model)
    return evaluate_examples(
        loaded,
        processor,
        rows,
        data=data,
        mode=mode,
        out=out,
        header=header,
        tolerance=tolerance,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        baseline=baseline,
        bad_rows=bad_rows,
    )
