"""What the tests of the benchmarks share."""

import pytest

from backdrop.benchmarks.contenders import build_bench


@pytest.fixture(scope="session")
def bench():
    """All four modes at the smallest shape. Tests may fill and clear its caches: whatever they need they store themselves."""
    return build_bench("tiny", "cpu", "float32")
