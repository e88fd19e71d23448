"""Proof that an exported folder loads where nothing of ours is installed."""

import json
import os
import subprocess
import sys
import tempfile
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
    folder = Path(folder).resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json; wanted an exported folder.")
    with tempfile.TemporaryDirectory(prefix="backdrop-verify-") as home:
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(SCRIPT), str(folder)],
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
                f"{folder} did not load in a clean process within {TIMEOUT_S} s; it was ended."
            ) from None
    reason = _reason(done)
    if reason is not None:
        raise ValueError(f"{folder} does not load in a clean process: {reason}")


def clean_environment(home: str | Path) -> dict[str, str]:
    """This process's environment without Python's and Hugging Face's settings, offline, with caches under `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_SETTINGS)}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(Path(home, "huggingface")),
        "HF_MODULES_CACHE": str(Path(home, "modules")),
    }


def _reason(done: subprocess.CompletedProcess) -> str | None:
    """Why the clean process failed, None if it did not. The report is the last line that it printed."""
    lines = done.stdout.splitlines()
    try:
        return json.loads(lines[-1]).get("error")
    except (IndexError, ValueError, AttributeError):
        told = [line for line in done.stderr.splitlines() if line.strip()]
        return f"the process ended with {done.returncode}: {told[-1] if told else 'without a word'}"
