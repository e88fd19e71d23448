"""The `backdrop` command: one typer app, errors as one line, heavy imports only where they are used."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import evaluate, serve

app = typer.Typer(
    name="backdrop",
    help="A LLaVA-style model that encodes background and objects apart and reuses the background across images.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

_debug = False

Licence = Annotated[
    str, typer.Option(help="Licence of the weights (the base model's), as the Hub spells it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    global _debug
    _debug = debug


@app.command(epilog="Example: `backdrop split street.jpg --out panels.png --groups groups/`")
def split(
    images: Annotated[list[Path], typer.Argument(help="Images to split.")],
    out: Annotated[Path | None, typer.Option(help="Picture of how each image was split.")] = None,
    groups: Annotated[Path | None, typer.Option(help="Folder for the groups as PNG.")] = None,
    model: Annotated[str | None, typer.Option(help="Backdrop model whose processor splits.")] = None,
    detector: Annotated[str | None, typer.Option(help="Name or path of an ultralytics model.")] = None,
    size: Annotated[int, typer.Option(help="Without --model: image side, pixels.")] = 336,
    patch_size: Annotated[int, typer.Option(help="Without --model: patch side, pixels.")] = 14,
    confidence: Annotated[float | None, typer.Option(help="Smallest confidence, 0-1.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Classes that count, comma-separated names or ids.")
    ] = None,
    margin: Annotated[int | None, typer.Option(help="Patches by which objects grow.")] = None,
    json_output: Json = False,
) -> None:
    """Show what the detector makes of images: background patches, object patches, boxes."""
    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
    from backdrop.processing.patch_groups_backdrop import GROUP_KINDS, group_to_image, save_group

    from .panels import PanelRow, split_panels

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
    options = {
        "detector": detector,
        "confidence": confidence,
        "classes": [int(c) if c.isdigit() else c for c in classes.split(",")] if classes else None,
        "margin": margin,
    }
    options = {name: value for name, value in options.items() if value is not None}
    originals = processor.fetch_images([str(path) for path in images])
    model_images = processor.model_images(originals, **options)
    found = processor.detections(model_images, **options)
    rows, records = [], []
    for path, original, pixels, detections in zip(images, originals, model_images, found, strict=True):
        mask = detections.combined_mask(pixels.shape[0])
        parts = processor.split_groups(pixels, mask, **options)
        named = [(GROUP_KINDS[part.kind], part.patch_mask) for part in parts]
        rows.append(PanelRow(path.name, original, detections, pixels, mask, named, processor.patch_size))
        records.append(_split_record(path, detections, named, processor, options))
        if groups is not None:
            groups.mkdir(parents=True, exist_ok=True)
            for (kind, _), part in zip(named, parts, strict=True):
                image = group_to_image(part, processor.patch_size, processor.geometry())
                save_group(image, groups / f"{path.stem}.{kind}.png")
    if out is not None:
        split_panels(rows).save(out)
    if json_output:
        typer.echo(json.dumps(records, indent=2))
    else:
        for record in records:
            counts = ", ".join(f"{count} {kind}" for kind, count in record["patches"].items())
            typer.echo(f"{record['image']}: {counts} patches, {len(record['boxes'])} boxes")


def _split_record(path, detections, named, processor, options) -> dict:
    names = detections.names
    boxes = zip(detections.xyxy, detections.class_id, detections.confidence, strict=True)
    return {
        "image": str(path),
        "detector": processor.load_detector(**options).source,
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


@app.command(epilog="Example: `backdrop convert llava-hf/llava-1.5-7b-hf backdrop-7b --detector yolov8n.pt`")
def convert(
    source: Annotated[str, typer.Argument(help="LLaVA checkpoint: a folder or a Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: a complete Hub folder.")],
    detector: Annotated[
        str | None, typer.Option(help="Ultralytics model whose weights go into the folder.")
    ] = None,
    separators: Annotated[bool, typer.Option(help="Wrap groups in separator tokens.")] = True,
    prefusion_layers: Annotated[int, typer.Option(help="Prefusion layers (they start as the identity).")] = 0,
    prefusion_rotary: Annotated[bool, typer.Option(help="Rotary positions in prefusion.")] = True,
    separate_towers: Annotated[bool, typer.Option(help="A tower of their own for objects.")] = False,
    separate_projectors: Annotated[bool, typer.Option(help="A projector of their own for objects.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    licence: Licence = "other",
) -> None:
    """Turn a LLaVA checkpoint into a Backdrop model."""
    from backdrop.hub_export.convert import convert as convert_llava
    from backdrop.hub_export.export import export as export_folder

    hub = {"revision": revision} if revision else {}
    model, processor = convert_llava(
        source,
        separators=separators,
        num_prefusion_layers=prefusion_layers,
        prefusion_rotary=prefusion_rotary,
        separate_vision_towers=separate_towers,
        separate_projectors=separate_projectors,
        detector=detector,
        **hub,
    )
    base = source if not os.path.isdir(source) else None
    files = export_folder(model, processor, out, base_model=base, licence=licence)
    typer.echo(f"{out}: {len(files)} files, {model.num_parameters():,} parameters")


@app.command(epilog="Example: `backdrop export runs/scenes-sft my-model`")
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of a training run, or a LoRA adapter's folder.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    base_model: Annotated[str | None, typer.Option(help="Base model for the card.")] = None,
    notes: Annotated[Path | None, typer.Option(help="Markdown file that goes into the card.")] = None,
    licence: Licence = "other",
    fold: Annotated[
        bool,
        typer.Option(
            "--fold-prefusion", help="Prefusion becomes the language model's first layers (for vLLM)."
        ),
    ] = False,
) -> None:
    """Write a complete Hub folder that loads with nothing of ours installed."""
    from backdrop.hub_export.export import export_checkpoint

    text = notes.read_text() if notes else ""
    files = export_checkpoint(checkpoint, out, base_model, licence, text, fold)
    typer.echo(f"{out}: {len(files)} files")


@app.command(epilog="Example: `backdrop push my-model me/my-model --private`")
def push(
    folder: Annotated[Path, typer.Argument(help="A folder written by convert or export.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub.")],
    private: Annotated[bool, typer.Option(help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
) -> None:
    """Push a folder in one commit, after it has loaded in a clean process."""
    from backdrop.hub_export.push import push as push_folder

    typer.echo(push_folder(folder, repository, private=private, revision=revision))


@app.command(epilog="Example: `backdrop ask my-model frame1.png frame2.png -q 'What is lit?' --reuse`")
def ask(
    model: Annotated[str, typer.Argument(help="Backdrop model: a folder or a Hub id.")],
    frames: Annotated[list[Path], typer.Argument(help="Images, in order.")],
    question: Annotated[str, typer.Option("-q", "--question", help="Asked about every image.")],
    reuse: Annotated[bool, typer.Option(help="Reuse backgrounds from one image to the next.")] = False,
    tolerance: Annotated[float, typer.Option(help="Largest staleness that is reused, grey levels.")] = 0.0,
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
    """Ask one question about each image."""
    from .demo import Asker, print_answers

    if not reuse and (show is not None or cache_folder is not None):
        raise ValueError("--show and --cache-folder tell of reuse: add --reuse.")
    asker = Asker(model, reuse=reuse, tolerance=tolerance, show=show, cache_folder=cache_folder)
    answers = [asker.ask(str(frame), question, max_new_tokens, name=frame.name) for frame in frames]
    print_answers(answers, as_json=json_output)
    asker.close()


bench = typer.Typer(
    no_args_is_help=True, help="Measure: time to first token, a camera's recording, matching."
)
cache = typer.Typer(no_args_is_help=True, help="Look after a folder of stored backgrounds.")
app.add_typer(bench, name="bench")
app.add_typer(cache, name="cache")

JsonFile = Annotated[Path | None, typer.Option("--json", help="File for the figures.")]
Plot = Annotated[Path | None, typer.Option(help="PNG for a plot.")]
Markdown = Annotated[Path | None, typer.Option(help="File for a table.")]


def _several(text: str, kind: type) -> list:
    """`"1,4"` -> `[1, 4]`."""
    return [kind(part.strip()) for part in text.split(",")]


@bench.command(epilog="Example: `backdrop bench ttft --shape clip-l+135m --batch 1,4 --json ttft.json`")
def ttft(
    shape: Annotated[
        str, typer.Option("--shape", "--shapes", help="tiny, clip-l+135m, llava-1.5-7b; commas work.")
    ] = "clip-l+135m",
    batch: Annotated[str, typer.Option("--batch", "--batches", help="Images a call; commas work.")] = "1",
    fresh_share: Annotated[
        str, typer.Option("--fresh-share", "--fresh-shares", help="Shares of patches that changed.")
    ] = "0.05,0.15,0.3,0.5",
    repeats: Annotated[int, typer.Option(help="Timed calls of each mode.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    json_file: JsonFile = None,
    plot: Plot = None,
    markdown: Markdown = None,
) -> None:
    """Time to first token against transformers' LLaVA: cold, vision tokens reused, prefix reused."""
    from backdrop.benchmarks.ttft import render_markdown, run_ttft

    rows = run_ttft(
        _several(shape, str),
        _several(batch, int),
        _several(fresh_share, float),
        repeats,
        device,
        dtype,
        threads,
        json_path=json_file,
        plot_path=plot,
        markdown_path=markdown,
    )
    typer.echo(render_markdown(rows))


@bench.command(epilog="Example: `backdrop bench camera street.mp4 --json street.json --plot street.png`")
def camera(
    recording: Annotated[Path, typer.Argument(help="A video, or a folder of images.")],
    tolerance: Annotated[float, typer.Option(help="Largest staleness that is reused, grey levels.")] = 10.0,
    min_reuse: Annotated[float, typer.Option(help="Smallest share of patches a match reuses.")] = 0.3,
    model: Annotated[
        str | None, typer.Option(help="Backdrop model whose geometry and detector are used.")
    ] = None,
    size: Annotated[int, typer.Option(help="Without --model: image side, pixels.")] = 336,
    patch_size: Annotated[int, typer.Option(help="Without --model: patch side, pixels.")] = 14,
    max_frames: Annotated[int | None, typer.Option(help="Stop after so many frames.")] = None,
    loops: Annotated[int, typer.Option(help="Times that the recording is played.")] = 1,
    json_file: JsonFile = None,
    maps: Annotated[
        Path | None,
        typer.Option(help=".npz of frames, references and fresh patches, to check the bound with."),
    ] = None,
    plot: Plot = None,
) -> None:
    """Match a real recording frame by frame: what is reused, and how stale it is. No language model."""
    from backdrop.benchmarks.camera import default_processor, run_camera, summary
    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

    processor = (
        default_processor(size, patch_size)
        if model is None
        else BackdropImageProcessor.from_pretrained(model)
    )
    figures = run_camera(
        recording,
        processor=processor,
        tolerance=tolerance,
        min_reuse=min_reuse,
        json_path=json_file,
        maps_path=maps,
        plot_path=plot,
        max_frames=max_frames,
        loops=loops,
    )
    typer.echo(summary(figures))


@bench.command(epilog="Example: `backdrop bench serving --minutes 30 --json serving.json`")
def serving(
    model: Annotated[str, typer.Option(help="Exported Backdrop folder.")] = "examples/scenes-model",
    shape: Annotated[
        str | None, typer.Option(help="clip-l+135m, ...: random weights of this shape in place of a model.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Of load, shared by the three ways.")] = 30.0,
    cameras: Annotated[int, typer.Option(help="Backgrounds.")] = 24,
    concurrency: Annotated[int, typer.Option(help="Clients that ask at a time.")] = 6,
    slice_seconds: Annotated[float, typer.Option(help="Each way's turn.")] = 20.0,
    fresh_share: Annotated[float, typer.Option(help="With --shape: share of patches that changed.")] = 0.1,
    engine_python: Annotated[str | None, typer.Option(help="Python of the environment with vLLM.")] = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
) -> None:
    """First token under load on vLLM: frames split, whole, and stock LLaVA, in turns."""
    from backdrop.benchmarks.serving import render_markdown, run_serving

    report = run_serving(
        None if shape else model,
        shape,
        minutes,
        cameras,
        concurrency,
        slice_seconds,
        fresh_share,
        engine_python,
        json_file,
    )
    text = render_markdown(report)
    if markdown is not None:
        markdown.write_text(text)
    typer.echo(text)


@bench.command(epilog="Example: `backdrop bench matching --references 1000,100000 --json matching.json`")
def matching(
    references: Annotated[str, typer.Option(help="How many known backgrounds; commas work.")] = "1000",
    queries: Annotated[int, typer.Option(help="Images that are looked up.")] = 100,
    folder: Annotated[Path | None, typer.Option(help="Where the references' pixels lie.")] = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
) -> None:
    """Cost of recognising a background among many."""
    from backdrop.benchmarks.matching import render_markdown, run_matching

    rows = run_matching(_several(references, int), queries=queries, folder=folder, json_path=json_file)
    table = render_markdown(rows)
    if markdown is not None:
        markdown.write_text(table)
    typer.echo(table)


Folder = Annotated[Path, typer.Argument(help="The folder given to enable_background_cache(folder=...).")]


def _folder(path: Path, max_bytes: int = 2**62):
    from backdrop.modeling.background_folder_backdrop import BackgroundFolder

    if not path.is_dir():
        raise ValueError(f"{path} is no folder; wanted one of stored backgrounds.")
    return BackgroundFolder(path, max_bytes)


@cache.command("stats", epilog="Example: `backdrop cache stats /var/cache/backdrop`")
def cache_stats(folder: Folder, json_output: Json = False) -> None:
    """Entries and bytes of a folder."""
    stats = _folder(folder).stats()
    figures = {name: stats[name] for name in ("entries", "bytes")}
    if json_output:
        typer.echo(json.dumps(figures, indent=2))
    else:
        typer.echo(f"{folder}: {figures['entries']} entries, {figures['bytes'] / 2**20:.1f} MiB")


@cache.command("prune", epilog="Example: `backdrop cache prune /var/cache/backdrop --max-bytes 1000000000`")
def cache_prune(
    folder: Folder,
    max_bytes: Annotated[int, typer.Option(help="What may stay; the least recently used goes first.")],
    json_output: Json = False,
) -> None:
    """Make a folder smaller, and remove what killed writers left."""
    if max_bytes < 0:
        raise ValueError(f"max_bytes is {max_bytes}; wanted 0 or more.")
    kept = _folder(folder)
    freed = kept.prune(max_bytes)
    if json_output:
        typer.echo(json.dumps({"freed_bytes": freed, "bytes": kept.stats()["bytes"]}, indent=2))
    else:
        typer.echo(f"{folder}: {freed / 2**20:.1f} MiB freed, {kept.stats()['bytes'] / 2**20:.1f} MiB left")


@cache.command("verify", epilog="Example: `backdrop cache verify /var/cache/backdrop`")
def cache_verify(folder: Folder, json_output: Json = False) -> None:
    """Read every entry and check it; exits 1 if one is damaged."""
    kept = _folder(folder)
    problems = kept.verify()
    if json_output:
        typer.echo(json.dumps({"entries": kept.stats()["entries"], "problems": problems}, indent=2))
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{folder}: {kept.stats()['entries']} entries, {len(problems)} damaged")
    if problems:
        raise typer.Exit(1)


app.command("eval", epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command("serve", epilog=serve.EPILOG)(serve.serve)


@app.command(epilog="Example: `backdrop demo --frames 24`")
def demo(
    model: Annotated[
        str, typer.Option(help="Backdrop model trained on the scenes.")
    ] = "examples/scenes-model",
    frames: Annotated[int, typer.Option(help="Frames of the clip.")] = 24,
    family: Annotated[str, typer.Option(help="phone, street or panel.")] = "street",
    seed: Annotated[int, typer.Option(help="Which unseen background and motion.")] = 0,
    show: Annotated[
        Path | None, typer.Option(help="Folder for the frames and a picture of their groups.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Answer questions about a clip of one unseen background, reusing it from frame to frame."""
    from .demo import run_demo

    run_demo(model, frames, family, seed, show, json_output)


def main() -> None:
    """Entry point: an error is one line and a non-zero exit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(standalone_mode=False)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _debug:
            raise
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        first = " ".join(message.split()) or type(error).__name__
        typer.echo(f"backdrop: {first}", err=True)
        sys.exit(2 if hasattr(error, "format_message") else 1)
    sys.exit(code if isinstance(code, int) else 0)
