"""The exam on the made scenes: the same questions in every form, asked, answered and reported."""

import numpy as np
import pytest
from paths import EXAMPLE

from backdrop.evaluation.answering import load
from backdrop.evaluation.predictions import read_predictions
from backdrop.scenes import exam, exam_report


def test_scenes_are_the_same_for_every_form():
    def drawn(**options):
        return list(exam.scene_questions("test", 8, 0, 3, **options))

    clean, camera, stale = drawn(), drawn(disturb=True), drawn(stale=True)
    for case, seen, old in zip(clean, camera, stale, strict=True):
        assert case.questions == seen.questions
        assert len(case.questions) == 3
        assert {q.id for q in old.questions} <= {q.id for q in case.questions}
        assert case.scene.questions == seen.scene.questions == old.scene.questions
        change = np.abs(np.asarray(case.image, int) - np.asarray(seen.image, int))
        assert 0 < change.mean() < 8
        assert np.asarray(seen.image).tobytes() != np.asarray(seen.earlier_image).tobytes()
        assert case.earlier.background_seed == case.scene.background_seed
    assert clean[0].image.tobytes() == drawn()[0].image.tobytes()


def test_stale_asks_what_changed():
    asked = [(case, q) for case in exam.scene_questions("test", 40, 1, 9, stale=True) for q in case.questions]
    kept = {q.id for _, q in asked}
    assert {q.question.about for _, q in asked} == {"object", "both"}
    for case in exam.scene_questions("test", 40, 1, 9):
        for question in case.questions:
            if question.id not in kept:
                assert question.old_answer == question.question.answer
    # Whatever the wording, the old answer is that of the same topic and vehicle.
    case, question = next((c, q) for c, q in asked if q.question.topic == "presence")
    kind = question.question.question.split(" a ")[1].split()[0].rstrip("?")
    here = {o.name for o in case.earlier.objects}
    assert question.old_answer in (None, "yes" if kind in here else "no")


@pytest.fixture(scope="module")
def exam_run(tmp_path_factory):
    source = str(EXAMPLE)
    model = load(source, device="cpu")
    work = tmp_path_factory.mktemp("exam")

    def run():
        return exam.run_scenes(
            {"llava": model, "model": model},
            {"llava": source, "model": source},
            scenes=8,
            questions=2,
            work=work,
            batch_size=16,
        )

    return run, run(), work, model[1]


def test_forms_of_the_scenes(exam_run):
    _, report, work, _ = exam_run
    records = {name: read_predictions(work / f"{name}.jsonl")[1] for name in exam.FORMS}
    texts = {name: {r["id"]: r["prediction"] for r in of} for name, of in records.items()}
    asked = {name: [(r["id"], r["question"], r["answers"]) for r in of] for name, of in records.items()}
    assert len(texts["split"]) == 16
    assert all(asked[name] == asked["llava"] for name in exam.FORMS if name != "stale")
    assert texts["cached"] == texts["split"]
    forms = report["forms"]
    assert forms["split"]["accuracy"]["overall"]["accuracy"]["value"] > 0.6
    assert forms["cached"]["differences"]["split"]["overall"]["accuracy"] == {"value": 0, "low": 0, "high": 0}
    assert forms["split"]["reuse"]["vision_tokens_reused"] == 0
    for name in ("exact", "matched"):
        assert forms[name]["reuse"]["images_matched"] > 0.7
        assert forms[name]["reuse"]["vision_tokens_reused"] > 0.3
    assert list(forms["matched"]["differences"]) == ["llava", "llava_disturbed"]


def test_a_stale_background_is_asked_about_where_it_was_taken(exam_run):
    _, report, work, processor = exam_run
    assert processor.background_matching.stats()["references"] <= 1  # no scene sees another's
    _, records = read_predictions(work / "stale.jsonl")
    answered = [r for r in records if r["prediction"] is not None]
    assert 0 < len(answered) <= len(records)
    assert all((r["prediction"] is not None) == bool(r["matched"]) for r in records)
    stale = report["forms"]["stale"]
    assert stale["accuracy"]["overall"]["questions"] == len(answered)
    # Of the reference's patches some are overridden by fresh ones, most are reused.
    assert 0.3 < np.mean([r["patches_reused"] / r["patches"] for r in answered]) < 1
    contradicted = [r for r in answered if r["old_answer"] not in (None, r["answers"][0])]
    old = np.mean([r["prediction"] == r["old_answer"] for r in contradicted])
    assert stale["contradicted"]["old_answer_given"]["accuracy"]["value"] == pytest.approx(old)
    table = exam_report.markdown(report)
    assert "| stale |" in table
    assert "the old answer" in table
    assert "/" not in report["models"]["model"]


def test_scenes_go_on_where_they_stopped(exam_run):
    run, report, work, _ = exam_run
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    lines = before["exact.jsonl"].splitlines(keepends=True)
    (work / "exact.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:9])
    (work / "stale.jsonl").unlink()
    assert run() == report
    after = {path.name: path.read_bytes() for path in work.iterdir()}
    assert after == before
