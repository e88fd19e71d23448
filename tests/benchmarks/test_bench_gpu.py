"""`backdrop bench gpu`: parts write what they have, a part that fails costs only itself, the report is the JSON's."""

import json

import pytest
from paths import ROOT

from backdrop.benchmarks import gpu, gpu_parity, gpu_times

COMMITTED = ROOT / "docs" / "results" / "data" / "gpu.json"


@pytest.fixture
def parts(monkeypatch):
    """Puts functions in the places of parts."""

    def put(**functions):
        for name, function in functions.items():
            monkeypatch.setitem(gpu.FUNCTIONS, name, function)

    return put


def test_a_part_that_fails_costs_only_itself(tmp_path, parts):
    def fails(run):
        raise RuntimeError("no such kernel")

    def works(run):
        run.results["graphs"] = {"tower layers": {"launched, ms": 2.0, "replayed, ms": 1.0}}
        assert json.loads((tmp_path / "gpu.json").read_text())["parity"]["error"].endswith("no such kernel")

    parts(parity=fails, graphs=works)
    found = gpu.run_gpu(tmp_path, "cpu", "tiny", ("parity", "graphs"))
    assert found["parity"]["error"] == "RuntimeError: no such kernel"
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    page = (tmp_path / "gpu.md").read_text()
    assert "Ended with: RuntimeError: no such kernel" in page and "| tower layers | 2.0 | 1.0 |" in page


def test_what_the_time_did_not_reach_is_named(tmp_path, parts):
    parts(parity=lambda run: pytest.fail("the time was up"))
    found = gpu.run_gpu(tmp_path, "cpu", "tiny", ("parity",), seconds=-1)
    assert found["parity"] == {"left out": "the time was up"}
    assert "Left out: the time was up." in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("parity", "speed")}, "part is 'speed'; wanted one of parity, "),
        ({"shape": "huge"}, "shape is 'huge'; wanted one of tiny, "),
    ],
)
def test_what_is_not_there_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        gpu.run_gpu(tmp_path, **{"device": "cpu", "shape": "tiny", **change})


@pytest.mark.slow
def test_the_tiny_shape_runs_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_times, "BATCHES", (1,))
    monkeypatch.setattr(gpu_times, "FRESH_SHARES", (0.15,))
    monkeypatch.setattr(gpu_parity, "PARITY_FRAMES", 2)
    found = gpu.run_gpu(tmp_path, "cpu", "tiny", ("parity", "ttft", "breakdown"))
    assert not any("error" in found[part] for part in ("parity", "ttft", "breakdown")), found
    single = found["parity"]["rows"][0]
    assert single["off against LLaVA, largest difference of logits"] == 0
    assert single["answers that differ, off from hit"] == single["answers that differ, miss from hit"] == 0
    assert {row["mode"] for row in found["ttft"]["rows"]} == {"llava", "cold", "tokens", "tokens+prefix"}
    stages = found["breakdown"]["tiny, host time"]["tokens+prefix"]
    assert stages["language model"] > 0 and stages["match"] > 0 and stages["detector"] == 0
    assert sum(value for name, value in stages.items() if name != "total") == pytest.approx(
        stages["total"], rel=0.5
    )


def test_the_committed_report_is_of_a_gpu():
    found = json.loads(COMMITTED.read_text())
    assert "gpu" in found["machine"] and found["shape"] == "llava-1.5-7b"
    assert not [part for part in gpu.PARTS if "error" in found.get(part, {})]
