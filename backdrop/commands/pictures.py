"""`backdrop split`, `backdrop ask` and `backdrop demo`: what a model sees, answers, and reuses."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Fit, Json, Tolerance, example_model, examples, known_model

if TYPE_CHECKING:
    import numpy as np

    from backdrop.processing.detections_backdrop import Detections
    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
    from backdrop.processing.picture_placement_backdrop import PicturePlacement

SPLIT_EXAMPLE = examples(
    "backdrop demo --frames 6 --show runs/demo",
    """backdrop split runs/demo/frame-00.png --model examples/scenes-model \\
    --out runs/split.png""",
)
ASK_EXAMPLE = examples(
    "backdrop demo --frames 6 --show runs/demo",
    """backdrop ask examples/scenes-model runs/demo/frame-0?.png --reuse \\
    -q "How many vehicles are there?" --show runs/reuse""",
)
DEMO_EXAMPLE = examples("backdrop demo --family phone --frames 24 --show runs/demo")


def split(
    images: Annotated[list[Path], typer.Argument(help="Images to split.")],
    out: Annotated[Path | None, typer.Option(help="PNG file: how each image was split.")] = None,
    groups: Annotated[Path | None, typer.Option(help="Folder for the groups, a PNG for each.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Backdrop model (folder or Hub id) whose processor and detector split.", callback=known_model
        ),
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="Name or path of an ultralytics model. Without --model: yolov8n.pt.")
    ] = None,
    size: Annotated[int, typer.Option(help="Without --model: image side, pixels.")] = 336,
    patch_size: Annotated[int, typer.Option(help="Without --model: patch side, pixels.")] = 14,
    confidence: Annotated[
        float | None, typer.Option(help="Smallest confidence of a detection that counts, 0-1.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Classes that count: names or ids with commas between.")
    ] = None,
    margin: Annotated[int | None, typer.Option(help="Patches by which objects grow.")] = None,
    fit: Fit = None,
    json_output: Json = False,
) -> None:
    """Show how a YOLO detector splits images into background patches and object patches."""
    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
    from backdrop.processing.patch_groups_backdrop import GROUP_KINDS, group_to_image, save_group

    from ..panels import PanelRow, split_panels

    if out is None and groups is None and not json_output:
        raise ValueError("Nothing to do: give --out PICTURE, --groups FOLDER, or --json.")
    if model is not None:
        processor = BackdropImageProcessor.from_pretrained(model)
    else:
        side = {"height": size, "width": size}
        processor = BackdropImageProcessor(
            size={"shortest_edge": size}, crop_size=side, patch_size=patch_size
        )
        detector = detector or "yolov8n.pt"
    if fit is not None:
        processor.fit = fit
    options = {
        "detector": detector,
        "confidence": confidence,
        "classes": [int(c) if c.isdigit() else c for c in classes.split(",")] if classes else None,
        "margin": margin,
    }
    options = {name: value for name, value in options.items() if value is not None}
    originals = processor.fetch_images([str(path) for path in images])
    placed = processor.placed_images(originals, **options)
    model_images, placements = [pixels for pixels, _ in placed], [where for _, where in placed]
    found = processor.detections(model_images, placements, **options)
    grown = options.get("margin", processor.margin)
    rows, records = [], []
    for path, original, (pixels, where), detections in zip(images, originals, placed, found, strict=True):
        mask = detections.combined_mask(pixels.shape[0])
        parts = processor.split_groups(pixels, mask, where, **options)
        named = [(GROUP_KINDS[part.kind], part.patch_mask) for part in parts]
        rows.append(
            PanelRow(path.name, original, detections, pixels, mask, named, processor.patch_size, grown, where)
        )
        records.append(_split_record(path, detections, named, where, processor, options))
        if groups is not None:
            groups.mkdir(parents=True, exist_ok=True)
            for (kind, _), part in zip(named, parts, strict=True):
                image = group_to_image(part, processor.patch_size, processor.geometry())
                save_group(image, groups / f"{path.stem}.{kind}.png")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        split_panels(rows).save(out)
    if json_output:
        typer.echo(json.dumps(records, indent=2))
    else:
        for record in records:
            counts = ", ".join(f"{count} {kind}" for kind, count in record["patches"].items())
            lost = [
                f"{share:.0%} of the {side} cut off" for side, share in record["cut_off"].items() if share
            ]
            lost += [f"{record['padding']:.0%} padding"] if record["padding"] else []
            typer.echo(
                ", ".join([f"{record['image']}: {counts} patches", f"{len(record['boxes'])} boxes", *lost])
            )


def _split_record(
    path: Path,
    detections: "Detections",
    named: list[tuple[str, "np.ndarray"]],
    placement: "PicturePlacement",
    processor: "BackdropImageProcessor",
    options: dict,
) -> dict:
    names = detections.names
    cut = dict(zip(("width", "height"), (round(share, 4) for share in placement.lost), strict=True))
    boxes = zip(detections.xyxy, detections.class_id, detections.confidence, strict=True)
    return {
        "image": str(path),
        "detector": processor.load_detector(**options).source,
        "fit": processor.fit,
        "cut_off": cut,
        "padding": round(placement.padded, 4),
        "patches": {kind: int(mask.sum()) for kind, mask in named} | {"total": len(named[0][1])},
        "boxes": [
            {
                "class": names[int(c)],
                "confidence": round(float(s), 4),
                "xyxy": [round(float(v), 1) for v in box],
            }
            for box, c, s in boxes
        ],
    }


def ask(
    model: Annotated[str, typer.Argument(help="Backdrop model: a folder or a Hub id.", callback=known_model)],
    frames: Annotated[list[Path], typer.Argument(help="Images, in order.")],
    question: Annotated[str, typer.Option("-q", "--question", help="Asked about every image.")],
    reuse: Annotated[bool, typer.Option(help="Reuse backgrounds from one image to the next.")] = False,
    tolerance: Tolerance = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 64,
    show: Annotated[
        Path | None,
        typer.Option(help="With --reuse: folder for a picture of each frame's reused and fresh patches."),
    ] = None,
    cache_folder: Annotated[
        Path | None, typer.Option(help="With --reuse: folder for backgrounds that outlive the command.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Ask one question about each of several images, with or without reuse of their background."""
    from ..demo import Asker, print_answers

    if not reuse and (show is not None or cache_folder is not None):
        raise ValueError("--show and --cache-folder tell of reuse: add --reuse.")
    asker = Asker(model, reuse=reuse, tolerance=tolerance, show=show, cache_folder=cache_folder)
    answers = [asker.ask(str(frame), question, max_new_tokens, name=frame.name) for frame in frames]
    print_answers(answers, as_json=json_output)
    asker.close()


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="Backdrop model trained on the made scenes. Default: the checkout's examples/scenes-model.",
            callback=known_model,
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of the clip.")] = 24,
    family: Annotated[str, typer.Option(help="phone, street or panel.")] = "street",
    seed: Annotated[int, typer.Option(help="Which unseen background and motion.")] = 0,
    show: Annotated[
        Path | None, typer.Option(help="Folder for the frames and a picture of their groups.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Answer questions about a made clip, once with reuse of the background and once without."""
    # Both are checked before anything slow is imported.
    from backdrop.scenes.world import FAMILIES

    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; wanted one of {', '.join(FAMILIES)}.")
    model = model or example_model()
    from ..demo import run_demo

    run_demo(model, frames, family, seed, show, json_output)
