"""Reused answers from captured CUDA graphs (`model.compile_reuse`) beside LLaVA and the plain reuse path: time and parity.

On a CPU nothing is captured; the same padded passes run by Python there, to try the benchmark itself.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from backdrop.modeling.captured_reuse_backdrop import CapturedReuse
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

from .contenders import (
    CACHE_BYTES,
    MIN_REUSE,
    TOLERANCE,
    Bench,
    Contender,
    backdrop_processor,
    sharing_backdrop,
)
from .frames import Frame, background_image, draw_frame
from .shapes import SHAPES, Shape

CAPTURED = "tokens+prefix, captured"
MODES = ("llava", "tokens+prefix", CAPTURED)
WARM_UPS = 3
PARITY_FRAMES, PARITY_TOKENS = 4, 4


def captured_contender(bench: Bench) -> Contender:
    """As the bench's `tokens+prefix`, on the same weights, with `compile_reuse` on."""
    model = sharing_backdrop(bench.contenders["llava"].model)
    processor = backdrop_processor(SHAPES[bench.shape_name], bench.detector)
    model.enable_background_cache(max_bytes=CACHE_BYTES)
    processor.enable_background_matching(
        tolerance=TOLERANCE,
        min_reuse=MIN_REUSE,
        max_overridden=1 - MIN_REUSE,
        detect="on_miss",
    )
    _switch_on(model)
    return Contender(CAPTURED, model, processor, bench.detector)


def captured_rows(bench: Bench, fresh_share: float, repeats: int = 9) -> list[dict]:
    """Batch 1, the same frames for each of `MODES` in turn: a row each, an error in place of its times where one fails."""
    shape = SHAPES[bench.shape_name]
    background = background_image(*shape.source, seed=0)
    empty = Frame(background, np.zeros(shape.grid**2, dtype=bool), None)
    rows = {mode: {"fresh_share": fresh_share, "mode": mode} for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    contenders: dict[str, Contender] = {}

    def attempt(mode: str, call: Callable) -> None:
        if "error" in rows[mode]:
            return
        try:
            call()
        except Exception as error:
            rows[mode]["error"] = f"{type(error).__name__}: {error}"[:300]

    def start(mode: str) -> None:
        started = time.perf_counter()
        contenders[mode] = captured_contender(bench) if mode == CAPTURED else bench.contenders[mode]
        if mode != "llava":
            contenders[mode].store([empty])
        rng = np.random.default_rng(0)
        for _ in range(WARM_UPS):
            contenders[mode].first_token([draw_frame(background, shape, fresh_share, rng)])
        rows[mode]["warm_up_s"] = time.perf_counter() - started

    for mode in MODES:
        attempt(mode, lambda mode=mode: start(mode))
    for repeat in range(repeats):
        frame = draw_frame(background, shape, fresh_share, np.random.default_rng(1 + repeat))
        for mode in MODES:
            attempt(
                mode,
                lambda mode=mode, frame=frame: seconds[mode].append(contenders[mode].first_token([frame])[0]),
            )
    if CAPTURED in contenders:
        reuse = contenders[CAPTURED].model.compiled_reuse
        rows[CAPTURED]["stats"] = reuse.stats()
        attempt(
            CAPTURED,
            lambda: rows[CAPTURED].update(
                _pass_milliseconds(contenders[CAPTURED], background, shape, fresh_share)
            ),
        )
        contenders[CAPTURED].model.disable_compiled_reuse()
    for mode, row in rows.items():
        if "error" not in row:
            row["median_s"] = float(np.median(seconds[mode]))
            if len(seconds["llava"]) == repeats:
                row["ratio_to_llava"] = float(np.median(np.divide(seconds["llava"], seconds[mode])))
    return list(rows.values())


def _pass_milliseconds(
    contender: Contender, background: Image.Image, shape: Shape, fresh_share: float
) -> dict:
    """Median milliseconds of the two captured passes, copies in and out included, waiting for the device at each end."""
    reuse, device = contender.model.compiled_reuse, contender.model.device
    took: dict[str, list[float]] = {"language_model": [], "tower_layers": []}

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            _wait(device)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            _wait(device)
            took[name].append(1000 * (time.perf_counter() - started))
            return result

        return call

    for name in took:
        setattr(reuse, name, timed(name, getattr(reuse, name)))
    try:
        for repeat in range(7):
            frame = draw_frame(background, shape, fresh_share, np.random.default_rng(100 + repeat))
            contender.first_token([frame])
    finally:
        for name in took:
            delattr(reuse, name)
    return {f"{name}_ms": float(np.median(values)) for name, values in took.items() if values}


@torch.no_grad()
def captured_parity(model: BackdropForConditionalGeneration, prepared: Sequence[dict]) -> dict:
    """Captured against plain answers, all of them hits; and captured misses against captured hits.

    Args:
        model: a Backdrop model; its cache and captured reuse are off afterwards.
        prepared: the processor's output for one image each.
    """
    prepared = prepared[:PARITY_FRAMES]

    def answer(inputs: dict) -> tuple:
        out = model.generate(
            **inputs,
            max_new_tokens=PARITY_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences.tolist(), out.logits[0].float()

    try:
        model.enable_background_cache(max_bytes=CACHE_BYTES)
        plain = []
        for inputs in prepared:
            answer(inputs)
            plain.append(answer(inputs))
        cache = model.enable_background_cache(max_bytes=CACHE_BYTES)
        reuse = _switch_on(model)
        misses, hits = [], []
        for inputs in prepared:
            cache.clear()
            misses.append(answer(inputs))
            hits.append(answer(inputs))
        stats = reuse.stats()
        return {
            "captured passes": stats["language_model"] + stats["tower"],
            "captured, fallbacks": str(stats["failure"] or stats["fallbacks"] or "none"),
            "answers that differ, captured from hit": sum(
                a[0] != b[0] for a, b in zip(plain, hits, strict=True)
            ),
            "captured against hit, largest difference of logits": _largest(plain, hits),
            "captured miss against captured hit": _largest(misses, hits),
        }
    except Exception as error:
        return {"captured, fallbacks": f"{type(error).__name__}: {error}"[:300]}
    finally:
        model.disable_compiled_reuse()
        model.disable_background_cache()


def render_captured(rows: Sequence[dict]) -> list[str]:
    """The rows of `captured_rows` as a Markdown table."""
    lines = [
        "| fresh | mode, batch 1 | median, ms | faster than LLaVA | language model, ms | tower's layers, ms | first calls, s | notes |",
        "|---:|---|" + "---:|" * 5 + "---|",
    ]
    for row in rows:
        stats = row.get("stats")
        note = row.get("error") or ""
        if stats:
            note += (
                f" {stats['captures']} captures, {stats['language_model'] + stats['tower']} passes, fallbacks "
                f"{stats['failure'] or stats['fallbacks'] or 'none'}, prefix copied {stats['prefix_copies']} times, "
                f"{stats['buffer_bytes'] / 2**20:.0f} MiB buffers, {stats['pool_bytes'] / 2**20:.0f} MiB of graphs"
            )
        numbers = (
            _number(row.get("median_s"), 1000),
            _number(row.get("ratio_to_llava"), 1, "x"),
            _number(row.get("language_model_ms")),
            _number(row.get("tower_layers_ms")),
            _number(row.get("warm_up_s")),
        )
        lines.append(f"| {row['fresh_share']:.0%} | {row['mode']} | {' | '.join(numbers)} | {note.strip()} |")
    return lines


def _number(value: float | None, scale: float = 1, unit: str = "") -> str:
    return "" if value is None else f"{value * scale:.2f}{unit}"


def _largest(some: Sequence[tuple], others: Sequence[tuple]) -> float:
    return max(float((a[1] - b[1]).abs().max()) for a, b in zip(some, others, strict=True))


def _switch_on(model: BackdropForConditionalGeneration) -> CapturedReuse:
    """Captured on CUDA; the same passes without graphs elsewhere."""
    return model.compile_reuse(capture=model.device.type == "cuda")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
