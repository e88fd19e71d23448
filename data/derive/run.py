"""Makes data sets of patch groups from other data, before training.

    python -m backdrop.data.derive.run groups   --model M --dataset D --out O
    python -m backdrop.data.derive.run pairs    --model M --frames F --out O
    python -m backdrop.data.derive.run captions --model M --coco-captions C --coco-instances I --images P --out O

Each may be killed at any moment and run again with the same arguments: what is finished is kept. The result loads with
`datasets.load_from_disk` and carries `derived.json`: what it was made from and with, and what came of it.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from datasets import load_from_disk

from backdrop.data.load import load_rows
from backdrop.data.rows import BadRowError, BadRows
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

from .captions import (
    SPLIT_BY,
    CocoFormat,
    CocoRows,
    EntitiesFormat,
    EntitiesRows,
    captions_recipe,
)
from .groups import DatasetRows, LoadProcessor, groups_recipe
from .pairs import DatasetFrames, FolderFrames, PairOptions, PairRows, pair_figures, pairs_recipe
from .phrases import load_pipeline
from .shards import Recipe, Source, derive, source_digest

_GROUPS_HELP = """Rows (images, messages) with every ordinary image replaced by its patch groups.

    python -m backdrop.data.derive.run groups --model runs/base --dataset runs/llava_rows --out runs/llava_groups

The detector runs here, once an image; training on the result needs none. An image that is a group stays as it is."""

_PAIRS_HELP = """Frames of scenes -> the background group of an earlier frame and the fresh group of a later one.

    python -m backdrop.data.derive.run pairs --model runs/base --frames runs/cameras --tolerance 10 --out runs/pairs
    python -m backdrop.data.derive.run pairs --model runs/base --frames recordings/ --tolerance 0 --any-order \\
        --whole-background 0.5 --on-miss drop --out runs/screens

Frames: a data set with columns images (one), messages, scene, and frame where rows are not in order; or a folder with
a folder per scene, in it images in the order of their names and metadata.jsonl with lines
{"file_name": "0007.png", "messages": [...]} (images without a line serve as earlier frames only)."""

_CAPTIONS_HELP = """Captioned images with boxes -> splits background and objects, each group with what is said of it.

    python -m backdrop.data.derive.run captions --model runs/base --images coco/train2017 --out runs/coco_prealign \\
        --coco-captions annotations/captions_train2017.json --coco-instances annotations/instances_train2017.json
    python -m backdrop.data.derive.run captions --model runs/base --images flickr30k-images --out runs/entities \\
        --entities flickr30k_entities --ids flickr30k_entities/train.txt

COCO's captions are parsed by a spaCy pipeline (--spacy); Flickr30k Entities' own marks need none."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    root = argparse.ArgumentParser(
        prog="python -m backdrop.data.derive.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, make) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, description=text, help=text.splitlines()[0], formatter_class=root.formatter_class
        )
        sub.set_defaults(make=make)
        sub.add_argument(
            "--model", required=True, help="model whose processor (and detector) makes the groups"
        )
        sub.add_argument("--detector", help="another detector: name or path of an ultralytics model")
        sub.add_argument("--detector-device", help="where the detector runs, such as cuda")
        sub.add_argument("--out", type=Path, required=True, help="folder of the result; not there yet")
        sub.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
        sub.add_argument("--shard-rows", type=int, default=64, help="source rows lost by a kill, at most")
        sub.add_argument("--on-bad-row", choices=["skip", "raise"], default="skip")
        return sub

    groups = command("groups", _GROUPS_HELP, _groups)
    groups.add_argument("--dataset", required=True, help="folder of `save_to_disk`, of files, or a Hub id")
    groups.add_argument("--dataset-split", default="train")

    pairs = command("pairs", _PAIRS_HELP, _pairs)
    pairs.add_argument("--frames", required=True, help="data set with a column scene, or a folder per scene")
    pairs.add_argument("--dataset-split", default="train")
    pairs.add_argument("--tolerance", type=float, default=PairOptions.tolerance, help="grey levels, 0-255")
    pairs.add_argument("--seed", type=int, default=0)
    pairs.add_argument("--any-order", action="store_true", help="the other frame may be a later one")
    pairs.add_argument(
        "--whole-background",
        type=float,
        default=0.0,
        help="share of rows whose background keeps the old objects",
    )
    pairs.add_argument(
        "--on-miss", choices=["split", "drop"], default="split", help="rows that match nothing"
    )

    captions = command("captions", _CAPTIONS_HELP, _captions)
    captions.add_argument("--images", type=Path, required=True, help="folder of the image files")
    captions.add_argument("--coco-captions", type=Path, help="captions_*.json of COCO")
    captions.add_argument("--coco-instances", type=Path, help="instances_*.json of COCO")
    captions.add_argument(
        "--entities", type=Path, help="Flickr30k Entities: folder of Sentences and Annotations"
    )
    captions.add_argument("--ids", type=Path, help="with --entities: file of the image ids to take")
    captions.add_argument("--spacy", default="en_core_web_sm", help="spaCy pipeline (default: %(default)s)")
    captions.add_argument("--split-by", choices=SPLIT_BY, default="annotations", help="what makes the groups")
    captions.add_argument("--seed", type=int, default=0, help="of the prompts")
    return root


def processor_loader(options: argparse.Namespace) -> LoadProcessor:
    """Loads the processor of a model's folder, in this process and in others."""
    changes = {"detector": options.detector, "detector_device": options.detector_device}
    changes = {name: value for name, value in changes.items() if value is not None}
    return partial(BackdropImageProcessor.from_pretrained, options.model, **changes)


def _groups(options: argparse.Namespace) -> tuple[Source, Recipe]:
    source = DatasetRows(_load(options.dataset, options.dataset_split))
    return source, groups_recipe(processor_loader(options), source_digest(source), options.shard_rows)


def _pairs(options: argparse.Namespace) -> tuple[Source, Recipe]:
    choice = PairOptions(
        tolerance=options.tolerance,
        seed=options.seed,
        any_order=options.any_order,
        whole_background=options.whole_background,
        on_miss=options.on_miss,
    )
    folder = Path(options.frames)
    per_scene = folder.is_dir() and any(folder.glob("*/metadata.jsonl"))
    frames = (
        FolderFrames(folder) if per_scene else DatasetFrames(_load(options.frames, options.dataset_split))
    )
    source = PairRows(frames, choice)
    return source, pairs_recipe(processor_loader(options), choice, source_digest(source), options.shard_rows)


def _captions(options: argparse.Namespace) -> tuple[Source, Recipe]:
    coco = options.coco_captions is not None and options.coco_instances is not None
    if coco == (options.entities is not None):
        raise ValueError("Wanted either --coco-captions and --coco-instances, or --entities.")
    if coco:
        source = CocoRows(options.coco_captions, options.coco_instances, options.images)
        meta = load_pipeline(options.spacy).meta
        make_format, pipeline = partial(CocoFormat, options.spacy), f"{options.spacy} {meta['version']}"
    else:
        source = EntitiesRows(options.entities, options.images, options.ids)
        make_format, pipeline = EntitiesFormat, ""
    recipe = captions_recipe(
        processor_loader(options),
        make_format,
        source_digest(source),
        pipeline=pipeline,
        split_by=options.split_by,
        seed=options.seed,
        shard_rows=options.shard_rows,
    )
    return source, recipe


def _load(name: str, split: str):
    return load_rows("rows", name, split=split, check_images=False)[0]


def summary(record: dict, out: Path) -> str:
    """What came of it, a line each."""
    rows = ", ".join(
        f"{count:,} rows{f' of {split}' * bool(split)}" for split, count in record["rows"].items()
    )
    bad = BadRows("skip", [tuple(row) for row in record["bad_rows"]]).summary()
    lines = [f"{out}: {rows} from {record['identity']['source_rows']:,}; {bad}"]
    if record["identity"]["kind"] == "pairs":
        figures = pair_figures(record)
        lines.append(
            f"matched {figures['matched_share']:.1%} of {figures['rows']:,}; a match reuses "
            f"{figures['mean_reused_patches']:.1f} patches, overrides {figures['mean_overridden_patches']:.1f}, "
            f"encodes {figures['mean_fresh_patches']:.1f} freshly"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        source, recipe = options.make(options)
        record = derive(source, recipe, options.out, workers=options.workers, on_bad_row=options.on_bad_row)
    except (ValueError, OSError, ImportError, RuntimeError, BadRowError) as error:
        sys.exit(f"error: {error}")
    load_from_disk(options.out)  # what was promised
    print(summary(record, options.out))


if __name__ == "__main__":
    main()
