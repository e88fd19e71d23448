"""`backdrop derive`: data sets of patch groups, made once before training."""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Json, OnBadRow, Seed, Tolerance, examples, known_model

app = typer.Typer(
    no_args_is_help=True,
    help="Make data sets of patch groups before training: split once, pair stale backgrounds, split captions.\n\n"
    "Each may be stopped at any moment and run again with the same arguments: what is finished is kept.",
)

Model = Annotated[
    str,
    typer.Option(
        help="Backdrop model (folder or Hub id) whose processor and detector make the groups.",
        callback=known_model,
    ),
]
Out = Annotated[Path, typer.Option(help="New folder for the result.")]
Detector = Annotated[
    str | None,
    typer.Option(help="Another detector: an ultralytics model, or one of transformers (a Hub id)."),
]
DetectorDevice = Annotated[str | None, typer.Option(help="Where the detector runs, such as cuda.")]
Workers = Annotated[int | None, typer.Option(help="Processes. Default: one for each CPU core.")]
ShardRows = Annotated[int, typer.Option(help="Source rows that are lost, at most, when the run is stopped.")]
DataSplit = Annotated[str, typer.Option(help="Split of the data set.")]


@app.command(
    **examples(
        """backdrop scenes rows --model examples/scenes-model --out runs/whole \\
        --scenes 64 --whole 1 --pair 0 --stale 0""",
        """backdrop derive groups --model examples/scenes-model \\
        --dataset runs/whole --out runs/groups""",
    )
)
def groups(
    model: Model,
    dataset: Annotated[
        str, typer.Option(help="Rows with images and messages: a folder of rows or of files, or a Hub id.")
    ],
    out: Out,
    dataset_split: DataSplit = "train",
    detector: Detector = None,
    detector_device: DetectorDevice = None,
    workers: Workers = None,
    shard_rows: ShardRows = 64,
    on_bad_row: OnBadRow = "skip",
    json_output: Json = False,
) -> None:
    """Replace every image by its patch groups, so that training needs no detector.

    The detector runs here, once for each image. An image that is a group already stays as it is.
    """
    from backdrop.data.derive.run import DeriveOptions, derive_groups

    options = DeriveOptions(
        model, out, detector, detector_device, workers or os.cpu_count() or 1, shard_rows, on_bad_row
    )
    _print(derive_groups(options, dataset, dataset_split), out, json_output)


@app.command(
    **examples(
        "backdrop scenes recording runs/cameras/square --frames 8",
        """echo '{"file_name": "frame00007.jpg", "messages": [{"role": "user",' \\
        '"content": "Inside?"}, {"role": "assistant", "content": "No."}]}' \\
        > runs/cameras/square/metadata.jsonl""",
        """backdrop derive pairs --model examples/scenes-model \\
        --frames runs/cameras --tolerance 10 --out runs/pairs""",
    )
)
def pairs(
    model: Model,
    frames: Annotated[
        str,
        typer.Option(
            help="Frames by scene: a data set with a column scene, or a folder with a folder per scene."
        ),
    ],
    out: Out,
    dataset_split: DataSplit = "train",
    tolerance: Tolerance = 10.0,
    seed: Seed = 0,
    any_order: Annotated[
        bool, typer.Option("--any-order", help="The background may come from a later frame too.")
    ] = False,
    whole_background: Annotated[
        float, typer.Option(help="Share (0-1) of rows whose background still shows the old objects.")
    ] = 0.0,
    on_miss: Annotated[
        Literal["split", "drop"],
        typer.Option(help="Rows without a matching background: split them as they are, or drop them."),
    ] = "split",
    detector: Detector = None,
    detector_device: DetectorDevice = None,
    workers: Workers = None,
    shard_rows: ShardRows = 64,
    on_bad_row: OnBadRow = "skip",
    json_output: Json = False,
) -> None:
    """Put an earlier frame's background under a later frame's fresh patches, as serving does.

    A data set of frames has the columns images (one), messages, scene, and frame where rows are not in order. A folder has a
    folder for each scene, with images in the order of their names, and metadata.jsonl with a line (file_name and messages)
    for each image that is asked about.
    """
    from backdrop.data.derive.pairs import PairOptions
    from backdrop.data.derive.run import DeriveOptions, derive_pairs

    choice = PairOptions(
        tolerance=tolerance,
        seed=seed,
        any_order=any_order,
        whole_background=whole_background,
        on_miss=on_miss,
    )
    options = DeriveOptions(
        model, out, detector, detector_device, workers or os.cpu_count() or 1, shard_rows, on_bad_row
    )
    _print(derive_pairs(options, frames, choice, dataset_split), out, json_output)


@app.command(
    **examples(
        """backdrop derive captions --model examples/scenes-model \\
        --images COCO/train2017 --out runs/captions \\
        --coco-captions COCO/annotations/captions_train2017.json \\
        --coco-instances COCO/annotations/instances_train2017.json""",
    )
)
def captions(
    model: Model,
    images: Annotated[Path, typer.Option(help="Folder of the image files.")],
    out: Out,
    coco_captions: Annotated[Path | None, typer.Option(help="captions_*.json of COCO.")] = None,
    coco_instances: Annotated[Path | None, typer.Option(help="instances_*.json of COCO.")] = None,
    entities: Annotated[
        Path | None, typer.Option(help="Flickr30k Entities: folder of Sentences and Annotations.")
    ] = None,
    ids: Annotated[Path | None, typer.Option(help="With --entities: file of the image ids to use.")] = None,
    spacy: Annotated[
        str, typer.Option(help="spaCy pipeline that parses COCO's captions.")
    ] = "en_core_web_sm",
    split_by: Annotated[
        Literal["annotations", "detector"], typer.Option(help="What makes the groups.")
    ] = "annotations",
    seed: Seed = 0,
    detector: Detector = None,
    detector_device: DetectorDevice = None,
    workers: Workers = None,
    shard_rows: ShardRows = 64,
    on_bad_row: OnBadRow = "skip",
    json_output: Json = False,
) -> None:
    """Split captioned images, each group with the part of the caption that is about it.

    The result has two splits, background and objects. COCO's captions are parsed by spaCy (COCO is a folder with COCO's
    images and annotations); the marks of Flickr30k Entities need no parser.
    """
    from backdrop.data.derive.run import DeriveOptions, derive_captions

    options = DeriveOptions(
        model, out, detector, detector_device, workers or os.cpu_count() or 1, shard_rows, on_bad_row
    )
    record = derive_captions(
        options,
        images,
        coco_captions=coco_captions,
        coco_instances=coco_instances,
        entities=entities,
        ids=ids,
        spacy=spacy,
        split_by=split_by,
        seed=seed,
    )
    _print(record, out, json_output)


def _print(record: dict, out: Path, as_json: bool) -> None:
    from backdrop.data.derive.run import summary

    typer.echo(json.dumps(record, indent=2) if as_json else summary(record, out))
