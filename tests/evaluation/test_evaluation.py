"""Runs of a model over a data set: modes, resuming, baselines, the command, and lmms-eval."""

import json
import sys
from dataclasses import replace
from io import BytesIO
from types import ModuleType

import numpy as np
import pytest
import tiny
import typer
from paths import EXAMPLE
from PIL import Image
from typer.testing import CliRunner

from backdrop.commands.evaluate import EXAMPLE as EVAL_EXAMPLE
from backdrop.commands.evaluate import evaluate as eval_command
from backdrop.data.rows import BadRowError, Example
from backdrop.evaluation import run as runs
from backdrop.evaluation.answering import MODES, Answerer, load
from backdrop.evaluation.predictions import Predictions, read_predictions
from backdrop.evaluation.tasks import TASKS, task
from backdrop.hub_export.chat_template import chat_template
from backdrop.scenes import exam as scenes


def test_captions_without_the_library_say_how_to_install_it_before_any_work(monkeypatch, evaluate):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu_scorer", None)
    with pytest.raises(ImportError, match="pip install pycocoevalcap"):
        evaluate(data="coco_captions")
    assert not evaluate.path("run").exists()


# ---- runs


def _image_bytes(image: Image.Image) -> dict:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return {"path": None, "bytes": buffer.getvalue()}


def _examples(count: int = 5) -> list[Example]:
    """Frames of one background with a red object that moves; two questions each, the second ones at the end."""
    rows = []
    for turn, question in enumerate(("what is shown?", "is the bus red?")):
        for i in range(count):
            image = tiny.photo(tiny.SIDE, tiny.SIDE, seed=3)
            image.paste((255, 0, 0), (14 * (i % 4), 14, 14 * (i % 4) + 14, 28))
            rows.append(
                Example(
                    id=f"{i}/{turn}",
                    images=[_image_bytes(image)],
                    turns=[(question, "a red bus")],
                    question_type=("what", "is")[turn],
                    image_id=f"frame {i}",
                )
            )
    return rows


@pytest.fixture
def evaluate(chat_model, processor, tmp_path):
    def run(mode="split", out="run", data="rows", rows=None, **options):
        settings = {"batch_size": 4, "max_new_tokens": 4, "header": {"weights": "w"}, **options}
        return runs.evaluate_examples(
            chat_model,
            processor,
            _examples() if rows is None else rows,
            data=data,
            mode=mode,
            out=tmp_path / out,
            **settings,
        )

    run.path = lambda out: tmp_path / out / runs.PREDICTIONS
    return run


def _texts(path):
    return {record["id"]: record["prediction"] for record in read_predictions(path)[1]}


def test_modes_and_what_they_reuse(evaluate):
    summaries = {mode: evaluate(mode, out=mode) for mode in MODES}
    texts = {mode: _texts(evaluate.path(mode)) for mode in MODES}
    assert all(len(answers) == 10 for answers in texts.values())
    assert texts["cached"] == texts["split"]
    assert len(set(texts["split"].values())) > 1
    assert texts["llava"] != texts["split"]
    reused = {mode: summary["reuse"] for mode, summary in summaries.items()}
    assert (
        reused["llava"]
        == reused["split"]
        == {"images_matched": 0, "patches_reused": 0, "vision_tokens_reused": 0}
    )
    # Frame 4 is frame 0 again: its background group is the same. With matching every frame but the first is known.
    assert 0 < reused["cached"]["vision_tokens_reused"] < 0.5
    assert reused["matched"]["images_matched"] == 4 / 5
    assert reused["matched"]["patches_reused"] == pytest.approx(
        (2 * 14 + 2 * 15) / 80
    )  # a patch that an object has left is taken up
    assert reused["matched"]["vision_tokens_reused"] > 0.6
    assert summaries["split"]["by_group"].keys() == {"what", "is"}
    assert summaries["split"]["overall"]["images"] == 5


@pytest.mark.parametrize("images_last", [False, True])
def test_questions_go_through_the_processors_own_path(chat_model, processor, images_last):
    """The batch is what the processor makes of images and text, and answers are those of a plain `generate`."""
    rows = _examples(3)
    processor.chat_template = chat_template(images_first=not images_last)
    images = [Image.open(BytesIO(row.images[0]["bytes"])) for row in rows]
    questions = [row.turns[0][0] for row in rows]
    answerer = Answerer(chat_model, processor, "split", max_new_tokens=6, images_last=images_last)
    texts = answerer.answer(answerer.prepare([[image] for image in images]), questions)
    for image, question, text in zip(images, questions, texts, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        content = content[::-1] if images_last else content
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        assert (prompt.index(question) < prompt.index(processor.image_token)) == images_last
        inputs = processor(images=[image], text=prompt, return_tensors="pt", add_special_tokens=False)
        out = chat_model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert (
            processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == text
        )


def test_predictions_of_something_else_are_refused_or_begun_anew(tmp_path):
    Predictions(tmp_path / "p.jsonl", {"weights": "a"}).append([{"id": "1"}])
    with pytest.raises(ValueError, match="was made with weights 'a'; wanted 'b'"):
        Predictions(tmp_path / "p.jsonl", {"weights": "b"})
    assert Predictions(tmp_path / "p.jsonl", {"weights": "a"}, replace=True).done == {"1"}
    assert Predictions(tmp_path / "p.jsonl", {"weights": "b"}, replace=True).done == set()
    assert read_predictions(tmp_path / "p.jsonl") == ({"weights": "b"}, [])


@pytest.mark.parametrize("mode", ["split", "matched"])
def test_a_cut_off_run_goes_on_where_it_stopped(evaluate, mode):
    whole = evaluate(mode, out="whole")
    evaluate(mode, out="cut")
    lines = evaluate.path("cut").read_bytes().splitlines(keepends=True)
    # Killed after five answers, in the middle of the sixth line.
    evaluate.path("cut").write_bytes(b"".join(lines[:6]) + lines[6][:20])
    resumed = evaluate(mode, out="cut")
    assert read_predictions(evaluate.path("cut")) == read_predictions(evaluate.path("whole"))
    assert resumed == whole
    before = evaluate.path("cut").read_bytes()
    evaluate(mode, out="cut")
    assert evaluate.path("cut").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mode": "matched"}, "mode 'split'; wanted 'matched'"),
        ({"header": {"weights": "v"}}, "weights 'w'; wanted 'v'"),
        ({"data": "scenes"}, "data 'rows'; wanted 'scenes'"),
        ({"max_new_tokens": 5}, "max_new_tokens 4; wanted 5"),
    ],
)
def test_predictions_of_another_run_are_refused(evaluate, changes, named):
    evaluate(rows=_examples(1))
    before = evaluate.path("run").read_bytes()
    with pytest.raises(ValueError, match=named) as error:
        evaluate(rows=_examples(1), **changes)
    assert "\n" not in str(error.value)
    assert evaluate.path("run").read_bytes() == before


def test_a_file_that_was_torn_in_its_header_starts_afresh(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"header": {"mo')
    assert Predictions(path, {"mode": "split"}).records == []
    assert read_predictions(path) == ({"mode": "split"}, [])


def test_damage_before_the_end_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"header": {}}\n{"id": \n{"id": "2"}\n')
    with pytest.raises(ValueError, match="line 2"):
        Predictions(path, {})


def test_a_baseline_gives_paired_differences(evaluate, tmp_path):
    # A right answer for two questions of frame 0, so that the runs differ.
    evaluate("llava", out="llava")
    header, records = read_predictions(evaluate.path("llava"))
    for record in records[:2]:
        record["prediction"] = "a red bus"
    other = Predictions(tmp_path / "other.jsonl", header)
    other.append(records)
    summary = evaluate("llava", out="llava", baseline=tmp_path / "other.jsonl")
    difference = summary["difference"]["overall"]["accuracy"]
    assert difference["value"] == pytest.approx(-0.2)
    assert difference["low"] < -0.2 < difference["high"] <= 0
    table = (tmp_path / "llava" / runs.TABLE).read_text()
    assert "accuracy - baseline" in table
    assert "| all | 10 | 5 | 0.0 [0.0, 0.0] | -20.0 [" in table
    assert json.loads((tmp_path / "llava" / runs.SUMMARY).read_text()) == summary
    with pytest.raises(ValueError, match="lacks 2 of 10 questions and has 0 others"):
        runs.summarize(records, task("rows"), records[2:])


def test_turns_are_questions_of_their_own():
    example = Example("a", [], [("q1", "x"), ("q2", "y")], image_id="i")
    assert [(q.id, q.answers) for q in runs.questions_of(example)] == [("a#0", ["x"]), ("a#1", ["y"])]
    ten = Example("b", [], [("q", "x")], answers=["x"] * 10)
    assert runs.questions_of(ten)[0].answers == ["x"] * 10


def test_images_are_brought_together_within_a_window():
    rows = [Example(str(i), [], [("q", "a")], image_id=str(i % 2)) for i in range(6)]
    assert [(g.image_id, [q.id for q in g.questions]) for g in runs.by_image(rows, window=4)] == [
        ("0", ["0", "2"]),
        ("1", ["1", "3"]),
        ("0", ["4"]),
        ("1", ["5"]),
    ]


def test_rows_that_name_no_image_are_brought_together_by_content(evaluate):
    rows = [replace(row, image_id="") for row in _examples(4)]
    assert evaluate("llava", rows=rows)["overall"]["images"] == 4
    with pytest.raises(ValueError, match="Row x has no image"):
        evaluate("llava", out="bare", rows=[Example("x", [], [("q", "a")])])


def test_an_unknown_data_set_and_mode_are_refused(evaluate):
    with pytest.raises(ValueError, match="data is 'imagenet'; wanted one of vqav2"):
        evaluate(data="imagenet")
    with pytest.raises(ValueError, match="mode is 'fast'; wanted one of llava"):
        evaluate(mode="fast")
    assert {"vqav2", "textvqa", "ocrvqa", "gqa", "pope", "coco_captions", "flickr30k"} <= TASKS.keys()


@pytest.fixture
def app():
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("eval", **EVAL_EXAMPLE)(eval_command)
    return app


def test_the_command_evaluates_a_folder(app, chat_model, processor, tmp_path, monkeypatch):
    asked = {}

    def examples(name, source, *, split, images, limit, streaming, bad_rows, check_images):
        bad_rows.add(BadRowError("7", "no image"))
        asked.update(name=name, source=source, split=split, images=images, limit=limit)
        return iter(_examples()[:limit])

    loader = ModuleType("backdrop.data.load")
    loader.examples = examples
    monkeypatch.setitem(sys.modules, "backdrop.data.load", loader)
    chat_model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    arguments = ["eval", str(tmp_path / "model"), "--data", "rows", "--source", "rows.jsonl", "--limit", "3"]
    arguments += [
        "--mode",
        "llava",
        "--max-new-tokens",
        "3",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary == json.loads((tmp_path / "out" / runs.SUMMARY).read_text())
    assert summary["overall"]["questions"] == 3
    assert summary["bad_rows"] == 1
    assert "1 bad rows left out" in (tmp_path / "out" / runs.TABLE).read_text()
    assert len(summary["weights"]) == 40
    assert asked == {
        "name": "rows",
        "source": "rows.jsonl",
        "split": "validation",
        "images": None,
        "limit": 3,
    }
    help_text = " ".join(CliRunner().invoke(app, ["eval", "--help"]).output.split())
    assert "Example:" in help_text and "backdrop eval examples/scenes-model --data textvqa" in help_text
    wrong = CliRunner().invoke(app, [*arguments, "--tolerance", "3"])
    assert "--tolerance is 3.0 with --mode llava" in str(wrong.exception)


# ---- lmms-eval


HARNESS_TASK = """task: backdrop_scenes
dataset_path: parquet
dataset_kwargs: {data_files: {test: FOLDER/scenes.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function task_functions.images
doc_to_text: !function task_functions.question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 16, do_sample: false}
process_results: !function task_functions.results
metric_list:
  - {metric: exact, aggregation: !function task_functions.mean, higher_is_better: true}
metadata: [{version: 0.0}]
"""
HARNESS_FUNCTIONS = """
def images(row): return [row["image"].convert("RGB")]
def question(row, kwargs=None): return row["question"]
def results(row, results): return {"exact": float(results[0] == row["answer"])}
def mean(values): return sum(values) / len(values)
"""


def test_lmms_eval_runs_the_same_answers(tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    from backdrop.evaluation import harness

    source = str(EXAMPLE)
    asked = [(c, q) for c in scenes.scene_questions("test", 6, 5, 2) for q in c.questions]
    rows = [
        {"image": _image_bytes(c.image), "question": q.question.question, "answer": q.question.answer}
        for c, q in asked
    ]
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "scenes.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "backdrop_scenes.yaml").write_text(HARNESS_TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "tasks" / "task_functions.py").write_text(HARNESS_FUNCTIONS)
    arguments = [
        "--model",
        "backdrop",
        "--model_args",
        f"pretrained={source},mode=cached",
        "--tasks",
        "backdrop_scenes",
    ]
    arguments += ["--include_path", str(tmp_path / "tasks"), "--batch_size", "4", "--device", "cpu"]
    arguments += ["--output_path", str(tmp_path / "out")]
    harness.run_harness(arguments)
    (written,) = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(written.read_text())["results"]["backdrop_scenes"]["exact,none"]
    answerer = Answerer(*load(source, device="cpu"), "split", max_new_tokens=16)
    texts = answerer.answer(
        answerer.prepare([[c.image] for c, _ in asked]), [q.question.question for _, q in asked]
    )
    assert found == pytest.approx(
        np.mean([t == q.question.answer for t, (_, q) in zip(texts, asked, strict=True)])
    )


def test_rows_that_share_an_id_are_asked_about_their_own_images(evaluate, caplog):
    """Identity is content: neither questions nor images are merged by a name, and what repeats is named."""
    rows = [replace(row, id="same", image_id="") for row in _examples(4)[:4]]
    wanted = {f"{i}": row for i, row in enumerate(_examples(4)[:4])}
    apart = evaluate(
        "split", out="apart", rows=[replace(row, id=i, image_id="") for i, row in wanted.items()]
    )
    summary = evaluate("split", rows=rows)
    found, alone = (read_predictions(evaluate.path(name))[1] for name in ("run", "apart"))
    assert [record["id"] for record in found] == ["same", "same~2", "same~3", "same~4"]
    assert [record["prediction"] for record in found] == [record["prediction"] for record in alone]
    assert summary["overall"] == apart["overall"] and summary["overall"]["images"] == 4
    assert summary["repeated_ids"] == ["same"] and "1 ids name more than one row (same)" in caplog.text
    assert evaluate("split", rows=rows)["overall"] == apart["overall"], "a run that goes on finds its answers"


def test_one_name_of_an_image_does_not_merge_two():
    pictures = [[{"path": None, "bytes": bytes([i])}] for i in range(2)]
    rows = [Example(str(i), pictures[i], [("q", "a")], image_id="i") for i in range(2)]
    assert [g.images for g in runs.by_image(rows)] == pictures
