"""What an exam on the made scenes found: figures of each form, as JSON and as tables."""

import json
import re
from pathlib import Path

import numpy as np

from backdrop.data.atomic import write_atomically
from backdrop.evaluation.metrics import METRICS, figures
from backdrop.evaluation.run import reuse

EXACT = METRICS["exact"]


def _groups(record: dict) -> list[str]:
    family = record["family"]
    return [f"about {record['about']}", f"family {family}", f"topic {family} {record['topic']}"]


def _figures(records: list[dict], baseline: list[dict] | None = None, answers: str = "answers") -> dict:
    def counts(rows: list[dict]) -> np.ndarray:
        wanted = [r[answers] if answers == "answers" else [r[answers]] for r in records]
        return EXACT.counts([row["prediction"] for row in rows], wanted)

    found = figures(
        EXACT,
        counts(records),
        [record["background"] for record in records],
        [_groups(record) for record in records],
        None if baseline is None else counts(baseline),
    )
    return {"overall": found.pop(""), "by_group": found}


def form_report(records: list[dict], baselines: dict[str, list[dict]], contradicting: bool = False) -> dict:
    """Accuracy, reuse and the paired difference to each baseline: what the tables of `markdown` show.

    Args:
        records: of one form, one for each question, as `answer_form` writes them.
        baselines: other forms' records of the same questions.
        contradicting: the background showed the earlier frame; how often that frame's answer was given is counted.

    Raises:
        ValueError: no question was answered.
    """
    answered = [record for record in records if record["prediction"] is not None]
    if not answered:
        raise ValueError("No question of this form was answered: no frame matched. Ask about more scenes.")
    report = {"accuracy": _figures(answered), "reuse": reuse(records), "differences": {}}
    for name, others in baselines.items():
        by_id = {record["id"]: record for record in others}
        paired = _figures(answered, [by_id[record["id"]] for record in answered])
        report["differences"][name] = {"overall": paired["overall"]}
    if contradicting:
        contradicted = [r for r in answered if r["old_answer"] not in (None, r["answers"][0])]
        report["contradicted"] = {
            "right": _figures(contradicted)["overall"],
            "old_answer_given": _figures(contradicted, answers="old_answer")["overall"],
        }
    return report


def percent(value: dict, signed: bool = False) -> str:
    """`94.5 [93.1, 95.6]` of a figure with its interval, both parts of 1; differences with their sign."""
    form = "{:+.1f}" if signed else "{:.1f}"
    return f"{form.format(100 * value['value'])} [{form.format(100 * value['low'])}, {form.format(100 * value['high'])}]"


def markdown(report: dict) -> str:
    """Accuracy and paired differences of each form, then accuracy by topic."""
    forms = report["forms"]
    lines = [
        "| form | questions | exact match, % | minus llava | minus its other baseline | vision tokens reused "
        "| patches from another frame | images matched |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, figures_of in forms.items():
        overall = figures_of["accuracy"]["overall"]
        differences = figures_of["differences"]
        plain = percent(differences["llava"]["overall"]["accuracy"], True) if "llava" in differences else "-"
        other = [
            f"{percent(value['overall']['accuracy'], True)} ({baseline})"
            for baseline, value in differences.items()
            if baseline != "llava"
        ]
        shares = figures_of["reuse"]
        lines.append(
            f"| {name} | {overall['questions']} | {percent(overall['accuracy'])} | {plain} | {', '.join(other) or '-'} "
            f"| {shares['vision_tokens_reused']:.1%} | {shares['patches_reused']:.1%} | {shares['images_matched']:.1%} |"
        )
    if "stale" in forms:
        contradicted = forms["stale"]["contradicted"]
        lines += [
            "",
            f"Where the stale background shows another answer ({contradicted['right']['questions']} questions): right "
            f"{percent(contradicted['right']['accuracy'])}, the old answer "
            f"{percent(contradicted['old_answer_given']['accuracy'])}.",
        ]
    names = list(forms)
    lines += ["", "| exact match, % | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    groups = sorted({group for value in forms.values() for group in value["accuracy"]["by_group"]})
    for group in groups:
        rows = [forms[name]["accuracy"]["by_group"].get(group) for name in names]
        cells = [f"{100 * row['accuracy']['value']:.1f} ({row['questions']})" if row else "-" for row in rows]
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    lines += ["", f"Brackets: {report['interval']}.", ""]
    return "\n".join(lines)


def write_report(report: dict, path: Path) -> None:
    """Writes the report as JSON, and `markdown` of it beside that."""
    write_atomically(path, _one_line_a_figure(json.dumps(report, indent=1)) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(report))


def _one_line_a_figure(text: str) -> str:
    """Indented JSON whose innermost two levels, a group of questions with its figure, stand on one line each."""
    innermost = r"[^{}]*"
    return re.sub(
        rf"\{{{innermost}(?:\{{{innermost}\}}{innermost})?\}}",
        lambda block: re.sub(r"\s+", " ", block[0]).replace("{ ", "{").replace(" }", "}"),
        text,
    )
