"""`backdrop train` and `backdrop data`: a recipe's run, and a look at its data before."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Json, OnBadRow, examples

TRAIN_EXAMPLE = examples(
    "backdrop scenes rows --model examples/scenes-model --out runs/rows --scenes 64",
    """backdrop train --config finetune_lora --model examples/scenes-model \\
    --dataset runs/rows --output_dir runs/lora \\
    --max_steps 2 --bf16 false --dtype float32 --use_cpu true""",
)
DATA_EXAMPLE = examples(
    "backdrop scenes rows --model examples/scenes-model --out runs/rows --scenes 64",
    "backdrop data rows runs/rows --show 1",
)


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Options of the run; `backdrop train --help` lists them: ours, then those of TRL's SFTConfig and ModelConfig."
        ),
    ] = None,
) -> None:
    """Finetune a model by a recipe: a YAML file of options, or the name of one that is shipped."""
    from importlib.resources import files

    from backdrop.train.arguments import RECIPES
    from backdrop.train.sft import main

    main(list(arguments or []), (RECIPES, Path(str(files("backdrop.experiments"))) / "recipes"))


def data(
    name: Annotated[
        str,
        typer.Argument(
            help="llava_pretrain, llava_instruct, textvqa, ocrvqa, vqav2, gqa, pope, coco_captions, flickr30k, ade20k, or "
            "rows: a folder of rows that `--out`, `backdrop derive` or `backdrop scenes rows` wrote."
        ),
    ],
    source: Annotated[str, typer.Argument(help="The data set: a folder, a file or a Hub id.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    images: Annotated[
        Path | None, typer.Option(help="Folder of the image files, if not the source's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many rows.")] = None,
    on_bad_row: OnBadRow = "skip",
    no_check_images: Annotated[
        bool, typer.Option("--no-check-images", help="Trust that image files can be decoded.")
    ] = False,
    image_position: Annotated[
        Literal["first", "in_place"],
        typer.Option(help="Images before the question, or where the data set has them."),
    ] = "first",
    ocr_tokens: Annotated[
        bool, typer.Option("--ocr-tokens", help="TextVQA: questions with the reference OCR tokens.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="New folder to keep the rows in.")] = None,
    show: Annotated[int, typer.Option(help="How many rows to print.")] = 3,
    json_output: Json = False,
) -> None:
    """Load a public data set, name its bad rows, show some, and keep the rows if asked."""
    if out is not None and out.exists():
        raise typer.BadParameter(f"--out: {out} exists; wanted a new folder.")
    from backdrop.data.load import describe_row, load_rows, save_rows, without_image

    rows, bad_rows = load_rows(
        name,
        source,
        split=split,
        images=images,
        on_bad_row=on_bad_row,
        limit=limit,
        check_images=not no_check_images,
        image_position=image_position,
        ocr_tokens=ocr_tokens,
    )
    if out is not None:
        save_rows(rows, bad_rows, out)
    if json_output:
        figures = {"rows": len(rows), "without_image": without_image(rows), "bad_rows": list(bad_rows)}
        typer.echo(json.dumps(figures, indent=2))
        return
    typer.echo(f"{len(rows):,} rows, {without_image(rows):,} without an image; {bad_rows.summary()}")
    for row in rows.select(range(min(show, len(rows)))):
        typer.echo(describe_row(row))
    if out is not None:
        typer.echo(f"{out}: written")
