"""The benchmark of captured reuse, on the tiny shape."""

import pytest

from backdrop.benchmarks import captured, gpu_run


@pytest.fixture(scope="module")
def bench():
    return gpu_run.build_bench("tiny", "cpu", "float32")


def test_rows_of_captured_reuse(bench):
    rows = captured.captured_rows(bench, 0.15, repeats=1)
    assert [row["mode"] for row in rows] == list(captured.MODES)
    assert all(row["median_s"] > 0 and "error" not in row for row in rows)
    stats = rows[-1]["stats"]
    assert stats["language_model"] and stats["tower"] and not stats["fallbacks"]
    assert len(captured.render_captured(rows)) == 2 + len(rows)


def test_one_failure_costs_its_own_row(bench, monkeypatch):
    def fails(bench):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(captured, "captured_contender", fails)
    *others, row = captured.captured_rows(bench, 0.15, repeats=1)
    assert "illegal memory access" in row["error"] and all(other["median_s"] > 0 for other in others)
    assert "illegal memory access" in captured.render_captured([row])[-1]
