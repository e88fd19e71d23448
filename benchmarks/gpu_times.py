"""`backdrop bench gpu`, times: first token, breakdown, captured graphs, torch.compile."""

import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import DynamicCache

from .breakdown import breakdown
from .captured import captured_rows
from .contenders import (
    Bench,
    Contender,
    build_llava,
)
from .frames import Frame, background_image, draw_frame
from .gpu_run import GpuRun, build_bench, difference, free
from .shapes import DTYPES, SHAPES
from .ttft import run_cell

BATCHES, FRESH_SHARES = (1, 16), (0.05, 0.15)


# ---- time to first token


def time_to_first_token(run: GpuRun) -> None:
    """Every cell of batch and fresh share at the run's shape; batches that do not fit are named."""
    result = run.results.setdefault("ttft", {})
    rows, notes = result.setdefault("rows", []), result.setdefault("left out", [])
    bench = build_bench(run.shape, run.device, run.dtype)
    for batch in BATCHES:
        for fresh_share in FRESH_SHARES:
            if run.seconds_left < 40:
                notes.append(f"batch {batch}, {fresh_share:.0%} fresh: the time was up")
                continue
            try:
                rows += run_cell(bench, batch, fresh_share, repeats=7 if batch == 1 else 3)
            except torch.OutOfMemoryError as error:
                notes.append(f"batch {batch}, {fresh_share:.0%} fresh: {str(error)[:120]}")
                free()
            run.write()


# ---- breakdown


def host_breakdown(run: GpuRun) -> None:
    """Milliseconds of each stage for LLaVA, cold and reused at 15% fresh, with waits at every stage and without."""
    result = run.results.setdefault("breakdown", {})
    for shape_name in dict.fromkeys(("host-7b" if run.shape != "tiny" else "tiny", run.shape)):
        bench = build_bench(shape_name, run.device, run.dtype)
        for wait in (True, False) if torch.cuda.is_available() else (False,):
            title = f"{shape_name}, {'waiting at each stage' if wait else 'host time'}"
            result[title] = mode_breakdowns(bench, wait)
            run.write()
        del bench
        free()


def mode_breakdowns(bench: Bench, wait: bool, fresh_share: float = 0.15) -> dict[str, dict[str, float]]:
    """Milliseconds of each stage for LLaVA, cold and reused, batch 1, a new frame each time."""
    shape = SHAPES[bench.shape_name]
    background = background_image(*shape.source, seed=0)
    rows = {}
    for mode in ("llava", "cold", "tokens+prefix"):
        contender = bench.contenders[mode]
        if mode == "tokens+prefix":
            contender.store([Frame(background, np.zeros(shape.grid**2, dtype=bool), None)])
        rng = np.random.default_rng(1)

        def call(contender: Contender = contender, rng: np.random.Generator = rng) -> float:
            return contender.first_token([draw_frame(background, shape, fresh_share, rng)])[0]

        call(), call()
        rows[mode] = breakdown(call, 9, wait)
    return rows


# ---- CUDA graphs


@torch.no_grad()
def graphs(run: GpuRun) -> None:
    """The layers that a reused answer runs (15% fresh), launched by Python and replayed from a captured graph."""
    result = run.results.setdefault("graphs", {})
    if torch.device(run.device).type != "cuda":
        result["left out"] = "CUDA graphs need a CUDA device"
        return
    shape = SHAPES[run.shape]
    llava = build_llava(shape, run.device, DTYPES[run.dtype])
    patches = shape.grid**2
    fresh = round(0.15 * patches)
    text = shape.text
    head = text["hidden_size"] // text["num_attention_heads"]
    prefix = 40 + patches  # system text, separators and a background that owns every patch
    new = fresh + 30  # fresh tokens, separators and the question
    tower = llava.model.vision_tower
    vision = torch.randn(1, 1 + fresh, shape.vision["hidden_size"], device=run.device, dtype=llava.dtype)
    words = torch.randn(1, new, text["hidden_size"], device=run.device, dtype=llava.dtype)
    positions = torch.arange(prefix, prefix + new, device=run.device)[None]
    kept = torch.randn(1, text["num_key_value_heads"], prefix, head, device=run.device, dtype=llava.dtype)

    def language_model() -> torch.Tensor:
        cache = DynamicCache(config=llava.config.text_config)
        for i in range(text["num_hidden_layers"]):
            cache.update(kept, kept, i)
        outputs = llava.model.language_model(
            inputs_embeds=words, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return llava.lm_head(outputs.last_hidden_state[:, -1:])

    def tower_layers() -> torch.Tensor:
        hidden = vision
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden

    for name, call in (("tower layers", tower_layers), ("language model", language_model)):
        row: dict = {"launched, ms": _cuda_milliseconds(call)}
        result[name] = row
        try:
            wanted = call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = call()
            row["replayed, ms"] = _cuda_milliseconds(graph.replay)
            row["largest difference"] = difference(found, wanted)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()
        run.write()


def _cuda_milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median wall milliseconds of a call, until the GPU is done."""
    for _ in range(3):
        call()
    took = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        took.append(1000 * (time.perf_counter() - started))
    return float(np.median(took))


# ---- compiled


def compiled(run: GpuRun) -> None:
    """Batch 1, reused answers from captured graphs beside LLaVA and the plain reuse path."""
    rows = run.results.setdefault("compiled", {}).setdefault("rows", [])
    bench = build_bench(run.shape, run.device, run.dtype)
    for fresh_share in FRESH_SHARES:
        rows += captured_rows(bench, fresh_share)
        run.write()


def torch_compiled(run: GpuRun) -> None:
    """Batch 1, 15% fresh, tower and language model of both models through `torch.compile`.

    The tower's layers are alike and are compiled once for all of them; a language model's layers name their place in the
    cache, so the whole of it is one graph, for each length of a prompt.
    """
    bench = build_bench(run.shape, run.device, run.dtype)
    started = time.monotonic()
    for mode in ("llava", "tokens+prefix"):
        model = bench.contenders[mode].model.model
        for module in (*model.vision_tower.encoder.layers, model.language_model):
            module.compile(dynamic=False)
    shape = SHAPES[run.shape]
    background = background_image(*shape.source, seed=0)
    empty = Frame(background, np.zeros(shape.grid**2, dtype=bool), None)
    bench.contenders["tokens+prefix"].store([empty])
    seconds: dict[str, list[float]] = {"llava": [], "tokens+prefix": []}
    repeats = 9
    for repeat in range(repeats + 2):
        frame = draw_frame(background, shape, 0.15, np.random.default_rng(repeat))
        for mode in seconds:
            took = bench.contenders[mode].first_token([frame])[0]
            if repeat >= 2:
                seconds[mode].append(took)
        if repeat == 1:
            run.results.setdefault("torch.compile", {})["warm-up, s"] = round(time.monotonic() - started, 1)
    medians = {mode: float(np.median(values)) for mode, values in seconds.items()}
    run.results["torch.compile"] |= {
        "median, ms": {mode: 1000 * value for mode, value in medians.items()},
        "ratio": float(np.median(np.divide(seconds["llava"], seconds["tokens+prefix"]))),
        "how": "torch.compile of each tower layer and of the language model, dynamic=False",
    }
