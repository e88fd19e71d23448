"""Time to first token against transformers' own LLaVA: same weights, same prompt, same frames, one process.

    backdrop bench ttft --shape clip-l+135m --batch 1,4 --fresh-share 0.05,0.15,0.3 --json ttft.json

A call is timed from decoded images (PIL, RGB) to the first token: detector, matching, preprocessing, tokenising and
`generate(max_new_tokens=1)` are inside. The modes take turns within each repeat, on the same frames:

- `llava`: `LlavaForConditionalGeneration` with the processor that `AutoProcessor` builds;
- `cold`: Backdrop without cache and matching, the detector on every image;
- `tokens`: matching, and a cache of vision tokens;
- `tokens+prefix`: matching, and a cache of vision tokens and language-model prefixes.

All weights are random, and so the detector finds nothing of use: a real YOLOv8n network runs at the model's geometry
wherever a detector is due, then the frame's planted box is returned in place of its answer.

`flop_ideal_ratio` is what FLOPs alone would allow (see `flops`); `fraction_of_ideal` says how near a mode comes to it.

Nothing is compiled: torch.compile would take the language model of one mode through another path than the others'.

`P`: patches of an image. `N`: images of a call.
"""

import gc
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import transformers
from tqdm import tqdm

from backdrop.data.atomic import write_atomically

from .contenders import MATCHED_MODES, MIN_REUSE, MODES, Bench, build_bench
from .devices import check_memory, is_cuda
from .flops import flop_ideals, read_prompts
from .frames import Frame, background_image, draw_frame
from .report import format_seconds, machine, pyplot, versions, write_json_atomically
from .shapes import DTYPES, SHAPES
from .ttft_report import render_markdown, render_plot

MAX_BACKGROUNDS = 4  # cameras of a batch: a batch of 16 is 4 cameras with 4 frames each
MISS_REPEATS = 3  # storing calls are slow, and only the break-even needs them


def run_cell(bench: Bench, batch: int, fresh_share: float, repeats: int) -> list[dict]:
    """One row a mode; `repeats` timed calls of each after one that warms up, the modes taking turns.

    Raises:
        RuntimeError: a timed frame was not a hit, or its fresh patches are not those that were drawn.
    """
    shape = SHAPES[bench.shape_name]
    distinct = min(batch, MAX_BACKGROUNDS)
    backgrounds = [background_image(*shape.source, seed=seed) for seed in range(distinct)]
    nothing: np.ndarray = np.zeros(shape.grid**2, dtype=bool)
    empty = [Frame(backgrounds[row % distinct], nothing, None) for row in range(batch)]
    names = (*MODES, *(f"miss {mode}" for mode in MATCHED_MODES), "detector")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    stored_bytes, fresh_patches, inputs = dict.fromkeys(MODES, 0), [], {}
    for repeat in range(repeats + 1):
        rng = np.random.default_rng([batch, round(1000 * fresh_share), repeat])
        frames = [draw_frame(backgrounds[row % distinct], shape, fresh_share, rng) for row in range(batch)]
        took = {"detector": bench.detector_seconds(frames)}
        for mode in MATCHED_MODES if repeat <= MISS_REPEATS else ():
            contender = bench.contenders[mode]
            took[f"miss {mode}"] = contender.store(empty)
            stored_bytes[mode] = contender.model.background_cache.stats()["bytes"] // distinct
        # No mode always runs behind the same one.
        for mode in MODES[repeat % len(MODES) :] + MODES[: repeat % len(MODES)]:
            contender = bench.contenders[mode]
            if mode in MATCHED_MODES:
                took[mode], inputs[mode] = contender.first_token_on_hits(frames, distinct)
                fresh_patches += _checked_fresh(mode, inputs[mode], frames)
            else:
                took[mode], inputs[mode] = contender.first_token(frames)
        if repeat:
            for name, value in took.items():
                seconds[name].append(value)
    ideals = flop_ideals(bench.shape_name, inputs)
    overhead = _paired(seconds["cold"], np.add(seconds["llava"], seconds["detector"]))
    rows = []
    for mode in MODES:
        ratio = _paired(seconds["llava"], seconds[mode])
        rows.append(
            {
                "shape": bench.shape_name,
                "device": bench.device,
                "dtype": bench.dtype,
                "batch": batch,
                "fresh_share": fresh_share,
                "mode": mode,
                "median_s": median(seconds[mode]),
                "p95_s": float(np.percentile(seconds[mode], 95)),
                "ratio_to_llava": ratio,
                "flop_ideal_ratio": ideals[mode],
                "fraction_of_ideal": ratio / ideals[mode],
                "bytes_per_background": stored_bytes[mode],
                "measured_fresh_share": mean(fresh_patches) / shape.grid**2,
                "break_even_reuses": _break_even(seconds, mode),
                "miss_s": median(seconds[f"miss {mode}"]) if mode in MATCHED_MODES else None,
                "detector_s": median(seconds["detector"]),
                "cold_over_llava_plus_detector": overhead if mode == "cold" else None,
                "repeats": repeats,
                # As timed, in order: entry i of every mode is one repeat, so that a disturbed one shows.
                "seconds": seconds[mode],
            }
        )
    return rows


def _checked_fresh(mode: str, inputs: dict, frames: Sequence[Frame]) -> list[int]:
    """Fresh patches of each row, which must be as many as were drawn."""
    fresh = [prompt.object_patches for prompt in read_prompts(inputs)]
    drawn = [int(frame.changed.sum()) for frame in frames]
    if fresh != drawn:
        raise RuntimeError(f"Mode {mode}: {fresh} patches were fresh; wanted the {drawn} that were drawn.")
    return fresh


def _paired(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over repeats of the ratio within each."""
    return float(np.median(np.divide(numerators, denominators)))


def _break_even(seconds: dict[str, list[float]], mode: str) -> float | None:
    """Reuses that pay back what a storing call costs beyond LLaVA's; None: they never do."""
    if mode not in MATCHED_MODES:
        return 0.0
    llava, hit, miss = (median(seconds[name]) for name in ("llava", mode, f"miss {mode}"))
    if miss <= llava:
        return 0.0
    return (miss - llava) / (llava - hit) if hit < llava else None


def run_ttft(
    shapes: Sequence[str],
    batches: Sequence[int],
    fresh_shares: Sequence[float],
    repeats: int,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    json_path: Path | None = None,
    plot_path: Path | None = None,
    markdown_path: Path | None = None,
) -> list[dict]:
    """Times every cell (shape, batch, fresh share) in all modes.

    Args:
        shapes: names in `SHAPES`.
        batches: images of a call, `N`; up to 4 of them have backgrounds of their own.
        fresh_shares: share of the patches that differ from the background, 0 to 0.7.
        repeats: timed calls of each mode and cell, after one that warms up.
        device: "cpu", "cuda" or "cuda:0".
        dtype: "float32", "bfloat16" or "float16".
        threads: of torch on the CPU; None: torch's own choice.
        json_path: list of rows, written after every cell; cells that it holds already are not run again.
        plot_path, markdown_path: made from the rows alone, see `render_plot` and `render_markdown`.

    Returns:
        One row per cell and mode: those of `json_path`, the new ones last.

    Raises:
        ValueError: an argument is out of its range, or the memory is too small for a shape.
    """
    _check(shapes, batches, fresh_shares, repeats, device, dtype)
    if plot_path is not None:
        pyplot()  # rather now than after an hour
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    rows = _read_rows(json_path)
    done = {_cell_key(row) for row in rows}
    cells = [(s, device, dtype, b, f, repeats) for s in shapes for b in batches for f in fresh_shares]
    origin = {"machine": machine(device), "versions": versions(), "command": _command()}
    bench = None
    with tqdm(total=len(cells), unit="cell", file=sys.stderr) as progress:
        for cell in cells:
            name, batch, fresh_share = cell[0], cell[3], cell[4]
            if cell not in done:
                if bench is None or bench.shape_name != name:
                    bench = None  # before the next one is built: two do not fit
                    gc.collect()
                    if is_cuda(device):
                        torch.cuda.empty_cache()
                    check_memory(name, device, DTYPES[dtype], max(batches))
                    bench = build_bench(name, device, dtype)
                new = run_cell(bench, batch, fresh_share, repeats)
                rows += [{**row, **origin} for row in new]
                done.add(cell)
                _write_json(json_path, rows)
                tqdm.write(_summary(new), file=sys.stderr)
            progress.update()
    if markdown_path is not None:
        write_atomically(markdown_path, render_markdown(rows))
    if plot_path is not None:
        render_plot(rows, plot_path)
    return rows


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _check(
    shapes: Sequence[str],
    batches: Sequence[int],
    fresh_shares: Sequence[float],
    repeats: int,
    device: str,
    dtype: str,
) -> None:
    for name in shapes:
        if name not in SHAPES:
            raise ValueError(f"shape is {name!r}; wanted one of {', '.join(SHAPES)}.")
    for batch in batches:
        if batch < 1:
            raise ValueError(f"batch is {batch}; wanted 1 or more images.")
    for share in fresh_shares:
        if not 0 <= share <= 1 - MIN_REUSE:
            raise ValueError(
                f"fresh_share is {share}; wanted 0 to {1 - MIN_REUSE:g}: a match reuses {MIN_REUSE:g} at least."
            )
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; wanted 1 or more.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; wanted one of {', '.join(DTYPES)}.")
    if is_cuda(device) and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no CUDA device; wanted 'cpu'.")


def _cell_key(row: dict) -> tuple:
    return tuple(row[name] for name in ("shape", "device", "dtype", "batch", "fresh_share", "repeats"))


def _read_rows(path: Path | None) -> list[dict]:
    if path is None or not Path(path).exists():
        return []
    try:
        rows = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no JSON ({error}); wanted a list of benchmark rows, or no file."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "fresh_share" in row for row in rows):
        raise ValueError(f"{path} holds something else; wanted a list of benchmark rows, or no file.")
    return rows


def _write_json(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        write_json_atomically(path, rows)


def _summary(rows: list[dict]) -> str:
    first = rows[0]
    times = ", ".join(
        f"{row['mode']} {format_seconds(row['median_s'])} ({row['ratio_to_llava']:.2f}x)" for row in rows
    )
    return f"{first['shape']} batch {first['batch']} fresh {first['fresh_share']:.0%}: {times}"
