"""The committed small model is what this source exports, and it answers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import EXAMPLE, ROOT

from backdrop import modeling, processing
from backdrop.experiments.steps import SceneScore, headline
from backdrop.hub_export.model_card import read_figures
from backdrop.hub_export.renew import outdated, renew
from backdrop.scenes.exam import FORMS

FOLDER = EXAMPLE
NOTES = ROOT / "docs" / "scenes-model.md"
QUESTIONS = ["How many vehicles are there?"]
FIGURES = ROOT / "docs" / "results" / "data" / "scenes-accuracy.json"


def test_its_code_and_card_are_of_this_source():
    changes = outdated(
        FOLDER,
        notes=NOTES.read_text(encoding="utf-8"),
        system_prompt="",
        language=["en"],
        figures=read_figures(FIGURES),
        questions=QUESTIONS,
    )
    assert not changes, f"{', '.join(changes)} of {FOLDER.name} differ from the source: run `make example`"


def test_renewing_changes_code_and_texts_and_nothing_else(tmp_path):
    folder = tmp_path / FOLDER.name
    shutil.copytree(FOLDER, folder)
    options = {"notes": NOTES.read_text(encoding="utf-8"), "system_prompt": ""}
    renew(folder, **options)  # whatever the state of the example itself
    current = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = {
        source.name: source.read_bytes()
        for package in (modeling, processing)
        for source in Path(package.__file__).parent.glob("*_backdrop.py")
    }
    assert code and code == {name: data for name, data in current.items() if name.endswith(".py")}
    (folder / "modeling_backdrop.py").write_text("# old")
    (folder / "gone_backdrop.py").write_text("# of an earlier version")
    (folder / "README.md").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    wanted = ["README.md", "chat_template.jinja", "gone_backdrop.py", "modeling_backdrop.py"]
    assert renew(folder, **options) == wanted
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == current
    assert renew(folder, **options) == []
    for path in FOLDER.iterdir():
        if path.suffix in (".safetensors", ".json"):
            assert current[path.name] == path.read_bytes()


@pytest.mark.real
def test_it_answers_about_backgrounds_it_never_saw(tmp_path):
    """A floor far below the accuracy in its card, and far above chance: a broken split or load falls through it."""
    forms = tuple(FORMS)
    score = SceneScore(forms=forms, scenes=16, questions=2, seed=7, split="test")
    found = score.records(FOLDER, tmp_path)
    assert set(found) == set(forms)
    for form, records in found.items():
        assert headline(records, score.metric)["value"] > (0.6 if form == "stale" else 0.85), form
    reused = {
        form: sum(record["patches_reused"] or 0 for record in records) for form, records in found.items()
    }
    assert reused["exact"] > 0 and reused["matched"] > 0


@pytest.mark.real
def test_the_demo_ends_with_answers_reuse_and_times(tmp_path):
    command = [
        sys.executable,
        "-m",
        "backdrop",
        "demo",
        "--frames",
        "20",
        "--model",
        FOLDER,
        "--json",
        "--show",
        tmp_path,
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert len(figures["answers"]) == 20 and figures["answers"][0]["background"] == "miss"
    assert figures["background_hits"] >= 10 and figures["share_of_vision_tokens_reused"] > 0.2
    assert figures["right"] >= 18 and abs(figures["right"] - figures["right_cold"]) <= 2
    assert figures["first_token_reused_ms"] > 0 and figures["first_token_cold_ms"] > 0
    assert (tmp_path / "frames.png").is_file() and (tmp_path / "frame-19.png").is_file()
