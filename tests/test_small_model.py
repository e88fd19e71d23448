"""A miniature of the small model's whole chain: the same command, recipes and table, far too few steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backdrop.evaluation.scenes import FORMS

EXAMPLE = Path(__file__).parent.parent / "examples" / "scenes-model"


@pytest.mark.real
@pytest.mark.slow
def test_the_accuracy_table_in_miniature(tmp_path):
    command = [
        sys.executable,
        "-m",
        "backdrop.train.small_model",
        "--work",
        tmp_path / "work",
        "--size",
        "miniature",
    ]
    command += ["--detector-of", EXAMPLE, "--report", tmp_path / "table.json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "table.json").read_text())
    assert set(report["forms"]) == set(FORMS)
    table = (tmp_path / "table.md").read_text()
    for name, form in report["forms"].items():
        overall = form["accuracy"]["overall"]
        assert overall["questions"] > 0 and name in table
    for name in ("split", "cached", "exact", "matched"):
        assert report["forms"][name]["differences"]["llava"]["overall"]["questions"] == 24
    for stage in ("scenes_llava_4", "scenes_split"):
        note = json.loads((tmp_path / "work" / stage / "model" / "backdrop_stage.json").read_text())
        assert note["stage"] == stage and note["start"]["stage"] == "scenes_llava_3"
        assert (tmp_path / "work" / stage / "model" / "trainable.json").is_file()
    # Done once: nothing of the chain runs again.
    before = (tmp_path / "work" / "scenes_split" / "done.json").stat().st_mtime_ns
    again = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert (
        again.returncode == 0
        and (tmp_path / "work" / "scenes_split" / "done.json").stat().st_mtime_ns == before
    )
