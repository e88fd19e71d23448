"""`backdrop eval`: a model's scores on a data set."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Tolerance, examples, known_model

EXAMPLE = examples(
    "backdrop scenes rows --model examples/scenes-model --out runs/rows --scenes 64",
    """backdrop eval examples/scenes-model --data rows --source runs/rows \\
    --split train --mode llava --out runs/eval-llava""",
    """backdrop eval examples/scenes-model --data textvqa --limit 100 \\
    --source lmms-lab/textvqa --mode matched --tolerance 10 --out runs/textvqa""",
)


def evaluate(
    model: Annotated[str, typer.Argument(help="Backdrop model: a folder or a Hub id.", callback=known_model)],
    data: Annotated[
        str,
        typer.Option(help="vqav2, textvqa, ocrvqa, gqa, pope, coco_captions, flickr30k, or rows: your own."),
    ],
    source: Annotated[str, typer.Option(help="The data: a folder, a file or a Hub id.")],
    out: Annotated[
        Path, typer.Option(help="Folder for predictions and summary; a run that was stopped continues there.")
    ],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, where the rows name files.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data.")] = "validation",
    mode: Annotated[
        str,
        typer.Option(
            help="llava: whole images; split: groups; cached: with the cache; matched: with matching."
        ),
    ] = "split",
    tolerance: Tolerance = 0.0,
    limit: Annotated[int | None, typer.Option(help="Only the first so many rows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; default: the data set's.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="predictions.jsonl of another run on the same questions.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    json_output: Json = False,
) -> None:
    """Answer a data set and score it with its official metric and 95% intervals.

    With --baseline the paired differences to another run's answers are given too.
    """
    from backdrop.evaluation.run import markdown, run_evaluation

    if tolerance and mode != "matched":
        raise ValueError(f"--tolerance is {tolerance} with --mode {mode}; it belongs to --mode matched.")
    summary = run_evaluation(
        model,
        data,
        source,
        split=split,
        images=None if images is None else str(images),
        mode=mode,
        tolerance=tolerance,
        out=out,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        baseline=baseline,
        device=device,
    )
    typer.echo(json.dumps(summary, indent=2) if json_output else markdown(summary))
