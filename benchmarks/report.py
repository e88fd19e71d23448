"""What every benchmark's report needs: the machine, the versions, files that are whole or not there, plots."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import psutil
import torch

from backdrop.data.atomic import write_atomically


def machine(device: str) -> dict:
    """Name of the processor and the GPU, cores, threads, memory in GiB."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = found[0].split(":", 1)[1].strip() if found else cpu
    result = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(torch.device(device))
        result |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1)}
    return result


def versions() -> dict:
    """Of what was run; Backdrop's is git's description where it runs from a checkout."""
    folder = Path(__file__).resolve().parent.parent
    backdrop = _version("backdrop-vlm")
    if (folder / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
        described = subprocess.run(command, capture_output=True, text=True)
        backdrop = described.stdout.strip() or backdrop
    packages = {name: _version(name) for name in ("torch", "transformers", "ultralytics")}
    return {**packages, "backdrop": backdrop, "python": platform.python_version()}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, a machine without the detector
        return "not installed"


def write_json_atomically(path: Path, value: object) -> None:
    """Writes JSON in one step."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def pyplot() -> ModuleType:
    """matplotlib's pyplot, drawing to files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError(
            "A plot needs matplotlib, which is not installed: `pip install matplotlib`, or leave the plot out."
        ) from error
    return plt


def format_seconds(seconds: float) -> str:
    """`1.23 s`, `123 ms` or `12.3 ms`."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"
