"""A matrix of recipes on the same data and questions, one table, one plot.

    backdrop ablate experiments/recipes/ablate_scenes.yaml --report docs/results/data/ablations.json

The matrix names a `base` recipe and `axes`: what to change, one value at a time (`design: one_at_a_time`, a star around
the base) or in all combinations (`design: product`). Rows of made scenes (`rows`) are made by each cell's own processor, so
that a cell can change the split; other data is named in the base (`dataset`, `dataset_name`). Every cell is a recipe (kept in its
folder), run once for each seed; a run that was cut off goes on.
Differences to the base are paired: same questions, same seed.
"""

import itertools
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tqdm import tqdm

from backdrop.data.atomic import write_atomically
from backdrop.scenes.exam_report import percent

from .steps import SWITCHES, headline, read_score, require_start, scene_rows, train_stage

KEYS = {"start", "made_by", "out", "design", "seeds", "rows", "score", "base", "axes"}
DESIGNS = ("one_at_a_time", "product")
BASE = "base"
FAR = 15  # points from the base; the plot prints scores farther off as numbers at its edge
WHERE = ("use_cpu", "bf16", "fp16")  # without them TrainingArguments refuses a machine that has no GPU


@dataclass(frozen=True)
class Cell:
    """One recipe of the matrix.

    Attributes:
        changes: axis -> value's name.
        recipe: what is trained, and how.
        rows, start: the cell's own where it has them, else the matrix's.
        score: how it is scored; `loaded` there (`load_in_8bit`, ...) is for the score alone, it trains in full precision.
    """

    changes: dict[str, str]
    recipe: dict
    rows: dict
    score: dict
    start: str = ""

    @property
    def name(self) -> str:
        """The changes as `axis=value`, comma-separated; `BASE` without any."""
        return ", ".join(f"{axis}={value}" for axis, value in self.changes.items()) or BASE

    @property
    def folder(self) -> str:
        """The name, as a folder may be called."""
        return self.name.replace(", ", "+").replace("/", "_").replace(" ", "_")


@dataclass
class Matrix:
    """What is to be run, as the matrix file says it; the module's docstring explains the fields.

    Raises:
        ValueError: a field that cannot be as it is.
    """

    start: str
    out: str
    score: dict
    base: dict
    axes: dict[str, dict[str, dict]]
    rows: dict = field(default_factory=dict)
    made_by: str | None = None  # the command that makes the start
    design: str = "one_at_a_time"
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise ValueError(f"design is {self.design!r}; wanted one of {', '.join(DESIGNS)}.")
        if not self.axes or not self.seeds:
            raise ValueError("The matrix has no axes or no seeds; wanted one of each or more.")
        if not self.rows and "dataset" not in self.base:
            raise ValueError("The matrix has neither rows nor base.dataset; wanted one of them.")
        read_score(self.score)
        for axis, values in self.axes.items():
            if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
                raise ValueError(f"axes.{axis} is {values!r}; wanted value names with what each changes.")

    def cells(self) -> list[Cell]:
        """Base first."""
        if self.design == "product":
            names = [[(axis, value) for value in values] for axis, values in self.axes.items()]
            return [self._cell(dict(combination)) for combination in itertools.product(*names)]
        star = [self._cell({axis: value}) for axis, values in self.axes.items() for value in values]
        return [self._cell({}), *star]

    def trained_as(self, cell: Cell) -> Cell:
        """The first cell that trains as this one does: cells that differ in how they are scored share one training."""

        def training(of: Cell) -> tuple:
            return of.recipe, of.rows, of.start

        return next(other for other in self.cells() if training(other) == training(cell))

    def _cell(self, changes: dict[str, str]) -> Cell:
        recipe, rows = dict(self.base), dict(self.rows)
        score, start = dict(self.score), self.start
        for axis, value in changes.items():
            change = dict(self.axes[axis][value])
            rows |= change.pop("rows", {})
            score |= change.pop("score", {})
            start = change.pop("start", start)
            recipe |= change
        read_score(score)
        return Cell(changes, recipe, rows, score, start)


def read_matrix(path: Path) -> Matrix:
    """The file as a matrix.

    Raises:
        ValueError: a key that a matrix does not have, or a value it cannot take.
    """
    values = yaml.safe_load(path.read_text())
    wrong = sorted(set(values) - KEYS)
    missing = sorted({"start", "out", "score", "base", "axes"} - set(values))
    if wrong or missing:
        raise ValueError(f"{path.name} has unknown keys {wrong} and lacks {missing}; wanted {sorted(KEYS)}.")
    return Matrix(**values)


def run_cell(cell: Cell, seed: int, matrix: Matrix) -> dict:
    """Runs one cell: sets its switches, makes its rows, trains, scores.

    Returns:
        `{"records": form -> records, "minutes": that training took}`.
    """
    folder = Path(matrix.out, f"seed{seed}")
    out = folder / matrix.trained_as(cell).folder
    switches = {key: value for key, value in cell.recipe.items() if key in SWITCHES}
    training = {key: value for key, value in cell.recipe.items() if key not in SWITCHES}
    for key in ("image_position",):  # the rows follow it too
        if key in switches:
            training[key] = switches[key]
    where = {key: cell.recipe[key] for key in WHERE if key in cell.recipe}
    start = train_stage({"train": False, **switches, **where}, cell.start, out / "start")
    if matrix.rows:
        training["dataset"] = str(scene_rows(start, cell.rows, Path(matrix.out, "rows")))
    begun, log = time.monotonic(), out / "stage" / "train.log"
    before = log.stat().st_mtime_ns if log.is_file() else None
    model = (
        train_stage({**training, "seed": seed}, start, out / "stage")
        if training.get("train", True)
        else start
    )
    minutes = out / "minutes.json"
    if not minutes.is_file() or (log.stat().st_mtime_ns if log.is_file() else None) != before:
        write_atomically(minutes, json.dumps((time.monotonic() - begun) / 60) + "\n")
    return {
        "records": read_score(cell.score).records(model, folder / cell.folder / "score"),
        "minutes": round(json.loads(minutes.read_text()), 1),
    }


def run_matrix(matrix: Matrix) -> dict:
    """All cells of all seeds; the report."""
    cells = matrix.cells()
    require_start(matrix.start, matrix.made_by)
    found: dict[tuple[str, int], dict] = {}
    failed: dict[str, str] = {}
    work = [(cell, seed) for seed in matrix.seeds for cell in cells]
    for cell, seed in tqdm(work, desc="cells"):
        try:
            found[cell.name, seed] = run_cell(cell, seed, matrix)
        except (ImportError, RuntimeError, ValueError) as error:
            # The report holds the other cells; the one that failed is named beside the table.
            failed[f"{cell.name}, seed {seed}"] = str(error)
            tqdm.write(f"{cell.name}, seed {seed}: {error}", file=sys.stderr)
    base, metric = cells[0].name, read_score(matrix.score).metric
    rows = []
    for cell in cells:
        for seed in matrix.seeds:
            if (cell.name, seed) not in found:
                continue
            result = found[cell.name, seed]
            for form, records in result["records"].items():
                row = {"cell": cell.name, "changes": cell.changes, "seed": seed, "form": form}
                row |= {"minutes": result["minutes"], "score": headline(records, metric)}
                other = _comparable(found.get((base, seed)), form)
                if cell.name != base and other is not None:
                    row["to_base"] = headline(records, metric, other)
                rows.append(row)
    return {
        "metric": metric.name,
        "base": matrix.base,
        "rows": matrix.rows,
        "score": matrix.score,
        "cells": rows,
        "failed": failed,
    }


def _comparable(base: dict | None, form: str) -> list[dict] | None:
    """The base's answers to the same questions, in the same form; whole images are compared with split ones."""
    if base is None:
        return None
    records = base["records"]
    return records.get(form) or (records.get("split") if form == "llava" else None)


def markdown(report: dict) -> str:
    """The report as a table, a row per cell, seed and form."""
    lines = [
        "| cell | form | seed | questions | score, % [95%] | to base [95%, paired] | minutes |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in report["cells"]:
        difference = percent(row["to_base"], True) if "to_base" in row else ""
        match = row["score"]
        lines.append(
            f"| {row['cell']} | {row['form']} | {row['seed']} | {match['questions']} | {percent(match)} | {difference} | "
            f"{row['minutes']} |"
        )
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    """Score of every cell with its interval, one panel per form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Whole images answer the same questions as split ones: one panel.
    shown = [row | {"panel": "split" if row["form"] == "llava" else row["form"]} for row in report["cells"]]
    forms = list(dict.fromkeys(row["panel"] for row in shown))
    names = list(dict.fromkeys(row["cell"] for row in shown))
    height = 1.2 + 0.32 * len(names)
    figure, panels = plt.subplots(
        1, len(forms), figsize=(4.6 * len(forms) + 2, height), sharex=True, sharey=True, squeeze=False
    )
    ends = []  # of all panels, which have the same axes
    for axis, form in zip(panels[0], forms, strict=True):
        rows = [row for row in shown if row["panel"] == form]
        bases = [100 * row["score"]["value"] for row in rows if row["cell"] == names[0]]
        middle = bases[0] if bases else 100 * rows[0]["score"]["value"]
        left, right = middle, middle
        for row in rows:
            match = row["score"]
            value, low, high = (100 * match[key] for key in ("value", "low", "high"))
            place = len(names) - 1 - names.index(row["cell"])
            colour = "#111827" if row["cell"] == names[0] else "#7d3fb5"
            if abs(value - middle) > FAR:
                # What is far off would leave no room to tell the others apart.
                axis.annotate(
                    f"{value:.1f}",
                    (0.04 if value < middle else 0.96, place),
                    xycoords=axis.get_yaxis_transform(),
                    ha="left" if value < middle else "right",
                    va="center",
                    color=colour,
                    bbox={"boxstyle": "larrow" if value < middle else "rarrow", "fc": "none", "ec": colour},
                )
                continue
            left, right = min(left, low), max(right, high)
            marker = "s" if row["form"] == "llava" else "o"
            axis.errorbar(
                value, place, xerr=[[value - low], [high - value]], fmt=marker, color=colour, capsize=3
            )
            if row["cell"] == names[0]:
                axis.axvspan(low, high, color=colour, alpha=0.08, lw=0)
        ends += [left, right]
        squares = any(row["form"] == "llava" for row in rows)
        axis.set_title(f"{form} (squares: whole images)" if squares else form)
        axis.set_xlabel(f"{report['metric']}, % [95%]")
        axis.grid(axis="x", alpha=0.3)
    panels[0][0].set_xlim(min(ends) - 1, max(ends) + 1)
    panels[0][0].set_yticks(range(len(names)), names[::-1])
    figure.tight_layout()
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
    os.replace(partial, path)


def write_report(report: dict, path: Path, matrix_path: Path) -> None:
    """Writes the report as JSON; its table (.md), headed by the command that makes it, and its plot (.png) beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(report, indent=2, default=str) + "\n")
    command = f"`backdrop ablate {matrix_path} --report {path}`"
    write_atomically(path.with_suffix(".md"), f"{command}\n\n{markdown(report)}\n")
    if report["cells"]:
        plot(report, path.with_suffix(".png"))
