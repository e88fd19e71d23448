"""Scores against published worked examples; runs that resume; the forms of the made scenes."""

import json
import shutil
import sys
from dataclasses import replace
from io import BytesIO
from types import ModuleType

import numpy as np
import pytest
import tiny
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import EXAMPLE
from PIL import Image
from typer.testing import CliRunner

from backdrop.commands.evaluate import EXAMPLE as EVAL_EXAMPLE
from backdrop.commands.evaluate import evaluate as eval_command
from backdrop.data.rows import BadRowError, Example
from backdrop.evaluation import metrics as m
from backdrop.evaluation import run as runs
from backdrop.evaluation.answering import MODES, Answerer, load
from backdrop.evaluation.predictions import Predictions, read_predictions
from backdrop.evaluation.tasks import TASKS, task
from backdrop.hub_export.convert import chat_template
from backdrop.scenes import exam as scenes

# ---- VQA


@pytest.mark.parametrize(
    ("said", "people", "score"),
    [
        # The VQA evaluation page: an answer that 3 or more of 10 people gave is fully right, averaged over the ten
        # subsets of nine: 1 person 0.3, 2 people 0.6, 3 people 0.9, 4 people 1.
        ("red", 0, 0.0),
        ("red", 1, 0.3),
        ("red", 2, 0.6),
        ("red", 3, 0.9),
        ("red", 4, 1.0),
        ("red", 9, 1.0),
    ],
)
def test_vqa_accuracy_by_how_many_people_agree(said, people, score):
    answers = ["red"] * people + [f"other {i}" for i in range(10 - people)]
    assert m.vqa_accuracy(said, answers) == pytest.approx(score)
    assert m.textvqa_score(said, answers) == pytest.approx(score)


@given(
    st.lists(st.sampled_from(["a1", "b2", "c3"]), min_size=10, max_size=10),
    st.sampled_from(["a1", "b2", "z"]),
)
def test_leave_one_out_is_the_average_over_the_subsets(answers, said):
    subsets = [answers[:i] + answers[i + 1 :] for i in range(10)]
    average = np.mean([min(1, subset.count(said) / 3) for subset in subsets])
    assert m.textvqa_score(said, answers) == pytest.approx(average)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dog.", "dog"),
        ("a man and an apple", "man and apple"),
        ("Two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("red/white", "red white"),
        ("red, white", "red white"),
        ("t-shirt", "t shirt"),
        ("yes!", "yes "),
        ("it's 9:30", "it's 9:30"),
        ("line\nbreak\there", "line break here"),
    ],
)
def test_vqa_normalization(text, normal):
    assert m.normalize_vqa_answer(text) == normal.strip()


def test_where_all_annotators_agree_nothing_is_normalized():
    assert m.vqa_accuracy("The dog", ["the dog"] * 10) == 0  # as published
    assert m.vqav2_score("The dog.", ["dog"] * 10) == 1  # LLaVA normalises what it submits
    assert m.textvqa_score("The dog", ["the dog"] * 10) == 1


def test_the_evalai_processor_sets_the_genitive_apart():
    assert m.normalize_evalai_answer("Bob's car?") == "bob 's car"
    assert m.normalize_vqa_answer("Bob's car") == "bob's car"


def test_vqa_wants_ten_annotators():
    with pytest.raises(ValueError, match="1 reference answers; wanted those of 10"):
        m.textvqa_score("dog", ["dog"])


# ---- other metrics


def test_gqa_and_ocrvqa_conventions():
    assert m.gqa_score("Yes.", ["yes"]) == 1
    assert m.gqa_score("the yes", ["yes"]) == 0
    assert m.ocrvqa_score(" John Grisham ", ["john grisham"]) == 1
    assert m.ocrvqa_score("John Grisham.", ["john grisham"]) == 0
    assert m.names_f1("Wall, floor, cat.", ["wall, floor, sky"]) == pytest.approx(2 / 3)
    assert m.names_f1("bedroom", ["bedroom"]) == 1
    assert m.names_f1("", ["bedroom"]) == 0
    assert m.gqa_types("/") == []
    assert m.gqa_types("query/rel") == ["open", "structural query", "semantic rel"]
    assert m.gqa_types("verify/obj") == ["binary", "structural verify", "semantic obj"]


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is not", False),
        ("Yes. There is no dog.", True),
        ("There is not a dog", False),
        ("Nothing", True),
        ("NO", True),  # the published parser knows "No" and "no" alone
    ],
)
def test_pope_reads_free_answers(text, yes):
    assert m.pope_says_yes(text) is yes


def test_pope_figures():
    said = ["Yes"] * 8 + ["No"] * 2
    true = [["yes"]] * 6 + [["no"]] * 3 + [["yes"]]  # TP 6, FP 2, TN 1, FN 1
    pope = m.METRICS["pope"]
    sums = pope.counts(said, true).sum(0)
    assert sums.tolist() == [6, 2, 1, 1]
    found = {name: float(of(sums)) for name, of in pope.figures.items()}
    assert found == pytest.approx(
        {"accuracy": 0.7, "precision": 6 / 8, "recall": 6 / 7, "f1": 2 * 6 / 15, "yes_ratio": 0.8}
    )


def test_captions_without_the_library_say_how_to_install_it_before_any_work(monkeypatch, evaluate):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu_scorer", None)
    with pytest.raises(ImportError, match="pip install pycocoevalcap"):
        evaluate(data="coco_captions")
    assert not evaluate.path("run").exists()


CAPTIONS = (
    ["a man rides a brown horse on the beach", "two dogs play in the snow", "a red bus."],
    [
        ["A man is riding a horse on the beach.", "Someone rides a brown horse near the sea."],
        ["Two dogs are playing in the snow.", "Dogs play in deep snow, happily."],
        ["A red double-decker bus.", "A bus drives down the street."],
    ],
)


@pytest.mark.parametrize("java", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_caption_figures_are_the_librarys(java, monkeypatch):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if java and not shutil.which("java"):
        pytest.skip("no Java")
    if not java:
        monkeypatch.setattr(m.shutil, "which", lambda name: None)
    said, meant = m._tokenized(*CAPTIONS)
    if java:  # on ordinary captions the plain tokenizer does what PTB's does
        assert said == [m._plain_tokens(text) for text in CAPTIONS[0]]
        assert meant == [[m._plain_tokens(text) for text in texts] for texts in CAPTIONS[1]]
    captions = m.METRICS["captions"]
    sums = captions.counts(*CAPTIONS).sum(0)
    result, references = {i: [text] for i, text in enumerate(said)}, dict(enumerate(meant))
    wanted = {
        "cider": Cider().compute_score(references, result)[0],
        "bleu4": bleu.Bleu(4).compute_score(references, result, verbose=0)[0][3],
        "rouge_l": Rouge().compute_score(references, result)[0],
    }
    found = {name: float(of(sums)) for name, of in captions.figures.items()}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert np.isnan(found["meteor"]) != java


# ---- intervals

EXACT = m.METRICS["exact"]
_runs = st.lists(
    st.tuples(
        st.sampled_from("yn"), st.sampled_from("yn"), st.integers(0, 5), st.sampled_from(["", "t", "u"])
    ),
    min_size=1,
    max_size=40,
)


def _counts(said):
    return EXACT.counts(list(said), [["y"]] * len(said))


@settings(max_examples=20, deadline=None)
@given(_runs, st.randoms(use_true_random=False))
def test_figures_are_bounded_and_do_not_depend_on_order(rows, random):
    def of(rows):
        first, second, images, types = zip(*rows, strict=True)
        groups = [[t] if t else [] for t in types]
        return m.figures(EXACT, _counts(first), [str(i) for i in images], groups, _counts(second))

    shuffled = list(rows)
    random.shuffle(shuffled)
    one, two = of(rows), of(shuffled)
    assert list(one) == list(two)
    for name in one:
        value, low, high = (one[name]["accuracy"][end] for end in ("value", "low", "high"))
        assert -1 <= low <= high <= 1
        assert [two[name]["accuracy"][end] for end in ("value", "low", "high")] == pytest.approx(
            [value, low, high]
        )


def test_a_run_does_not_differ_from_itself():
    counts = _counts("yynyn" * 6)
    found = m.figures(EXACT, counts, [str(i // 3) for i in range(30)], [[]] * 30, counts)[""]["accuracy"]
    assert found == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_the_interval_of_independent_questions_is_the_binomials():
    counts = _counts(["y"] * 300 + ["n"] * 100)
    found = m.figures(EXACT, counts, [str(i) for i in range(400)], [[]] * 400)[""]["accuracy"]
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.06)


def test_questions_about_one_image_count_as_one():
    """Ten copies of each question say nothing new: the interval stays as wide."""
    said = list("yyn" * 30)
    once = m.figures(EXACT, _counts(said), [str(i) for i in range(90)], [[]] * 90)[""]["accuracy"]
    copies = [text for text in said for _ in range(10)]
    tenfold = m.figures(EXACT, _counts(copies), [str(i // 10) for i in range(900)], [[]] * 900)[""]
    assert tenfold["accuracy"]["high"] - tenfold["accuracy"]["low"] == pytest.approx(
        once["high"] - once["low"], rel=0.1
    )
    assert tenfold["images"] == 90


def test_pairing_takes_away_what_both_runs_share():
    """One question in fifty changes; the runs themselves are uncertain by ten points."""
    first, second = list("yn" * 50), list("yn" * 50)
    second[1] = second[51] = "y"
    images = [str(i) for i in range(100)]
    apart = m.figures(EXACT, _counts(second), images, [[]] * 100)[""]["accuracy"]
    paired = m.figures(EXACT, _counts(second), images, [[]] * 100, _counts(first))[""]["accuracy"]
    assert paired["value"] == pytest.approx(0.02)
    assert paired["high"] - paired["low"] < 0.35 * (apart["high"] - apart["low"])


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
    assert reused["matched"]["patches_reused"] == pytest.approx((3 * 14 + 15) / 80)
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


# ---- scenes


def test_scenes_are_the_same_for_every_form():
    def drawn(**options):
        return list(scenes.scene_questions("test", 8, 0, 3, **options))

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
    asked = [
        (case, q) for case in scenes.scene_questions("test", 40, 1, 9, stale=True) for q in case.questions
    ]
    kept = {q.id for _, q in asked}
    assert {q.question.about for _, q in asked} == {"object", "both"}
    for case in scenes.scene_questions("test", 40, 1, 9):
        for question in case.questions:
            if question.id not in kept:
                assert question.old_answer == question.question.answer
    # Whatever the wording, the old answer is that of the same topic and vehicle.
    case, question = next((c, q) for c, q in asked if q.question.topic == "presence")
    kind = question.question.question.split(" a ")[1].split()[0].rstrip("?")
    here = {o.name for o in case.earlier.objects}
    assert question.old_answer in (None, "yes" if kind in here else "no")


@pytest.fixture(scope="module")
def scenes_run(tmp_path_factory):
    source = str(EXAMPLE)
    model = load(source, device="cpu")
    work = tmp_path_factory.mktemp("scenes")

    def run():
        return scenes.run_scenes(
            {"llava": model, "model": model},
            {"llava": source, "model": source},
            scenes=8,
            questions=2,
            work=work,
            batch_size=16,
        )

    return run, run(), work, model[1]


def test_forms_of_the_scenes(scenes_run):
    _, report, work, _ = scenes_run
    records = {name: read_predictions(work / f"{name}.jsonl")[1] for name in scenes.FORMS}
    texts = {name: {r["id"]: r["prediction"] for r in of} for name, of in records.items()}
    asked = {name: [(r["id"], r["question"], r["answers"]) for r in of] for name, of in records.items()}
    assert len(texts["split"]) == 16
    assert all(asked[name] == asked["llava"] for name in scenes.FORMS if name != "stale")
    assert texts["cached"] == texts["split"]
    forms = report["forms"]
    assert forms["split"]["accuracy"]["overall"]["accuracy"]["value"] > 0.6
    assert forms["cached"]["differences"]["split"]["overall"]["accuracy"] == {"value": 0, "low": 0, "high": 0}
    assert forms["split"]["reuse"]["vision_tokens_reused"] == 0
    for name in ("exact", "matched"):
        assert forms[name]["reuse"]["images_matched"] > 0.7
        assert forms[name]["reuse"]["vision_tokens_reused"] > 0.3
    assert list(forms["matched"]["differences"]) == ["llava", "llava_disturbed"]


def test_a_stale_background_is_asked_about_where_it_was_taken(scenes_run):
    _, report, work, processor = scenes_run
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
    table = scenes.markdown(report)
    assert "| stale |" in table
    assert "the old answer" in table
    assert "/" not in report["models"]["model"]


def test_scenes_go_on_where_they_stopped(scenes_run):
    run, report, work, _ = scenes_run
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    lines = before["exact.jsonl"].splitlines(keepends=True)
    (work / "exact.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:9])
    (work / "stale.jsonl").unlink()
    assert run() == report
    after = {path.name: path.read_bytes() for path in work.iterdir()}
    assert after == before


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
