"""Ladders and matrices of recipes: their files, their steps, their reports."""

import pytest
import yaml
from datasets import Dataset
from paths import EXAMPLE, ROOT

from backdrop.experiments.ablate import Matrix, markdown, plot, read_matrix, run_matrix
from backdrop.experiments.ladder import read_chain, run_ladder
from backdrop.experiments.steps import step
from backdrop.train.stages import read_stage

RECIPES = ROOT / "experiments" / "recipes"


def test_the_ladder_reads_its_stages_and_refuses_unknown_keys(tmp_path):
    chain = read_chain(RECIPES / "ladder" / "scenes.yaml")
    stages = list(chain["stages"].values())
    assert [stage["stage"] for stage in stages] == [f"ladder_{i}" for i in range(1, 7)]
    assert [stage.get("requires_stage") for stage in stages[1:]] == [f"ladder_{i}" for i in range(1, 6)]
    wrong = tmp_path / "chain.yaml"
    wrong.write_text("start: x\nout: y\nstages: []\nscore: {}\nrow: {}\n")
    with pytest.raises(ValueError, match=r"unknown keys \['row'\]"):
        read_chain(wrong)


def test_what_an_experiment_needs_first_is_in_the_message(tmp_path, monkeypatch):
    """In a fresh checkout the model that a ladder starts from is not there."""
    monkeypatch.chdir(tmp_path)
    wanted = "start is 'runs/scenes/scenes_llava_2/model', where no model is; make it first: backdrop scenes model --work"
    with pytest.raises(ValueError, match=wanted):
        run_ladder(read_chain(RECIPES / "ladder" / "scenes.yaml"))
    with pytest.raises(ValueError, match=wanted):
        run_matrix(read_matrix(RECIPES / "ablate_scenes.yaml"))
    assert not any(tmp_path.iterdir())


@pytest.mark.real
@pytest.mark.slow
def test_a_matrix_and_a_ladder_run_from_start_to_report(tmp_path):
    """Far too few steps, but every step of both: switches set, rows made, trained, scored, a second run does nothing."""
    example = EXAMPLE
    rows = {"scenes": 8, "questions": 2}
    score = {"forms": ["split"], "scenes": 3, "questions": 1}
    cpu = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    recipe = {"trainable": ["multi_modal_projector"], "max_steps": 1, "assistant_only_loss": True, **cpu}
    axes = {
        "margin": {"0": {"margin": 0}},
        "position": {
            "behind": {
                "image_position": "in_place",
                "rows": {"image-position": "last"},
                "score": {"images_last": True},
            }
        },
        "bits": {"8": {"score": {"loaded": {"load_in_8bit": True, "int8_threshold": 0}}}},
    }
    matrix = {"start": str(example), "out": str(tmp_path / "matrix"), "rows": rows, "score": score}
    matrix |= {"base": {"split": True, **recipe}, "axes": axes}
    stages = {"first.yaml": {"train": False, "stage": "one"}}
    stages["second.yaml"] = {
        "trainable": ["lm_head"],
        "max_steps": 1,
        "stage": "two",
        "requires_stage": "one",
    }
    chain = {"start": str(example), "out": str(tmp_path / "ladder"), "stages": list(stages)}
    chain |= {"common": cpu, "rows": rows, "score": {"default": score}}
    for name, values in {**stages, "chain.yaml": chain, "matrix.yaml": matrix}.items():
        (tmp_path / name).write_text(yaml.safe_dump(values, sort_keys=False))

    report = run_matrix(read_matrix(tmp_path / "matrix.yaml"))
    assert not report["failed"], report["failed"]
    assert [row["cell"] for row in report["cells"]] == ["base", "margin=0", "position=behind", "bits=8"]
    assert all(row["score"]["questions"] == 3 for row in report["cells"])
    assert all("to_base" in row for row in report["cells"][1:])
    folders = (tmp_path / "matrix" / "rows").iterdir()
    texts = [Dataset.load_from_disk(folder / "rows")[0]["messages"][0]["content"] for folder in folders]
    (parts,) = [content for content in texts if isinstance(content, list)]
    assert [part["type"] for part in parts] == ["text", *["image"] * (len(parts) - 1)] and len(parts) > 1
    ladder = run_ladder(read_chain(tmp_path / "chain.yaml"))
    assert list(ladder["stages"]) == ["first", "second"]
    note = read_stage(tmp_path / "ladder" / "second" / "stage" / "model")
    assert note["stage"] == "two" and note["start"]["stage"] == "one"

    marks = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}
    assert run_matrix(read_matrix(tmp_path / "matrix.yaml"))["cells"] == report["cells"]
    assert run_ladder(read_chain(tmp_path / "chain.yaml"))["stages"] == ladder["stages"]
    assert marks == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("done.json")}


def test_a_matrix_is_a_star_or_a_product():
    questions = {axis for axis in read_matrix(RECIPES / "ablate_llava.yaml").axes}
    assert {"epochs", "detector", "bits", "attention mask", "separators", "prefusion", "margin"} <= questions
    matrix = read_matrix(RECIPES / "ablate_scenes.yaml")
    cells = matrix.cells()
    assert cells[0].name == "base" and len({cell.folder for cell in cells}) == len(cells)
    assert all(len(cell.changes) == 1 for cell in cells[1:])
    # What only the score changes is not trained again.
    shared = {cell.name for cell in cells[1:] if matrix.trained_as(cell) != cell}
    assert shared == {"bits=8", "bits=8, no outliers", "bits=4"}
    assert all(matrix.trained_as(cell) == cells[0] for cell in cells if cell.name in shared)
    axes = {
        "a": {"1": {"learning_rate": 1}, "2": {"rows": {"pair": 0}}},
        "b": {"x": {}, "y": {"score": {"forms": ["llava"]}}},
    }
    product = Matrix("s", "o", {"forms": ["split"]}, {"lr": 0}, axes, {"pair": 1}, design="product").cells()
    assert [cell.name for cell in product] == ["a=1, b=x", "a=1, b=y", "a=2, b=x", "a=2, b=y"]
    assert (
        product[3].score == {"forms": ["llava"]}
        and product[3].rows == {"pair": 0}
        and product[0].rows == {"pair": 1}
    )
    with pytest.raises(ValueError, match="neither rows nor base.dataset"):
        Matrix("s", "o", {}, {}, axes)
    with pytest.raises(ValueError, match=r"score has unknown keys \['form'\]"):
        Matrix("s", "o", {"form": "split"}, {"dataset": "d"}, axes)
    with pytest.raises(ValueError, match="design is 'cube'"):
        Matrix("s", "o", {}, {"dataset": "d"}, axes, design="cube")


def test_the_report_shows_only_cells_that_ran(tmp_path):
    match = {"value": 0.5, "low": 0.4, "high": 0.6, "questions": 10}
    cells = [
        {"cell": "base", "changes": {}, "seed": 0, "form": "split", "minutes": 1, "score": match},
        {"cell": "margin=0", "changes": {}, "seed": 0, "form": "split", "minutes": 1, "score": match}
        | {"to_base": {"value": -0.01, "low": -0.02, "high": 0.0}},
    ]
    text = markdown({"cells": cells, "metric": "exact match"})
    assert "| margin=0 | split | 0 | 10 | 50.0 [40.0, 60.0] | -1.0 [-2.0, +0.0] | 1 |" in text
    plot({"cells": cells, "metric": "exact match"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_is_done_once_and_never_over_foreign_files(tmp_path):
    calls = []
    assert step(tmp_path / "s", {"a": 1}, lambda: calls.append(1))
    assert not step(tmp_path / "s", {"a": 1}, lambda: calls.append(1))
    assert step(tmp_path / "s", {"a": 2}, lambda: calls.append(2)) and calls == [1, 2]

    def cut_off():
        (tmp_path / "t" / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step(tmp_path / "t", {}, cut_off)
    step(tmp_path / "t", {}, lambda: calls.append((tmp_path / "t" / "half").is_file()))
    assert calls[-1] is True
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "mine").write_text("x")
    with pytest.raises(ValueError, match="holds files of something else"):
        step(tmp_path / "u", {}, lambda: None)
