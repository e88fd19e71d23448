"""What belongs to a dataset's name: its metric, how long an answer may be, and the groups of questions it reports.

The questions themselves, with LLaVA's prompt suffixes ("Answer the question using a single word or phrase."), are
made where the rows are read (`backdrop.data.load`), the same ones for training and evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .metrics import METRICS, Metric, gqa_types

LONGEST_ANSWER = 128  # as LLaVA's model_vqa_loader.py


def _as_named(question_type: str) -> list[str]:
    return [question_type] if question_type else []


@dataclass(frozen=True)
class Task:
    """How answers to a dataset are scored.

    Attributes:
        metric: what scores them.
        groups: question type -> the groups that its figures are reported for.
        max_new_tokens: longest answer.
    """

    metric: Metric
    groups: Callable[[str], list[str]] = _as_named
    max_new_tokens: int = LONGEST_ANSWER


TASKS: dict[str, Task] = {
    "vqav2": Task(METRICS["vqav2"]),
    "textvqa": Task(METRICS["textvqa"]),
    "ocrvqa": Task(METRICS["ocrvqa"]),
    "gqa": Task(METRICS["gqa"], gqa_types),
    "pope": Task(METRICS["pope"]),
    "coco_captions": Task(METRICS["captions"]),
    "flickr30k": Task(METRICS["captions"]),
    "ade20k": Task(METRICS["names"]),
    "rows": Task(METRICS["exact"]),
    "scenes": Task(METRICS["exact"], max_new_tokens=16),
}


def task(name: str) -> Task:
    """The task of a dataset, by the name that `backdrop.data.load` knows it under."""
    if name not in TASKS:
        raise ValueError(f"data is {name!r}; wanted one of {', '.join(TASKS)}.")
    return TASKS[name]
