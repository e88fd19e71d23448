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

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .gpu_memory import memory
from .gpu_parity import parity
from .gpu_run import GpuRun, free
from .gpu_times import compiled, graphs, host_breakdown, time_to_first_token, torch_compiled
from .report import machine, versions
from .shapes import SHAPES

FUNCTIONS: dict[str, Callable[[GpuRun], None]] = {
    "parity": parity,
    "ttft": time_to_first_token,
    "breakdown": host_breakdown,
    "graphs": graphs,
    "memory": memory,
    "compiled": compiled,
    "torch.compile": torch_compiled,
}
PARTS = ("parity", "ttft", "breakdown", "graphs", "compiled", "memory", "torch.compile")


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
        shape: a name in `SHAPES`, for the parts that time something.
        seconds: no part or cell starts after so long; what was left out is named in the report.

    Returns:
        What was written to `gpu.json`.

    Raises:
        ValueError: a part, shape or device that is not there.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part is {part!r}; wanted one of {', '.join(PARTS)}.")
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; wanted one of {', '.join(SHAPES)}.")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but torch finds no CUDA device; wanted 'cpu'.")
    out = Path(out)
    run = GpuRun(device, shape, out, time.monotonic() + seconds)
    run.results = {"machine": machine(device), "versions": versions(), "device": device, "shape": shape}
    run.results["detector"] = _detector_note()
    for part in parts:
        if run.seconds_left < 0:
            run.results[part] = {"left out": "the time was up"}
            run.write()
            continue
        started = time.monotonic()
        print(f"{part} ({run.seconds_left:.0f} s left)", file=sys.stderr, flush=True)
        try:
            FUNCTIONS[part](run)
        except Exception as error:  # one part that fails must not cost the others their turn
            run.results.setdefault(part, {})["error"] = f"{type(error).__name__}: {error}"[:600]
        if isinstance(run.results.get(part), dict):
            run.results[part]["seconds"] = round(time.monotonic() - started, 1)
        run.write()
        free()
    return run.results


def _detector_note() -> str:
    version = versions()["ultralytics"]
    if version == "not installed":
        return "left out: ultralytics is not installed"
    return f"YOLOv8n (random weights), ultralytics {version}"
