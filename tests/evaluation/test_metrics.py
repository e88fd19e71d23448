"""Scores against published worked examples, and their intervals."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backdrop.evaluation import metrics as m

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
