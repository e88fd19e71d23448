"""`backdrop bench`: what the figures in the docs are measured with."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Fit,
    JsonFile,
    Markdown,
    Plot,
    Tolerance,
    example_model,
    examples,
    known_model,
    print_figures,
)

app = typer.Typer(
    no_args_is_help=True,
    help="Measure time to first token, what a recording reuses, matching, memory, and load on an engine.",
)


def _several(text: str, kind: type) -> list:
    """`"1,4"` -> `[1, 4]`."""
    return [kind(part.strip()) for part in text.split(",")]


@app.command(
    **examples(
        """backdrop bench ttft --shape tiny --batch 1,2 --fresh-share 0.05,0.3 \\
        --json runs/ttft.json --plot runs/ttft.png"""
    )
)
def ttft(
    shape: Annotated[
        str,
        typer.Option(
            "--shape", "--shapes", help="tiny, clip-l+135m or llava-1.5-7b, or several with commas."
        ),
    ] = "clip-l+135m",
    batch: Annotated[
        str, typer.Option("--batch", "--batches", help="Images in one call, or several numbers with commas.")
    ] = "1",
    fresh_share: Annotated[
        str,
        typer.Option(
            "--fresh-share", "--fresh-shares", help="Shares (0-1) of patches that changed, with commas."
        ),
    ] = "0.05,0.15,0.3,0.5",
    repeats: Annotated[int, typer.Option(help="Timed calls of each mode.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    json_file: JsonFile = None,
    plot: Plot = None,
    markdown: Markdown = None,
) -> None:
    """Time the first token against transformers' LLaVA: nothing, vision tokens, or the prefix reused."""
    from backdrop.benchmarks.ttft import run_ttft
    from backdrop.benchmarks.ttft_report import render_markdown

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


@app.command(
    **examples(
        "backdrop scenes recording runs/camera --frames 100",
        """backdrop bench camera runs/camera --json runs/camera.json \\
        --plot runs/camera.png""",
    )
)
def camera(
    recording: Annotated[Path, typer.Argument(help="A video, or a folder of images.")],
    tolerance: Tolerance = 10.0,
    min_reuse: Annotated[
        float, typer.Option(help="Smallest share (0-1) of patches that a match must reuse.")
    ] = 0.2,
    model: Annotated[
        str | None,
        typer.Option(help="Backdrop model whose image size and detector are used.", callback=known_model),
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
    references: Annotated[
        Path | None, typer.Option(help="Folder for the references as PNG; what they do not own is hatched.")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="Detector (a name or a file of ultralytics) that explains objects.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of a background, 1 or 2.")] = 2,
    strict: Annotated[
        bool, typer.Option(help="Start another reference in the frame in which a change is first seen.")
    ] = False,
    follow_exposure: Annotated[
        bool,
        typer.Option("--follow-exposure", help="Undo a change of the camera's exposure before comparing."),
    ] = False,
    align: Annotated[
        bool, typer.Option("--align", help="Undo a shake of at most a few pixels before comparing.")
    ] = False,
    fit: Fit = None,
) -> None:
    """Match a recording frame by frame: how much is reused, how stale it is. No language model."""
    from backdrop.benchmarks.camera import default_processor, run_camera, summary
    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

    processor = (
        default_processor(size, patch_size)
        if model is None
        else BackdropImageProcessor.from_pretrained(model)
    )
    if detector is not None:
        processor.detector = detector
    if fit is not None:
        processor.fit = fit
    figures = run_camera(
        recording,
        processor=processor,
        tolerance=tolerance,
        min_reuse=min_reuse,
        matching={
            "layers": layers,
            "strict": strict,
            "follow_exposure": follow_exposure,
            "align": align,
        },
        references_path=references,
        json_path=json_file,
        maps_path=maps,
        plot_path=plot,
        max_frames=max_frames,
        loops=loops,
    )
    typer.echo(summary(figures))


@app.command(
    **examples(
        "make serve-setup",
        "backdrop bench serving --minutes 3 --slice-seconds 10 --json runs/serving.json",
    )
)
def serving(
    model: Annotated[
        str | None,
        typer.Option(
            help="Exported Backdrop folder. Default: the checkout's examples/scenes-model.",
            callback=known_model,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="In place of a model: random weights of this shape, such as clip-l+135m."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Minutes of load, shared by the three ways.")] = 30.0,
    cameras: Annotated[int, typer.Option(help="Cameras, each with a background of its own.")] = 24,
    concurrency: Annotated[int, typer.Option(help="Clients that ask at the same time.")] = 6,
    slice_seconds: Annotated[float, typer.Option(help="Length of each way's turn, seconds.")] = 20.0,
    fresh_share: Annotated[
        float, typer.Option(help="With --shape: share (0-1) of patches that changed.")
    ] = 0.1,
    engine_python: Annotated[str | None, typer.Option(help="Python of the environment with vLLM.")] = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
) -> None:
    """Time the first token under load on vLLM: split frames, whole frames, and stock LLaVA."""
    if shape is None:
        model = model or example_model()
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


@app.command(**examples("backdrop bench matching --references 100,1000 --json runs/matching.json"))
def matching(
    references: Annotated[
        str, typer.Option(help="How many known backgrounds, or several numbers with commas.")
    ] = "1000",
    queries: Annotated[int, typer.Option(help="Images that are looked up.")] = 100,
    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for the references' pixels. Default: the system's temporary folder."),
    ] = None,
    json_file: JsonFile = None,
    markdown: Markdown = None,
) -> None:
    """Time how long it takes to recognise a background among many."""
    from backdrop.benchmarks.matching import render_markdown, run_matching

    rows = run_matching(_several(references, int), queries=queries, folder=folder, json_path=json_file)
    table = render_markdown(rows)
    if markdown is not None:
        markdown.write_text(table)
    typer.echo(table)


@app.command(**examples("backdrop bench encode --pairs 1"))
def encode(
    pairs: Annotated[int, typer.Option(help="Timed runs of each way, in turns.")] = 5,
    images: Annotated[int, typer.Option(help="Images in one call.")] = 1,
    object_patches: Annotated[int, typer.Option(help="Patches of 576 that are objects'.")] = 86,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    json_file: JsonFile = None,
) -> None:
    """Time the encoding of split images against whole ones in the stock tower (CLIP-L/14-336)."""
    from backdrop.benchmarks.encode import run_encode
    from backdrop.benchmarks.report import write_json_atomically

    figures = run_encode(pairs, images, object_patches, threads)
    if json_file is not None:
        write_json_atomically(json_file, figures)
    print_figures(figures, as_json=False)


@app.command(**examples("backdrop bench memory --check"))
def memory(
    docs: Annotated[
        Path | None, typer.Option(help="Folder to write memory.md and memory.json to (includes --check).")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare estimates with measured runs on the CPU.")
    ] = False,
) -> None:
    """Estimate the peak memory of training LLaVA-1.5-7B, and check estimates against measured runs."""
    from backdrop.train.memory.report import run_memory

    run_memory(docs, check)


@app.command(
    **examples(
        """backdrop bench gpu --out runs/gpu --device cpu --shape tiny \\
        --parts ttft,breakdown"""
    )
)
def gpu(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json and gpu.md, written after each part.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu to try the command.")] = "cuda",
    shape: Annotated[
        str, typer.Option(help="Shape that is timed: llava-1.5-7b, ..., tiny.")
    ] = "llava-1.5-7b",
    parts: Annotated[
        str | None,
        typer.Option(help="parity, ttft, breakdown, graphs, compiled, memory, torch.compile, with commas."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="No part starts after so long.")] = 460.0,
) -> None:
    """Run everything that only a GPU can tell, in at most eight minutes: parity, times, breakdown, memory."""
    from backdrop.benchmarks.gpu import PARTS, run_gpu
    from backdrop.benchmarks.gpu_report import render_markdown

    chosen = PARTS if parts is None else _several(parts, str)
    typer.echo(render_markdown(run_gpu(out, device, shape, chosen, seconds)))
