"""Scores of answers, and intervals for what is made of them.

A metric turns each (prediction, reference answers) into a row of counts, and sums of such rows into figures. So one
bootstrap serves all of them, accuracy as well as F1 or corpus BLEU: it resamples images, not questions, because
questions about one image are not independent.

Shapes: `Q` questions, `I` images, `R` resamples, `K` counts of a metric.
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
_CHUNK_BYTES = 64 * 2**20  # of resampling weights held at a time


# ---- VQA: answers of ten people


# Contractions as they are spelt right; the published table lists what they look like with an apostrophe left out.
# fmt: off
_CONTRACTIONS = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't",
    "hadn't", "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's",
    "isn't", "it'd", "it'd've", "it'll", "ma'am", "might've", "mightn't", "mightn't've", "must've",
    "mustn't", "needn't", "not've", "o'clock", "oughtn't", "'ow's'at", "shan't", "she'd've", "should've",
    "shouldn't", "shouldn't've", "somebody'd've", "somebody'll", "somebody's", "someone'd", "someone'd've",
    "someone'll", "someone's", "something'd", "something'd've", "something'll", "that's", "there'd",
    "there'd've", "there're", "there's", "they'd", "they'd've", "they'll", "they're", "they've", "'twas",
    "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's", "where'd",
    "where's", "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll", "why're", "why's",
    "won't", "would've", "wouldn't", "wouldn't've", "y'all", "y'all'll", "y'all'd've", "you'd", "you'd've",
    "you'll", "you're", "you've",
)
# fmt: on
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_STRIPPED = 32  # the published code passes `re.UNICODE`, which is 32, as the count of `sub`


def _without_one_apostrophe() -> dict[str, str]:
    table = {}
    for right in _CONTRACTIONS:
        for at in (i for i, letter in enumerate(right) if letter == "'"):
            table[right[:at] + right[at + 1 :]] = right
    return table | {"somebody'd": "somebodyd"}  # the table has this one the wrong way round


_MISSPELT = _without_one_apostrophe()


def normalize_vqa_answer(text: str) -> str:
    """An answer as the VQA evaluation compares it.

    Punctuation goes (or becomes a space where it joins two words), digits' commas and periods that end something go,
    number words become digits, articles go, contractions get their apostrophe back. After `processPunctuation` and
    `processDigitArticle` of vqaEval.py (github.com/GT-Vision-Lab/VQA), quirks included.
    """
    marked = text.replace("\n", " ").replace("\t", " ").strip()
    has_digit_comma = _DIGIT_COMMA.search(marked) is not None
    bare = marked
    for mark in _PUNCTUATION:
        apart = has_digit_comma or f"{mark} " in marked or f" {mark}" in marked
        bare = bare.replace(mark, "" if apart else " ")
    bare = _PERIOD.sub("", bare, count=_PERIODS_STRIPPED)
    words = [_NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(_MISSPELT.get(word, word) for word in words if word not in _ARTICLES)


def normalize_evalai_answer(text: str) -> str:
    """As `normalize_vqa_answer`, after EvalAI's own tokenising: commas and question marks go first, 's stands apart.

    `EvalAIAnswerProcessor` of Pythia/MMF's m4c_evaluator.py, which LLaVA uses for TextVQA, and on predictions for VQAv2.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_vqa_answer(text)


def leave_one_out(matching: int, annotators: int) -> float:
    """Mean, over the annotators, of min(1, matching answers of the others / 3); Antol et al. 2015, arXiv:1505.00468."""
    own = min(
        1.0, (matching - 1) / 3
    )  # an annotator who gave this answer is not counted as one of the others
    return (matching * own + (annotators - matching) * min(1.0, matching / 3)) / annotators


def _ten(answers: Sequence[str]) -> Sequence[str]:
    if len(answers) != 10:
        raise ValueError(f"VQA accuracy got {len(answers)} reference answers; wanted those of 10 annotators.")
    return answers


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy of one answer. Where all annotators agree to the letter nothing is normalised, as published."""
    answers = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in _ten(answers)]
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    if len(set(answers)) > 1:
        answers = [normalize_vqa_answer(answer) for answer in answers]
        prediction = normalize_vqa_answer(prediction)
    return leave_one_out(answers.count(prediction), len(answers))


def vqav2_score(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2 as LLaVA submits to it: the prediction goes through EvalAI's processor, then into the official accuracy."""
    return vqa_accuracy(normalize_evalai_answer(prediction), answers)


def textvqa_score(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy (m4c evaluator): always normalised, on both sides, with EvalAI's processor."""
    normalized = [normalize_evalai_answer(answer) for answer in _ten(answers)]
    return leave_one_out(normalized.count(normalize_evalai_answer(prediction)), len(normalized))


# ---- one right answer


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, letter by letter."""
    return float(prediction in answers)


def ocrvqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Exact match of the stripped, lower-cased strings.

    OCR-VQA (Mishra et al. 2019) counts exact matches; lower case follows Qwen-VL's evaluate_vqa.py, the script that
    most published figures come from.
    """
    return float(prediction.strip().lower() in [answer.strip().lower() for answer in answers])


def names_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of two sets of names separated by commas, in lower case; of single names 1 or 0. The best of the answers.

    ADE20K has labels and no questions, so that no published convention exists.
    """

    def names(text: str) -> set[str]:
        return {name for part in text.rstrip(".").split(",") if (name := part.strip().lower())}

    said = names(prediction)
    return max(2 * len(said & names(a)) / max(1, len(said) + len(names(a))) for a in answers)


def gqa_score(prediction: str, answers: Sequence[str]) -> float:
    """GQA's eval.py asks for equality; LLaVA lower-cases a prediction and drops its last periods before."""
    return float(prediction.rstrip(".").lower() in answers)


def gqa_types(question_type: str) -> list[str]:
    """`"query/rel"` (structural/semantic) -> the groups in which GQA's eval.py counts the question.

    Questions of structural type "query" are open, all others binary.
    """
    structural, _, semantic = question_type.partition("/")
    if not structural:
        return []
    groups = ["open" if structural == "query" else "binary", f"structural {structural}"]
    return groups + ([f"semantic {semantic}"] if semantic else [])


def pope_says_yes(text: str) -> bool:
    """POPE's reading of a free answer: no if its first sentence has the word No, no or not, else yes.

    As LLaVA's eval_pope.py and POPE's evaluate.py (Li et al. 2023, arXiv:2305.10355).
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _pope_counts(prediction: str, answers: Sequence[str]) -> tuple[float, ...]:
    said, true = pope_says_yes(prediction), answers[0] != "no"
    return said and true, said and not true, not said and not true, not said and true


# ---- metrics


def _share(counts: np.ndarray, of: np.ndarray) -> np.ndarray:
    return np.divide(counts, of, out=np.full(np.shape(of), np.nan), where=np.asarray(of) > 0)


@dataclass(frozen=True)
class Metric:
    """A way to score.

    Attributes:
        name: as it is printed.
        counts: (predictions, answers of each) -> float `[Q, K]`.
        figures: name -> function of sums `[..., K]` to `[...]`; the first is the headline. NaN where undefined.
        needs_all: a question has no score of its own before all are answered (captions).
    """

    name: str
    counts: Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]
    figures: dict[str, Callable[[np.ndarray], np.ndarray]]
    needs_all: bool = False

    @property
    def headline(self) -> str:
        """Name of the first figure, which stands for the metric."""
        return next(iter(self.figures))

    def score(self, prediction: str, answers: Sequence[str]) -> float | None:
        """The headline figure of one question."""
        if self.needs_all:
            return None
        return float(self.figures[self.headline](self.counts([prediction], [answers])[0]))


def _mean_of(name: str, score: Callable[[str, Sequence[str]], float], figure: str = "accuracy") -> Metric:
    def counts(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
        return np.array(
            [(score(p, a), 1.0) for p, a in zip(predictions, answers, strict=True)], dtype=np.float64
        ).reshape(-1, 2)

    return Metric(name, counts, {figure: lambda sums: _share(sums[..., 0], sums[..., 1])})


def _pope() -> Metric:
    def counts(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
        rows = [_pope_counts(p, a) for p, a in zip(predictions, answers, strict=True)]
        return np.array(rows, dtype=np.float64).reshape(-1, 4)  # TP, FP, TN, FN

    return Metric(
        "POPE",
        counts,
        {
            "accuracy": lambda s: _share(s[..., 0] + s[..., 2], s.sum(-1)),
            "precision": lambda s: _share(s[..., 0], s[..., 0] + s[..., 1]),
            "recall": lambda s: _share(s[..., 0], s[..., 0] + s[..., 3]),
            "f1": lambda s: _share(2 * s[..., 0], 2 * s[..., 0] + s[..., 1] + s[..., 3]),
            "yes_ratio": lambda s: _share(s[..., 0] + s[..., 1], s.sum(-1)),
        },
    )


# ---- captions


def caption_tokenizer() -> str:
    """Which tokenizer `caption_counts` uses here: "PTB" (the published one, needs Java), or "plain"."""
    return "PTB" if shutil.which("java") else "plain"


def _plain_tokens(text: str) -> str:
    """Lower-case words, clitics apart, punctuation gone: what PTB makes of ordinary captions."""
    text = re.sub(r"\b(can)(not)\b", r"\1 \2", text.lower())
    return " ".join(
        re.findall(r"n't|'(?:s|re|ve|ll|d|m)\b|[^\W_]+?(?=n't\b)|[^\W_]+(?:-[^\W_]+)*|[$%&#]", text)
    )


def _caption_parts() -> tuple[type, type, type]:
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider_scorer import CiderScorer
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError("Caption metrics need pycocoevalcap: pip install pycocoevalcap==1.2") from error
    return BleuScorer, CiderScorer, Rouge


def caption_counts(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """`[Q, 14]` from pycocoevalcap: CIDEr, ROUGE-L, METEOR (NaN without Java), 1, then BLEU's counts.

    BLEU's: lengths of caption and closest reference, n-grams right for n = 1..4, n-grams of the caption for n = 1..4.
    CIDEr's document frequencies are those of all references given, so its intervals hold for this corpus.
    """
    BleuScorer, CiderScorer, Rouge = _caption_parts()
    if not predictions:
        return np.empty((0, 14))
    for i, references in enumerate(answers):
        if not references:
            raise ValueError(f"Caption {i} has no reference; wanted one or more.")
    said, meant = _tokenized(predictions, answers)
    bleu, cider = BleuScorer(n=4), CiderScorer(n=4, sigma=6.0)
    for caption, references in zip(said, meant, strict=True):
        bleu += (caption, references)
        cider += (caption, references)
    _, ciders = cider.compute_score()
    rouge = [
        Rouge().calc_score([caption], references) for caption, references in zip(said, meant, strict=True)
    ]
    meteor = _meteor(said, meant)
    rows = []
    for i, test in enumerate(bleu.ctest):
        closest = min((abs(length - test["testlen"]), length) for length in test["reflen"])[1]
        shared = (ciders[i], rouge[i], meteor[i], 1.0, test["testlen"], closest)
        rows.append((*shared, *test["correct"], *test["guess"]))
    return np.array(rows, dtype=np.float64)


def _tokenized(
    predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    if caption_tokenizer() == "plain":
        return [_plain_tokens(p) for p in predictions], [[_plain_tokens(a) for a in refs] for refs in answers]
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # One call: the tokenizer starts a Java process. It drops lines that are empty, so that none may be.
    everything = {}
    for i, (prediction, references) in enumerate(zip(predictions, answers, strict=True)):
        everything[i] = [{"caption": text.strip() or "."} for text in (prediction, *references)]
    tokens = PTBTokenizer().tokenize(everything)
    return [tokens[i][0] for i in everything], [tokens[i][1:] for i in everything]


def _meteor(said: list[str], meant: list[list[str]]) -> list[float]:
    if not shutil.which("java"):
        return [float("nan")] * len(said)
    from pycocoevalcap.meteor.meteor import Meteor

    _, scores = Meteor().compute_score(dict(enumerate(meant)), {i: [text] for i, text in enumerate(said)})
    return scores


def _bleu4(sums: np.ndarray) -> np.ndarray:
    """Papineni et al. 2002, with the tiny constants of pycocoevalcap's `BleuScorer.compute_score`."""
    length, reference = sums[..., 4], sums[..., 5]
    precisions = (sums[..., 6:10] + 1e-15) / (sums[..., 10:14] + 1e-9)
    ratio = (length + 1e-15) / (reference + 1e-9)
    return np.exp(np.log(precisions).mean(-1) + np.minimum(0.0, 1 - 1 / ratio))


METRICS: dict[str, Metric] = {
    "vqav2": _mean_of("VQA accuracy", vqav2_score),
    "textvqa": _mean_of("VQA accuracy (m4c)", textvqa_score),
    "ocrvqa": _mean_of("exact match, lower case", ocrvqa_score),
    "gqa": _mean_of("GQA accuracy", gqa_score),
    "exact": _mean_of("exact match", exact),
    "names": _mean_of("F1 of names", names_f1, "f1"),
    "pope": _pope(),
    "captions": Metric(
        "captions",
        caption_counts,
        {
            "cider": lambda s: _share(s[..., 0], s[..., 3]),
            "bleu4": _bleu4,
            "rouge_l": lambda s: _share(s[..., 1], s[..., 3]),
            "meteor": lambda s: _share(s[..., 2], s[..., 3]),
        },
        needs_all=True,
    ),
}


# ---- intervals


def image_sums(counts: np.ndarray, image: np.ndarray, images: int) -> np.ndarray:
    """`[Q, K]` -> `[I, K]`; `image [Q]` is the number of each question's image, of `images`."""
    columns = [np.bincount(image, weights=column, minlength=images) for column in counts.T]
    return np.stack(columns, axis=1)


def resampled(sums: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Sums `[R, K]` over images drawn with replacement, as many as there are: the cluster bootstrap.

    Multinomial weights for `[I, K]` sums are the same as drawing rows, and one product instead of R copies.
    """
    images = len(sums)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_BYTES // (8 * max(1, images)))
    parts = []
    for first in range(0, resamples, chunk):
        weights = rng.multinomial(images, np.full(images, 1 / images), size=min(chunk, resamples - first))
        parts.append(weights.astype(np.float64) @ sums)
    return np.concatenate(parts)


def _interval(value: float, draws: np.ndarray) -> dict[str, float | None]:
    """Percentile interval; without a defined draw it is unknown. If every image scores the same it has no width."""
    draws = draws[np.isfinite(draws)]
    low, high = (
        np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]) if len(draws) else (np.nan, np.nan)
    )
    return {
        name: None if np.isnan(v) else float(v)
        for name, v in (("value", value), ("low", low), ("high", high))
    }


def _members(groups: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """Name of a group -> bool `[Q]`; "" stands for all questions and comes first."""
    names = sorted({name for own in groups for name in own if name})
    members: dict[str, np.ndarray] = {"": np.ones(len(groups), dtype=bool)}
    return members | {name: np.array([name in own for own in groups]) for name in names}


def figures(
    metric: Metric,
    counts: np.ndarray,
    images: Sequence[str],
    groups: Sequence[Sequence[str]],
    baseline: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, dict]:
    """Every figure of a metric with its 95% interval, overall (key "") and by group of questions.

    Args:
        counts: `[Q, K]` of `metric.counts`.
        images: the image that each question is about.
        groups: the groups that each question belongs to.
        baseline: `[Q, K]` of another run on the same questions; then the figures are differences to it, and so are
            the intervals, from the same resamples of both runs.

    Returns:
        group -> `{"questions", "images", figure: {"value", "low", "high"}}`.
    """
    if not len(counts):
        raise ValueError("No question was answered; wanted one or more.")
    members = _members(groups)
    runs = [counts] if baseline is None else [counts, baseline]
    # By name, so that the order of questions changes nothing.
    names, image = np.unique(np.asarray(images, dtype=str), return_inverse=True)
    # All groups and runs side by side, [I, groups * runs * K], resampled together.
    sums = np.concatenate(
        [
            image_sums(np.where(own[:, None], run, 0.0), image, len(names))
            for own in members.values()
            for run in runs
        ],
        axis=1,
    )
    shape = (len(members), len(runs), counts.shape[1])
    total = sums.sum(0).reshape(shape)
    draws = resampled(sums, seed=seed).reshape(-1, *shape)
    result: dict[str, dict] = {}
    for g, (name, own) in enumerate(members.items()):
        result[name] = {"questions": int(own.sum()), "images": len(set(image[own]))}
        for figure, of in metric.figures.items():
            value, drawn = of(total[g]), of(draws[:, g])
            if baseline is None:
                result[name][figure] = _interval(float(value[0]), drawn[:, 0])
            else:
                result[name][figure] = _interval(float(value[0] - value[1]), drawn[:, 0] - drawn[:, 1])
    return result
