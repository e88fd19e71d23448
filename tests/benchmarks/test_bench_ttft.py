"""The time-to-first-token benchmark: what it measures, keeps, refuses and writes. No test looks at a time."""

import json
from types import SimpleNamespace

import pytest

from backdrop.benchmarks import shapes, ttft
from backdrop.benchmarks.contenders import MODES, build_bench
from backdrop.benchmarks.report import format_seconds
from backdrop.processing.processing_backdrop import IMAGE_TOKEN

KEYS = {
    "shape",
    "device",
    "dtype",
    "batch",
    "fresh_share",
    "mode",
    "median_s",
    "p95_s",
    "ratio_to_llava",
    "flop_ideal_ratio",
    "fraction_of_ideal",
    "bytes_per_background",
    "measured_fresh_share",
    "break_even_reuses",
    "repeats",
    "machine",
    "versions",
    "command",
}
TINY = shapes.SHAPES["tiny"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, bench):
    """Four cells with every file written: (rows, folder)."""
    folder = tmp_path_factory.mktemp("ttft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ttft, "build_bench", lambda *_: bench)
        rows = ttft.run_ttft(
            ["tiny"],
            [1, 2],
            [0.125, 0.25],
            1,
            json_path=folder / "ttft.json",
            plot_path=folder / "ttft.png",
            markdown_path=folder / "ttft.md",
        )
    return rows, folder


def cell_like(rows: list[dict], batch: int, fresh_share: float) -> list[dict]:
    """What `run_cell` would return, copied from another cell."""
    added = ("machine", "versions", "command")
    copied = [{name: value for name, value in row.items() if name not in added} for row in rows[: len(MODES)]]
    return [{**row, "batch": batch, "fresh_share": fresh_share} for row in copied]


class TestRows:
    def test_every_cell_has_every_mode_and_every_key(self, run):
        rows, _ = run
        cells = [(row["batch"], row["fresh_share"], row["mode"]) for row in rows]
        assert cells == [(b, f, mode) for b in (1, 2) for f in (0.125, 0.25) for mode in MODES]
        assert all(row.keys() >= KEYS for row in rows)
        assert {"cpu", "cores", "threads", "memory_gib"} <= rows[0]["machine"].keys()
        assert {"torch", "transformers", "backdrop", "python"} <= rows[0]["versions"].keys()

    def test_fresh_share_is_what_was_asked_for(self, run):
        assert all(row["measured_fresh_share"] == row["fresh_share"] for row in run[0])

    def test_stored_bytes_are_the_tokens_and_the_prefix(self, run):
        vision = 16 * TINY.text["hidden_size"] * 4
        before = shapes.PROMPT.split(IMAGE_TOKEN)[0]
        positions = len(shapes.build_tokenizer()(before).input_ids) + 16 + 2  # patches and separators
        prefix = 2 * 2 * 2 * 8 * positions * 4  # keys and values, layers, heads, width
        wanted = {"llava": 0, "cold": 0, "tokens": vision, "tokens+prefix": vision + prefix}
        assert all(row["bytes_per_background"] == wanted[row["mode"]] for row in run[0])

    def test_ratio_ideal_and_fraction_belong_together(self, run):
        for row in run[0]:
            assert row["fraction_of_ideal"] == pytest.approx(row["ratio_to_llava"] / row["flop_ideal_ratio"])
            assert (row["cold_over_llava_plus_detector"] is not None) == (row["mode"] == "cold")
            assert len(row["seconds"]) == row["repeats"]
            if row["mode"] == "llava":
                assert row["ratio_to_llava"] == row["flop_ideal_ratio"] == 1

    def test_the_ideal_grows_with_what_is_reused(self, run):
        rows, _ = run
        for batch, share in ((1, 0.125), (1, 0.25), (2, 0.125), (2, 0.25)):
            cell = [row for row in rows if (row["batch"], row["fresh_share"]) == (batch, share)]
            ideal = {row["mode"]: row["flop_ideal_ratio"] for row in cell}
            assert ideal["cold"] < ideal["tokens"] < ideal["tokens+prefix"]

    def test_a_batch_beyond_the_cameras_and_no_change_at_all(self, bench):
        rows = ttft.run_cell(bench, batch=6, fresh_share=0.0, repeats=1)
        assert [row["measured_fresh_share"] for row in rows] == [0] * 4

    def test_bfloat16_runs(self):
        bench = build_bench("tiny", "cpu", "bfloat16")
        assert len(ttft.run_cell(bench, batch=1, fresh_share=0.25, repeats=1)) == 4


class TestFiles:
    def test_cells_in_the_file_are_not_run_again(self, run, monkeypatch):
        rows, folder = run
        calls = []

        def counted(bench, batch, fresh_share, repeats):
            calls.append((batch, fresh_share))
            return cell_like(rows, batch, fresh_share)

        monkeypatch.setattr(ttft, "run_cell", counted)
        monkeypatch.setattr(ttft, "build_bench", lambda name, *_: SimpleNamespace(shape_name=name))
        path = folder / "again.json"
        path.write_text((folder / "ttft.json").read_text())
        assert ttft.run_ttft(["tiny"], [1, 2], [0.125, 0.25], 1, json_path=path) == rows
        assert calls == []
        more = ttft.run_ttft(["tiny"], [1], [0.25, 0.5], 1, json_path=path)
        assert calls == [(1, 0.5)]
        assert more[: len(rows)] == rows and len(more) == len(rows) + 4
        assert json.loads(path.read_text()) == more
        assert not list(folder.glob("*.tmp"))

    def test_what_was_finished_is_kept_when_a_cell_fails(self, run, tmp_path, monkeypatch):
        def failing(bench, batch, fresh_share, repeats):
            if fresh_share == 0.5:
                raise RuntimeError("no hit")
            return cell_like(run[0], batch, fresh_share)

        monkeypatch.setattr(ttft, "run_cell", failing)
        monkeypatch.setattr(ttft, "build_bench", lambda name, *_: SimpleNamespace(shape_name=name))
        with pytest.raises(RuntimeError, match="no hit"):
            ttft.run_ttft(["tiny"], [1], [0.25, 0.5], 1, json_path=tmp_path / "a.json")
        assert len(json.loads((tmp_path / "a.json").read_text())) == 4

    def test_table_and_plot_come_from_the_rows_in_the_file(self, run, tmp_path):
        _, folder = run
        rows = json.loads((folder / "ttft.json").read_text())
        table = ttft.render_markdown(rows)
        assert table == (folder / "ttft.md").read_text()
        ttft.render_plot(rows, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes() == (folder / "ttft.png").read_bytes()
        lines = [line for line in table.splitlines() if line.startswith("| ") and "%" in line]
        assert len(lines) == len(rows)
        slower = [{**row, "median_s": 1234.5} for row in rows]
        assert ttft.render_markdown(slower).count("1234.50 s") == len(rows)

    @pytest.mark.parametrize("text", ["{", "{}", '[{"a": 1}]'])
    def test_a_file_that_is_something_else_is_refused(self, text, tmp_path):
        path = tmp_path / "other.json"
        path.write_text(text)
        with pytest.raises(ValueError, match="wanted a list of benchmark rows"):
            ttft.run_ttft(["tiny"], [1], [0.25], 1, json_path=path)
        assert path.read_text() == text


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"shapes": ["huge"]}, "shape is 'huge'; wanted one of tiny"),
            ({"batches": [0]}, "batch is 0; wanted 1 or more"),
            ({"fresh_shares": [0.8]}, "fresh_share is 0.8; wanted 0 to 0.7"),
            ({"repeats": 0}, "repeats is 0; wanted 1 or more"),
            ({"dtype": "int8"}, "dtype is 'int8'; wanted one of float32"),
        ],
    )
    def test_an_argument_out_of_range_is_named(self, change, message):
        arguments = {"shapes": ["tiny"], "batches": [1], "fresh_shares": [0.25], "repeats": 1, **change}
        with pytest.raises(ValueError, match=message):
            ttft.run_ttft(**arguments)


@pytest.mark.parametrize(
    ("seconds", "text"), [(1234.5, "1234.50 s"), (1, "1.00 s"), (0.1234, "123 ms"), (0.0123, "12.3 ms")]
)
def test_seconds_are_written_short(seconds, text):
    assert format_seconds(seconds) == text
