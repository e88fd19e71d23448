"""Everything that only a GPU can tell, in one command of at most eight minutes: `backdrop bench gpu --out DIR`.

Parts, each written to `DIR/gpu.json` as soon as it is there, so that a run that is cut short leaves what it has:

- `parity`: Backdrop against LLaVA, cached against uncached, groups against a block-diagonal mask, batch against single,
  in float32 and bfloat16, with each attention that the machine has; two forms of `device_map`.
- `ttft`: time to first token at the shape of LLaVA-1.5-7B in bfloat16, batch 1 and 16, 5 and 15% fresh patches.
- `breakdown`: what surrounds the layers, on the shape `host-7b`, and where the time goes on `llava-1.5-7b`.
- `graphs`: what the layers of a reused answer take when a captured CUDA graph launches them, against Python: how much of the
  time is launching.
- `memory`: the peak of a LoRA step and of a full step, measured by the allocator, beside the estimate of `train/memory`.
- `compiled`: reused answers with `model.compile_reuse`, 5 and 15% fresh, beside LLaVA and the plain reuse path.
- `torch.compile`: both models' layers through `torch.compile`, 15% fresh; its compilation takes minutes.

All weights are random and nothing is downloaded. Without ultralytics the detector is left out of what is timed, and the
report says so. `--device cpu --shape tiny` runs every part in a few minutes (most of them `torch.compile`), to try the command itself.
"""

import contextlib
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache
from transformers.utils import is_flash_attn_2_available

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.grouped_vision_backdrop import encode_groups
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import SEPARATOR_TOKENS

from . import ttft
from .breakdown import breakdown
from .breakdown import render as render_breakdown
from .captured import captured_parity, captured_rows, render_captured
from .report import machine, versions, write_atomically, write_json_atomically

PARTS = ("parity", "ttft", "breakdown", "graphs", "compiled", "memory", "torch.compile")
BATCHES, FRESH_SHARES = (1, 16), (0.05, 0.15)
PARITY_FRAMES = 8
NEW_TOKENS = 12


@dataclass
class GpuRun:
    """What one run knows: where it runs, what it has found, and when it has to end."""

    device: str
    shape: str
    out: Path
    deadline: float
    results: dict = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def dtype(self) -> str:
        return "bfloat16" if torch.device(self.device).type == "cuda" else "float32"

    def write(self) -> None:
        write_json_atomically(self.out / "gpu.json", self.results)
        write_atomically(self.out / "gpu.md", render_markdown(self.results))


def run_gpu(
    out: Path,
    device: str = "cuda",
    shape: str = "llava-1.5-7b",
    parts: Sequence[str] = PARTS,
    seconds: float = 460,
) -> dict:
    """Runs the parts in order and writes `gpu.json` and `gpu.md` after each.

    Args:
        device: "cuda", "cuda:1" or "cpu".
        shape: a name in `ttft.SHAPES`, for the parts that time something.
        seconds: no part or cell starts after so long; what was left out is named in the report.

    Returns:
        What was written to `gpu.json`.

    Raises:
        ValueError: a part, shape or device that is not there.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part is {part!r}; wanted one of {', '.join(PARTS)}.")
    if shape not in ttft.SHAPES:
        raise ValueError(f"shape is {shape!r}; wanted one of {', '.join(ttft.SHAPES)}.")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no CUDA device; wanted 'cpu'.")
    out = Path(out)
    run = GpuRun(device, shape, out, time.monotonic() + seconds)
    run.results = {"machine": machine(device), "versions": versions(), "device": device, "shape": shape}
    run.results["detector"] = _detector_note()
    functions = {
        "parity": parity,
        "ttft": time_to_first_token,
        "breakdown": host_breakdown,
        "graphs": graphs,
        "memory": memory,
        "compiled": compiled,
        "torch.compile": torch_compiled,
    }
    for part in parts:
        if run.seconds_left < 0:
            run.results[part] = {"left out": "the time was up"}
            continue
        started = time.monotonic()
        print(f"{part} ({run.seconds_left:.0f} s left)", file=sys.stderr, flush=True)
        try:
            functions[part](run)
        except Exception as error:  # one part that fails must not cost the others their turn
            run.results.setdefault(part, {})["error"] = f"{type(error).__name__}: {error}"[:600]
        if isinstance(run.results.get(part), dict):
            run.results[part]["seconds"] = round(time.monotonic() - started, 1)
        run.write()
        _free()
    return run.results


def _detector_note() -> str:
    try:
        import ultralytics
    except ImportError:
        return "left out: ultralytics is not installed"
    return f"YOLOv8n (random weights), ultralytics {ultralytics.__version__}"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class NoDetector:
    """Stands in for a detector where ultralytics is not installed: planted boxes, no network."""

    names = {0: "object"}

    def detect(self, images: Sequence[np.ndarray], **options) -> list:
        """Nothing is looked at; `ttft.PlantedDetector` puts the planted boxes in place."""
        return [None] * len(images)


def build_bench(shape: str, device: str, dtype: str) -> ttft.Bench:
    """As `ttft.build_bench`, on machines without ultralytics too."""
    try:
        detector = ttft.build_detector(device)
    except ImportError:
        detector = ttft.PlantedDetector(NoDetector())
    return ttft.build_bench(shape, device, dtype, detector)


# ---- parity


def attentions(device: str) -> list[str]:
    """What can be asked for here: SDPA with each of its CUDA kernels, and flash attention where it is installed."""
    if torch.device(device).type != "cuda":
        return ["sdpa"]
    return ["sdpa", "sdpa: flash kernel", *(["flash_attention_2"] if is_flash_attn_2_available() else [])]


@contextlib.contextmanager
def _attention(name: str, dtype: str) -> Iterator[str]:
    """The implementation's name for transformers; inside, SDPA is held to one kernel where the name says so."""
    implementation, _, kernel = name.partition(": ")
    if not kernel:
        yield implementation
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        yield implementation


def parity(run: GpuRun) -> None:
    """Every shortcut against the slow path; a row for each dtype, attention and shape."""
    shapes = ["tiny"] if run.shape == "tiny" else ["tiny", "clip-l+135m"]
    rows = run.results.setdefault("parity", {}).setdefault("rows", [])
    for shape in shapes:
        for dtype in ("float32", "bfloat16"):
            for attention in attentions(run.device):
                if attention != "sdpa" and dtype == "float32":
                    continue  # flash kernels take half precision only
                cell = {"shape": shape, "dtype": dtype, "attention": attention}
                try:
                    cell |= _parity_cell(shape, run.device, dtype, attention)
                except Exception as error:
                    cell["error"] = f"{type(error).__name__}: {error}"[:300]
                rows.append(cell)
                run.write()
                _free()
    run.results["parity"]["device_map"] = _device_map_rows(run.device)


@torch.no_grad()
def _parity_cell(shape_name: str, device: str, dtype: str, attention: str) -> dict:
    shape = ttft.SHAPES[shape_name]
    torch.manual_seed(0)
    llava = ttft.build_llava(shape, device, ttft.DTYPES[dtype])
    with _attention(attention, dtype) as implementation:
        llava.set_attn_implementation(implementation)
        return {
            "off against LLaVA, largest difference of logits": _off_difference(llava, shape, device),
            "groups against a block-diagonal mask": _grouping_difference(llava, shape, device)
            if implementation == "sdpa"
            else None,
            **_cache_parity(llava, shape, device),
        }


def _frames(shape: ttft.Shape, count: int) -> list[ttft.Frame]:
    background = ttft.background_image(*shape.source, seed=0)
    rng = np.random.default_rng(0)
    return [ttft.draw_frame(background, shape, 0.05 + 0.3 * i / count, rng) for i in range(count)]


def _sharing_plain(llava) -> BackdropForConditionalGeneration:
    model = ttft.sharing_backdrop(llava)
    model.config.separator_token_ids = None
    return model


def _off_difference(llava, shape: ttft.Shape, device: str) -> float:
    """Unsplit and without separators, Backdrop is LLaVA: the largest difference of logits on the same inputs."""
    model = _sharing_plain(llava)
    processor = ttft.llava_processor(shape)
    image = _frames(shape, 1)[0].image
    inputs = processor(images=[image], text=[ttft.PROMPT], return_tensors="pt").to(device, llava.dtype)
    return _difference(llava(**inputs).logits, model(**inputs).logits)


def _grouping_difference(llava, shape: ttft.Shape, device: str) -> float:
    """Two groups encoded apart, against the whole tower under a block-diagonal mask; relative to the features' size."""
    tower = llava.model.vision_tower
    patches, side = shape.grid**2, shape.vision["image_size"]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, side, side, generator=generator).to(device, llava.dtype).expand(2, -1, -1, -1)
    owner = torch.rand(patches, generator=generator) < 0.3
    mask = torch.stack([~owner, owner]).to(device)
    found = torch.cat(encode_groups(tower, pixels, mask))
    layers = tower.encoder.layers[: len(tower.encoder.layers) - 1]
    wanted = []
    for group in mask:
        hidden = tower.pre_layrnorm(tower.embeddings(pixels[:1]))
        keep = torch.nn.functional.pad(group, (1, 0), value=True)
        same = keep[:, None] == keep[None, :]
        for layer in layers:
            hidden = layer(hidden, same[None, None])
        wanted.append(hidden[0][keep][1:])
    wanted = torch.cat(wanted)
    return _difference(found, wanted) / float(wanted.float().abs().max())


def _cache_parity(llava, shape: ttft.Shape, device: str) -> dict:
    """Cache off, miss and hit on the processor's same output; a batch against its rows alone."""
    detector = ttft.PlantedDetector(NoDetector())
    processor = ttft.backdrop_processor(shape, detector)
    model = ttft.sharing_backdrop(llava)
    processor.enable_background_matching(
        tolerance=ttft.TOLERANCE, min_reuse=ttft.MIN_REUSE, max_overridden=1 - ttft.MIN_REUSE
    )
    frames = _frames(shape, PARITY_FRAMES)
    answers: dict[str, list] = {"off": [], "miss": [], "hit": []}
    first: dict[str, list] = {"off": [], "miss": [], "hit": []}
    prepared = []
    for frame in frames:
        detector.plant([frame])
        inputs = processor(images=[frame.image], text=[ttft.PROMPT], return_tensors="pt").to(
            device, llava.dtype
        )
        prepared.append(inputs)
        for state in ("off", "miss", "hit"):
            if state == "off":
                model.disable_background_cache()
            elif state == "miss":
                model.enable_background_cache(max_bytes=ttft.CACHE_BYTES)
            out = model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            answers[state].append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
            first[state].append(out.logits[0][0].float())
    hits = model.background_cache.stats()["prefix_hits"]
    model.disable_background_cache()
    detector.plant(frames[:4])
    batch = processor(
        images=[frame.image for frame in frames[:4]],
        text=[ttft.PROMPT] * 4,
        padding=True,
        return_tensors="pt",
    ).to(device, llava.dtype)
    together = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
    together = together[:, batch["input_ids"].shape[1] :].tolist()
    captured = captured_parity(model, prepared)
    return {
        "answers": len(frames),
        "prefix hits of the last answer": hits,
        "answers that differ, miss from hit": sum(
            a != b for a, b in zip(answers["miss"], answers["hit"], strict=True)
        ),
        "answers that differ, off from hit": sum(
            a != b for a, b in zip(answers["off"], answers["hit"], strict=True)
        ),
        "answers that differ, batch from single": sum(
            a != b for a, b in zip(together, answers["off"][:4], strict=True)
        ),
        "miss against hit, largest difference of logits": max(
            _difference(a, b) for a, b in zip(first["miss"], first["hit"], strict=True)
        ),
        "off against hit, largest difference of logits": max(
            _difference(a, b) for a, b in zip(first["off"], first["hit"], strict=True)
        ),
        **captured,
    }


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


@torch.no_grad()
def _device_map_rows(device: str) -> list[dict]:
    """A folder loaded onto the device whole, and with its tower on the CPU: logits against the CPU's."""
    shape = ttft.SHAPES["tiny"]
    model = ttft.sharing_backdrop(ttft.build_llava(shape, "cpu", torch.float32))
    detector = ttft.PlantedDetector(NoDetector())
    processor = ttft.backdrop_processor(shape, detector)
    frame = _frames(shape, 1)[0]
    detector.plant([frame])
    inputs = processor(images=[frame.image], text=[ttft.PROMPT], return_tensors="pt")
    wanted = model(**inputs).logits
    maps = {
        "whole": {"": device},
        "tower on the CPU": {
            "model.vision_tower": "cpu",
            "model.multi_modal_projector": device,
            "model.language_model": device,
            "lm_head": device,
        },
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, device_map in maps.items():
            row: dict = {"device_map": name}
            try:
                loaded = BackdropForConditionalGeneration.from_pretrained(folder, device_map=device_map)
                row["largest difference of logits"] = _difference(
                    loaded(**inputs.to(device)).logits.cpu(), wanted
                )
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
    return rows


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
                rows += ttft.run_cell(bench, batch, fresh_share, repeats=7 if batch == 1 else 3)
            except torch.OutOfMemoryError as error:
                notes.append(f"batch {batch}, {fresh_share:.0%} fresh: {str(error)[:120]}")
                _free()
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
        _free()


def mode_breakdowns(bench: ttft.Bench, wait: bool, fresh_share: float = 0.15) -> dict[str, dict[str, float]]:
    """Milliseconds of each stage for LLaVA, cold and reused, batch 1, a new frame each time."""
    shape = ttft.SHAPES[bench.shape_name]
    background = ttft.background_image(*shape.source, seed=0)
    rows = {}
    for mode in ("llava", "cold", "tokens+prefix"):
        contender = bench.contenders[mode]
        if mode == "tokens+prefix":
            contender.store([ttft.Frame(background, np.zeros(shape.grid**2, dtype=bool), None)])
        rng = np.random.default_rng(1)

        def call(contender=contender, rng=rng) -> float:
            return contender.first_token([ttft.draw_frame(background, shape, fresh_share, rng)])[0]

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
    shape = ttft.SHAPES[run.shape]
    llava = ttft.build_llava(shape, run.device, ttft.DTYPES[run.dtype])
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
            row["largest difference"] = _difference(found, wanted)
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
    shape = ttft.SHAPES[run.shape]
    background = ttft.background_image(*shape.source, seed=0)
    empty = ttft.Frame(background, np.zeros(shape.grid**2, dtype=bool), None)
    bench.contenders["tokens+prefix"].store([empty])
    seconds: dict[str, list[float]] = {"llava": [], "tokens+prefix": []}
    repeats = 9
    for repeat in range(repeats + 2):
        frame = ttft.draw_frame(background, shape, 0.15, np.random.default_rng(repeat))
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


# ---- memory


@dataclass(frozen=True)
class StepCase:
    """One training step: what trains, and how long its rows are."""

    name: str
    trains: str
    rows: int
    length: int
    checkpointing: bool = True


def step_config(shape: str) -> BackdropConfig:
    """The configuration of `ttft.sharing_backdrop`, without building LLaVA."""
    llava = ttft.SHAPES[shape].llava_config()
    tokenizer = ttft.build_tokenizer()
    return BackdropConfig(
        vision_config=llava.vision_config,
        text_config=llava.text_config,
        image_token_id=llava.image_token_id,
        separator_token_ids=tokenizer.convert_tokens_to_ids(list(SEPARATOR_TOKENS)),
        tie_word_embeddings=llava.tie_word_embeddings,
        trained_on_groups=True,
    )


def memory(run: GpuRun) -> None:
    """Peaks of real steps of `SFTTrainer` beside the estimate, for the device that this is."""
    from backdrop.train.memory import measured_step  # peft, trl and datasets only where this part runs

    small = run.shape == "tiny"
    shape = "tiny" if small else "clip-l+135m"
    cases = [
        StepCase("LoRA", "LoRA", 4, 60 if small else 1024),
        StepCase("full", "full", 4, 60 if small else 1024),
        StepCase("full, no checkpointing", "full", 4, 60 if small else 1024, checkpointing=False),
    ]
    rows = run.results.setdefault("memory", {}).setdefault("rows", [])
    for case in cases:
        rows.append(measured_step(step_config(shape), case, run.device, shape))
        run.write()
        _free()


# ---- report


def render_markdown(results: dict) -> str:
    """The report as a page. A pure function of `gpu.json`."""
    hardware = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    software = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    lines = ["# On a GPU", "", f"{hardware}; {software}; detector: {results['detector']}.", ""]
    parts: dict[str, Callable[[dict], list[str]]] = {
        "parity": _parity_lines,
        "ttft": _ttft_lines,
        "breakdown": _breakdown_lines,
        "graphs": _graph_lines,
        "memory": _memory_lines,
        "compiled": lambda found: render_captured(found.get("rows", [])),
        "torch.compile": _compiled_lines,
    }
    titles = {
        "parity": "Parity",
        "ttft": "Time to first token",
        "breakdown": "Where the time goes",
        "graphs": "Layers from a captured graph",
        "memory": "Memory of a training step",
        "compiled": "Reused answers from captured graphs",
        "torch.compile": "torch.compile",
    }
    for part, render in parts.items():
        found = results.get(part)
        if not found:
            continue
        lines += [f"## {titles[part]}", ""]
        if "error" in found:
            lines += [f"Ended with: {found['error']}", ""]
        if isinstance(found.get("left out"), str):
            lines += [f"Left out: {found['left out']}.", ""]
            continue
        lines += [*render(found), ""]
    return "\n".join(lines)


def _parity_lines(found: dict) -> list[str]:
    rows = found.get("rows", [])
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name != "error"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)] if rows else []
    for row in rows:
        if "error" in row:
            lines.append(
                f"| {row['shape']} | {row['dtype']} | {row['attention']} | {row['error']} |"
                + " |" * (len(names) - 4)
            )
        else:
            lines.append("| " + " | ".join(_cell(row.get(name)) for name in names) + " |")
    maps = [
        f"- `device_map`, {row['device_map']}: "
        + (row.get("error") or f"largest difference of logits {row['largest difference of logits']:.1e}")
        for row in found.get("device_map", [])
    ]
    return [*lines, "", *maps]


def _cell(value) -> str:
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.1e}"
    return "" if value is None else str(value)


def _ttft_lines(found: dict) -> list[str]:
    lines = [
        "| batch | fresh | mode | median, ms | p95, ms | faster than LLaVA | FLOP ideal | MiB a background |",
        "|" + "---:|" * 8,
    ]
    for row in found.get("rows", []):
        lines.append(
            f"| {row['batch']} | {row['measured_fresh_share']:.0%} | {row['mode']} | {1000 * row['median_s']:.1f} | "
            f"{1000 * row['p95_s']:.1f} | {row['ratio_to_llava']:.2f}x | {row['flop_ideal_ratio']:.1f}x | "
            f"{row['bytes_per_background'] / 2**20:.0f} |"
        )
    return [*lines, *(f"- left out: {note}" for note in found.get("left out", []))]


def _breakdown_lines(found: dict) -> list[str]:
    lines: list[str] = []
    for title, rows in found.items():
        if isinstance(rows, dict) and rows:
            lines += [f"{title}:", "", render_breakdown(rows), ""]
    return lines


def _graph_lines(found: dict) -> list[str]:
    lines = ["| batch 1, 15% fresh | launched, ms | replayed, ms |", "|---|---:|---:|"]
    for name, row in found.items():
        if isinstance(row, dict):
            replayed = row.get("error") or f"{row['replayed, ms']:.1f}"
            lines.append(f"| {name} | {row['launched, ms']:.1f} | {replayed} |")
    return lines


def _compiled_lines(found: dict) -> list[str]:
    if "median, ms" not in found:
        return []
    times = ", ".join(f"{mode} {value:.1f} ms" for mode, value in found["median, ms"].items())
    return [
        f"{found['how']}; batch 1, 15% fresh: {times}: {found['ratio']:.2f}x. Warm-up {found['warm-up, s']} s."
    ]


def _memory_lines(found: dict) -> list[str]:
    lines = [
        "| step | shape | measured, GiB | estimated, GiB | estimate / measured |",
        "|---|---|---:|---:|---:|",
    ]
    for row in found.get("rows", []):
        lines.append(
            f"| {row['case']} | {row['shape']} | {row['measured'] / 2**30:.2f} | {row['estimated'] / 2**30:.2f} | "
            f"{row['estimated'] / row['measured']:.2f} |"
        )
    return lines
