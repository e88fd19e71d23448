"""Proof that an exported folder loads where nothing of ours is installed."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SCRIPT = Path(__file__).with_name("clean_load.py")
# Settings by which this process's caches or options could reach the clean one.
FOREIGN_SETTINGS = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTHON")
# A model of many gigabytes is read from a slow disk within this; a process that hangs is ended.
TIMEOUT_S = 3600


def verify_in_clean_process(folder: str | Path) -> None:
    """Loads `folder` through the Auto classes and runs one forward pass, in a process that knows nothing of us.

    The process runs elsewhere, offline, with empty caches, without PYTHONPATH, and cannot import `backdrop`.

    Raises:
        ValueError: it did not load or run; the message ends in the one line that says why.
    """
    (reason,) = load_failures([folder])
    if reason is not None:
        raise ValueError(f"{Path(folder).resolve()} does not load in a clean process: {reason}")


def load_failures(folders: Sequence[str | Path]) -> list[str | None]:
    """Why each of `folders` does not load in the clean process, None where it does. See `verify_in_clean_process`.

    One process loads them one after the other, so that what it imports is imported once.

    Raises:
        ValueError: one is no exported folder, or the process did not end within `TIMEOUT_S`.
    """
    resolved = [Path(folder).resolve() for folder in folders]
    for folder in resolved:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no config.json; wanted an exported folder.")
    with tempfile.TemporaryDirectory(prefix="backdrop-verify-") as home:
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(SCRIPT), *map(str, resolved)],
                cwd=home,
                env=clean_environment(home),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{', '.join(map(str, resolved))} did not load in a clean process within {TIMEOUT_S} s; it was ended."
            ) from None
    return _reasons(done, len(resolved))


def clean_environment(home: str | Path) -> dict[str, str]:
    """This process's environment without Python's and Hugging Face's settings, offline, with caches under `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_SETTINGS)}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(Path(home, "huggingface")),
        "HF_MODULES_CACHE": str(Path(home, "modules")),
    }


def _reasons(done: subprocess.CompletedProcess, folders: int) -> list[str | None]:
    """Why each folder failed, None if it did not. The reports are the last lines that the process printed."""
    try:
        reports = [json.loads(line) for line in done.stdout.splitlines()[-folders:]]
        reasons = [report.get("error") for report in reports]
    except (ValueError, AttributeError):
        reasons = []
    if len(reasons) == folders:
        return reasons
    told = [line for line in done.stderr.splitlines() if line.strip()]
    return [f"the process ended with {done.returncode}: {told[-1] if told else 'no message'}"] * folders
