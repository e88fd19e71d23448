"""Packages that a test needs and an installation may lack."""

import importlib.util
from pathlib import Path

import pytest


def require_ultralytics() -> Path:
    """The folder of ultralytics, which is not imported: that would replace `Image.open` for every test of this process."""
    found = importlib.util.find_spec("ultralytics")
    if found is None or found.origin is None:
        pytest.skip("ultralytics is not installed")
    return Path(found.origin).parent
