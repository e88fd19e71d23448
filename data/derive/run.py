"""Makes data sets of patch groups from other data, before training: what `backdrop derive groups|pairs|captions` runs.

Each may be killed at any moment and run again with the same arguments: what is finished is kept. The result loads with
`datasets.load_from_disk` and carries `derived.json`: what it was made from and with, and what came of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, load_from_disk

from backdrop.data.load import load_rows
from backdrop.data.rows import BadRows
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

from .captions import (
    CaptionFormat,
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


@dataclass(frozen=True)
class DeriveOptions:
    """What all three have in common.

    Attributes:
        model: folder whose processor (and detector) makes the groups.
        out: folder of the result.
        detector: another detector: name or path of an ultralytics model.
        detector_device: where the detector runs, such as "cuda".
        workers: processes.
        shard_rows: source rows lost by a kill, at most.
        on_bad_row: see `derive`.
    """

    model: str
    out: Path
    detector: str | None = None
    detector_device: str | None = None
    workers: int = 1
    shard_rows: int = 64
    on_bad_row: str = "skip"


def processor_loader(options: DeriveOptions) -> LoadProcessor:
    """Loads the processor of a model's folder, in this process and in others."""
    changes = {"detector": options.detector, "detector_device": options.detector_device}
    changes = {name: value for name, value in changes.items() if value is not None}
    return partial(BackdropImageProcessor.from_pretrained, options.model, **changes)


def derive_groups(options: DeriveOptions, dataset: str, split: str = "train") -> dict:
    """Rows with every ordinary image replaced by its patch groups; the record (see `derive`).

    Args:
        dataset: folder of `save_to_disk`, of files, or a Hub id.
        split: of the data set.
    """
    source = DatasetRows(_load(dataset, split))
    recipe = groups_recipe(processor_loader(options), source_digest(source), options.shard_rows)
    return _derive(source, recipe, options)


def derive_pairs(options: DeriveOptions, frames: str, choice: PairOptions, split: str = "train") -> dict:
    """The background group of an earlier frame with the fresh group of a later one; the record.

    Args:
        frames: a data set with columns images (one), messages, scene, and frame where rows are not in order; or a
            folder with a folder per scene, in it images in the order of their names and `metadata.jsonl` with lines
            `{"file_name": "0007.png", "messages": [...]}` (images without a line serve as earlier frames only).
        split: of the data set.
    """
    folder = Path(frames)
    per_scene = folder.is_dir() and any(folder.glob("*/metadata.jsonl"))
    source = PairRows(FolderFrames(folder) if per_scene else DatasetFrames(_load(frames, split)), choice)
    recipe = pairs_recipe(processor_loader(options), choice, source_digest(source), options.shard_rows)
    return _derive(source, recipe, options)


def derive_captions(
    options: DeriveOptions,
    images: Path,
    *,
    coco_captions: Path | None = None,
    coco_instances: Path | None = None,
    entities: Path | None = None,
    ids: Path | None = None,
    spacy: str = "en_core_web_sm",
    split_by: str = "annotations",
    seed: int = 0,
) -> dict:
    """Captioned images as splits background and objects, each group with what is said of it; the record.

    Args:
        images: folder of the image files.
        coco_captions, coco_instances: captions_*.json and instances_*.json of COCO, parsed by a spaCy pipeline.
        entities: folder of Flickr30k Entities' Sentences and Annotations, whose own marks need no parser.
        ids: with `entities`: file of the image ids to take.
        spacy: name of the pipeline.
        split_by: what makes the groups, one of `captions.SPLIT_BY`.
        seed: of the prompts.

    Raises:
        ValueError: neither COCO's files nor those of Flickr30k Entities, or both.
    """
    source: Source
    make_format: Callable[[], CaptionFormat]
    both = coco_captions is not None and coco_instances is not None
    if coco_captions is not None and coco_instances is not None and entities is None:
        source = CocoRows(coco_captions, coco_instances, images)
        meta = load_pipeline(spacy).meta
        make_format, pipeline = partial(CocoFormat, spacy), f"{spacy} {meta['version']}"
    elif entities is not None and not both:
        source = EntitiesRows(entities, images, ids)
        make_format, pipeline = EntitiesFormat, ""
    else:
        raise ValueError("Wanted either --coco-captions and --coco-instances, or --entities.")
    recipe = captions_recipe(
        processor_loader(options),
        make_format,
        source_digest(source),
        pipeline=pipeline,
        split_by=split_by,
        seed=seed,
        shard_rows=options.shard_rows,
    )
    return _derive(source, recipe, options)


def _derive(source: Source, recipe: Recipe, options: DeriveOptions) -> dict:
    record = derive(source, recipe, options.out, workers=options.workers, on_bad_row=options.on_bad_row)
    load_from_disk(options.out)  # The result was promised to load.
    return record


def _load(name: str, split: str) -> Dataset:
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
