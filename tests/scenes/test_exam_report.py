"""Reports of exams on the made scenes: short JSON from which the committed tables follow."""

import json

import pytest
from paths import ROOT

from backdrop.scenes import exam_report

RESULTS = ROOT / "docs" / "results"
COMMITTED = ("scenes-accuracy", "scenes-accuracy-seed1", "smollm2-accuracy")


def record(number: int, right: bool) -> dict:
    return {
        "id": f"{number}/0",
        "background": f"phone/{number % 4}",
        "family": "phone",
        "topic": "time" if number % 2 else "label",
        "about": "object" if number % 2 else "background",
        "answers": ["07:30"],
        "old_answer": "06:15",
        "prediction": "07:30" if right else "06:15",
        "image_id": str(number),
        "images": 1,
        "tokens": 10,
        "tokens_reused": 4,
        "patches": 10,
        "patches_reused": 3,
        "matched": True,
    }


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_table_comes_from_its_json(name):
    report = json.loads((RESULTS / "data" / f"{name}.json").read_text())
    assert exam_report.markdown(report).strip() in (RESULTS / "accuracy.md").read_text()


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_report_holds_what_its_table_needs(name):
    text = (RESULTS / "data" / f"{name}.json").read_text()
    assert len(text) < 40_000 and len(text.splitlines()) < 400
    for form in json.loads(text)["forms"].values():
        assert set(form) <= {"accuracy", "reuse", "differences", "contradicted"}
        assert all(set(difference) == {"overall"} for difference in form["differences"].values())


def test_a_report_is_written_as_json_and_table(tmp_path):
    plain, stale = ([record(i, right=i % share > 0) for i in range(12)] for share in (6, 3))
    report = {
        "interval": "95%",
        "forms": {
            "llava": exam_report.form_report(plain, {}),
            "stale": exam_report.form_report(stale, {"llava": plain}, contradicting=True),
        },
    }
    found = report["forms"]["stale"]
    assert found["differences"]["llava"]["overall"]["accuracy"]["value"] == pytest.approx(-2 / 12)
    assert found["contradicted"]["old_answer_given"]["accuracy"]["value"] == pytest.approx(4 / 12)
    assert found["reuse"] == {"images_matched": 1, "patches_reused": 0.3, "vision_tokens_reused": 0.4}
    assert found["accuracy"]["by_group"].keys() == {
        "about object",
        "about background",
        "family phone",
        "topic phone time",
        "topic phone label",
    }
    exam_report.write_report(report, tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == report
    assert (tmp_path / "report.md").read_text() == exam_report.markdown(report)
    # A group of questions with its figure is one line.
    assert sum('"topic phone time"' in line and '"high"' in line for line in text.splitlines()) == 2


def test_a_form_without_answers_is_an_error():
    unanswered = [record(0, right=True) | {"prediction": None}]
    with pytest.raises(ValueError, match="No question of this form was answered"):
        exam_report.form_report(unanswered, {})
