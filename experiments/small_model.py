"""The small model and its accuracy table from nothing but seeds, in one command.

    backdrop scenes model --work runs/scenes --report docs/results/data/scenes-accuracy.json
    backdrop scenes model --work runs/seed1 --seed 1 --size reduced --report docs/results/data/scenes-accuracy-seed1.json
    backdrop scenes model --work runs/scenes --until scenes_llava_2

Detector, tower, base model, rows in both forms, the recipes scenes_llava_1 to 4 (plain LLaVA) and scenes_split, which goes
on in groups where scenes_llava_4 goes on with whole images; and the questions: same scenes, steps and sizes for both. A
run that was cut off goes on with the step it was in.
"""

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from backdrop.evaluation.answering import load
from backdrop.scenes.exam import run_scenes
from backdrop.scenes.exam_report import write_report

from .steps import folder_digest, run_logged, step, train_stage

RECIPES = Path(__file__).parent / "recipes"
LLAVA = tuple(f"scenes_llava_{stage}" for stage in (1, 2, 3, 4))
GROUPS = "scenes_split"  # starts from the third of them
# The third and the fourth stage train on rows of their own: the third's also ask in which column something is, the fourth's ask
# less, and more often for what the model still got wrong.
PLACED = {"places": 3}
HARD = {
    "questions": 5,
    "places": 2,
    "families": "phone=5,street=6,panel=3",
    "topics": "plate=5,side=6,toggle=6,count=3,time=2,alarm=2,presence=2,name=2",
}
WHOLE = {"whole": 1, "pair": 0, "stale": 0}
SHARES = {"whole": 0.05, "pair": 0.3, "stale": 0.35}  # the rest is split


@dataclass(frozen=True)
class Size:
    """How much of everything: images, epochs, steps, scenes."""

    detector_images: int
    detector_epochs: int
    tower_images: int
    tower_steps: int
    row_scenes: int
    steps: tuple[int, int, int, int]
    eval_scenes: int
    questions: int = 3


SIZES = {
    "full": Size(3000, 8, 8000, 1000, 10_000, (900, 400, 800, 900), 3800),
    "reduced": Size(1200, 6, 4000, 700, 5000, (600, 200, 400, 400), 800),
    "miniature": Size(16, 1, 32, 2, 32, (2, 1, 1, 1), 8),
}


def make(
    work: Path, seed: int, size: Size, detector: Path | None = None, jobs: int = 1, until: str | None = None
) -> tuple[Path, ...]:
    """Trains both models; their folders, the LLaVA form first.

    Args:
        detector: a model folder whose detector is taken instead of training one.
        jobs: 2 trains both forms of the last stage at a time.
        until: one of the first three stages; ends with its model, what ladders and ablations start from.
    """
    base = _base(work, seed, size, detector)

    rows = _rows(work, seed, size, base, WHOLE, "whole_1")

    def train(name: str, start: Path, data: Path, steps: int) -> Path:
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
        recipe |= {"dataset": str(data), "max_steps": steps, "seed": recipe["seed"] + 1000 * seed}
        recipe["warmup_steps"] = min(recipe["warmup_steps"], steps // 4)
        return train_stage(recipe, start, work / name)

    start = base
    for name, steps in zip(LLAVA[:3], size.steps[:3], strict=True):
        if name == LLAVA[2]:
            rows = _rows(work, seed + 1, size, base, WHOLE | PLACED, "whole_3")
        start = train(name, start, rows, steps)
        if name == until:
            return (start,)
    hard = _rows(work, seed + 2, size, base, WHOLE | HARD, "whole_4")
    groups = _rows(work, seed + 2, size, base, SHARES | HARD, "split")
    with ThreadPoolExecutor(jobs) as pool:  # the work itself is done by child processes
        llava = pool.submit(train, LLAVA[3], start, hard, size.steps[3])
        split = pool.submit(train, GROUPS, start, groups, size.steps[3])
        return llava.result(), split.result()


def _base(work: Path, seed: int, size: Size, detector: Path | None) -> Path:
    checkpoint = work / "detector" / "detector.pt"
    if detector is None:
        _command(
            work / "detector",
            ["detector", "--out", work / "detector", "--images", size.detector_images, "--epochs"]
            + [size.detector_epochs, "--seed", seed, "--test-images", max(16, size.eval_scenes // 10)],
        )
    _command(
        work / "tower",
        [
            "tower",
            "--out",
            work / "tower",
            "--images",
            size.tower_images,
            "--steps",
            size.tower_steps,
        ]
        + [
            "--num-hidden-layers",
            4,
            "--validation-images",
            min(512, size.tower_images),
            "--seed",
            seed,
            "--resume",
        ]
        + ["--warmup-steps", min(60, size.tower_steps // 4), "--batch-size", 32],
    )
    source = ["--detector", checkpoint] if detector is None else ["--detector-of", detector]
    base = work / "base"
    _command(
        base,
        ["base-model", "--tower", work / "tower" / "vision_tower", *source, "--out", base, "--seed", seed],
        start=folder_digest(work / "tower" / "vision_tower")
        + (
            hashlib.sha256(checkpoint.read_bytes()).hexdigest()
            if detector is None
            else folder_digest(detector)
        ),
    )
    return base


def _rows(work: Path, seed: int, size: Size, base: Path, shares: dict, name: str) -> Path:
    folder = work / f"rows_{name}"
    arguments = [
        "rows",
        "--model",
        base,
        "--out",
        folder / "rows",
        "--scenes",
        size.row_scenes,
        "--seed",
        seed,
    ]
    for share, value in shares.items():
        arguments += [f"--{share}", value]
    _command(folder, arguments, start=folder_digest(base))
    return folder / "rows"


def _command(folder: Path, arguments: list, start: str = "") -> None:
    """Runs one command of `backdrop scenes` as a step; what it has written stays there when it is cut off."""
    words = [str(argument) for argument in arguments]

    def work() -> None:
        print(" ".join(words), flush=True)
        run_logged([sys.executable, "-m", "backdrop", "scenes", *words], folder / "log.txt")

    step(folder, {"arguments": words, "start": start}, work)


def make_table(
    work: Path, report_path: Path, seed: int, size: Size, detector: Path | None = None, jobs: int = 1
) -> tuple[dict, tuple[Path, Path]]:
    """Trains both models and scores them: the report, also written (JSON, and a table beside it), and the models' folders.

    Args: see `make`.
    """
    llava, groups = make(work, seed, size, detector, jobs)
    sources = {"llava": str(llava), "model": str(groups)}
    report = run_scenes(
        {name: load(source, "cpu") for name, source in sources.items()},
        sources,
        scenes=size.eval_scenes,
        questions=size.questions,
        work=work / "answers",
        seed=seed,
    )
    report |= {"size": asdict(size), "training_seed": seed}
    write_report(report, report_path)
    return report, (llava, groups)
