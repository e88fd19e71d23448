"""`backdrop eval`: a model's scores on a data set."""

import json
from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Example: `backdrop eval my-model --data textvqa --source data/textvqa --images data/textvqa/train_images "
    "--split validation --mode matched --tolerance 10 --out runs/textvqa-matched "
    "--baseline runs/textvqa-llava/predictions.jsonl`"
)


def evaluate(
    model: Annotated[str, typer.Argument(help="Backdrop model: a folder or a Hub id.")],
    data: Annotated[
        str, typer.Option(help="vqav2, textvqa, ocrvqa, gqa, pope, coco_captions, flickr30k, rows, ...")
    ],
    source: Annotated[str, typer.Option(help="The data: a folder, a file or a Hub id.")],
    out: Annotated[
        Path, typer.Option(help="Folder for predictions and summary; a cut-off run goes on there.")
    ],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images, where the rows name files.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data.")] = "validation",
    mode: Annotated[
        str,
        typer.Option(
            help="llava: whole images; split: groups; cached: with the memo; matched: with matching."
        ),
    ] = "split",
    tolerance: Annotated[
        float, typer.Option(help="With --mode matched: largest staleness that is reused, grey levels.")
    ] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Just the first rows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered together.")] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; default: the data set's.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="predictions.jsonl of another run on the same questions.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Answer a data set and score it, with 95% intervals and, with --baseline, paired differences."""
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
