"""A ladder: a chain of recipes, each of which starts from the checkpoint of the one before, and each scored.

    backdrop ladder experiments/recipes/ladder/scenes.yaml

The chain's file names the start and the command that makes it (`made_by`), the stages (recipes beside it), what all of them have in common (`common`), how rows
are made (`rows`) or where they are (`common: {dataset: ...}`), and the score. A run that was cut off goes on.
"""

import json
from pathlib import Path

import yaml

from backdrop.data.atomic import write_atomically
from backdrop.scenes.exam_report import percent

from .steps import headline, read_score, require_start, scene_rows, train_stage

KEYS = {"start", "made_by", "out", "stages", "common", "rows", "score"}
OPTIONAL = {"made_by", "rows", "common"}


def read_chain(path: Path) -> dict:
    """The chain's file, with its stages as name -> recipe.

    Raises:
        ValueError: a key that no chain has, or a recipe that is not there.
    """
    chain = yaml.safe_load(path.read_text())
    unknown, missing = sorted(set(chain) - KEYS), sorted(KEYS - OPTIONAL - set(chain))
    if unknown or missing:
        raise ValueError(
            f"{path.name} has unknown keys {unknown} and lacks {missing}; wanted {sorted(KEYS)}."
        )
    stages = {}
    for name in chain["stages"]:
        recipe = path.parent / name
        if not recipe.is_file():
            raise ValueError(f"{path.name} names the stage {name!r}, but {recipe} is not there.")
        stages[recipe.stem] = yaml.safe_load(recipe.read_text())
    return chain | {"stages": stages, "score": {k: dict(v) for k, v in chain["score"].items()}}


def run_ladder(chain: dict) -> dict:
    """Runs and scores every stage: name -> form -> the headline figure, with the paired difference to the first stage."""
    out, start = Path(chain["out"]), chain["start"]
    require_start(start, chain.get("made_by"))
    report: dict = {"start": Path(start).name, "stages": {}}
    first = None
    for name, recipe in chain["stages"].items():
        recipe = {**recipe, **chain.get("common", {}), **_own(recipe)}
        if recipe.get("train", True) and chain.get("rows"):
            recipe["dataset"] = str(scene_rows(start, chain["rows"], out / "rows"))
        start = train_stage(recipe, start, out / name / "stage")
        score = read_score(chain["score"].get(name, chain["score"]["default"]))
        found = score.records(start, out / name / "score")
        scores = {form: headline(records, score.metric) for form, records in found.items()}
        first = first or next(iter(found.values()))
        for form, records in found.items():
            scores[form]["difference"] = headline(records, score.metric, first)
        report["stages"][name] = scores
        print(f"{name}: " + ", ".join(f"{form} {s['value']:.1%}" for form, s in scores.items()), flush=True)
    return report


def _own(recipe: dict) -> dict:
    """The keys that make a stage what it is: `common` does not override them."""
    return {
        key: recipe[key]
        for key in ("stage", "requires_stage", "train", "trainable", "train_last_layers")
        if key in recipe
    }


def markdown(report: dict) -> str:
    """The report as a table, a row per stage and form."""
    lines = [
        "| stage | form | questions | score, % [95%] | to stage 1 [95%, paired] |",
        "|---|---|---:|---:|---:|",
    ]
    for stage, scores in report["stages"].items():
        for form, score in scores.items():
            lines.append(
                f"| {stage} | {form} | {score['questions']} | {percent(score)} | {percent(score['difference'], True)} |"
            )
    return "\n".join(lines)


def write_report(report: dict, path: Path) -> None:
    """Writes the report as JSON, and its table (.md) beside it."""
    write_atomically(path, json.dumps(report, indent=2) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(report) + "\n")
