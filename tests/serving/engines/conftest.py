"""Engines and gateway, started once; everything here needs vLLM in an environment of its own (`make serve-setup`)."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from running import MODEL, ROOT, start_stack

from backdrop.serving.engine_settings import find_engine_python


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.serve)


@pytest.fixture(scope="session")
def engine_python() -> str:
    """The Python with vLLM."""
    given = os.environ.get("BACKDROP_ENGINE_PYTHON", str(ROOT / ".venv-serve" / "bin" / "python"))
    try:
        return find_engine_python(given)
    except ValueError as error:
        pytest.skip(f"{error} (make serve-setup)")


@pytest.fixture(scope="session")
def stack(tmp_path_factory, engine_python):
    """Two engines and a gateway with two tenants."""
    found = start_stack(tmp_path_factory.mktemp("stack"), engine_python)
    yield found
    found.process.send_signal(signal.SIGTERM)
    try:
        found.process.wait(60)
    except subprocess.TimeoutExpired:
        found.process.kill()
        raise


@pytest.fixture(scope="session")
def local():
    """Model and processor in transformers, fp32: what the served one is compared with."""
    from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
    from backdrop.processing.processing_backdrop import BackdropProcessor

    model = BackdropForConditionalGeneration.from_pretrained(MODEL).eval()
    return model, BackdropProcessor.from_pretrained(MODEL)
