"""The time-to-first-token benchmark: what it counts, draws, checks and writes. No test looks at a time."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backdrop.benchmarks import ttft
from backdrop.processing.patch_groups_backdrop import patch_staleness

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
TINY = ttft.SHAPES["tiny"]


@pytest.fixture(scope="module")
def bench():
    return ttft.build_bench("tiny", "cpu", "float32")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four cells with every file written: (rows, folder)."""
    folder = tmp_path_factory.mktemp("ttft")
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


class TestRows:
    def test_every_cell_has_every_mode_and_every_key(self, run):
        rows, _ = run
        cells = [(row["batch"], row["fresh_share"], row["mode"]) for row in rows]
        assert cells == [(b, f, mode) for b in (1, 2) for f in (0.125, 0.25) for mode in ttft.MODES]
        assert all(row.keys() >= KEYS for row in rows)
        assert {"cpu", "cores", "threads", "memory_gib"} <= rows[0]["machine"].keys()
        assert {"torch", "transformers", "backdrop", "python"} <= rows[0]["versions"].keys()

    def test_fresh_share_is_what_was_asked_for(self, run):
        assert all(row["measured_fresh_share"] == row["fresh_share"] for row in run[0])

    def test_stored_bytes_are_the_tokens_and_the_prefix(self, run):
        vision = 16 * TINY.text["hidden_size"] * 4
        before = ttft.PROMPT.split(ttft.IMAGE_TOKEN)[0]
        columns = len(ttft.build_tokenizer()(before).input_ids) + 16 + 2  # patches and separators
        prefix = 2 * 2 * 2 * 8 * columns * 4  # keys and values, layers, heads, width
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
        bench = ttft.build_bench("tiny", "cpu", "bfloat16")
        assert len(ttft.run_cell(bench, batch=1, fresh_share=0.25, repeats=1)) == 4


class TestFiles:
    def test_cells_in_the_file_are_not_run_again(self, run, monkeypatch):
        rows, folder = run
        calls = []
        run_cell = ttft.run_cell

        def counted(bench, batch, fresh_share, repeats):
            calls.append((batch, fresh_share))
            return run_cell(bench, batch, fresh_share, repeats)

        monkeypatch.setattr(ttft, "run_cell", counted)
        path = folder / "again.json"
        path.write_text((folder / "ttft.json").read_text())
        assert ttft.run_ttft(["tiny"], [1, 2], [0.125, 0.25], 1, json_path=path) == rows
        assert calls == []
        more = ttft.run_ttft(["tiny"], [1], [0.25, 0.5], 1, json_path=path)
        assert calls == [(1, 0.5)]
        assert more[: len(rows)] == rows and len(more) == len(rows) + 4
        assert json.loads(path.read_text()) == more
        assert not list(folder.glob("*.tmp"))

    def test_what_was_finished_is_kept_when_a_cell_fails(self, tmp_path, monkeypatch):
        run_cell = ttft.run_cell

        def failing(bench, batch, fresh_share, repeats):
            if fresh_share == 0.5:
                raise RuntimeError("no hit")
            return run_cell(bench, batch, fresh_share, repeats)

        monkeypatch.setattr(ttft, "run_cell", failing)
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


class TestModels:
    def test_all_modes_have_the_same_storage(self, bench):
        llava = bench.contenders["llava"].model
        wanted = {tensor.data_ptr() for tensor in (*llava.parameters(), *llava.buffers())}
        for mode in ttft.MODES[1:]:
            model = bench.contenders[mode].model
            assert {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())} == wanted
            assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in llava.parameters())

    def test_a_hook_on_llava_is_not_backdrops(self, bench):
        llava, model = bench.contenders["llava"].model, bench.contenders["cold"].model
        assert not set(map(id, llava.modules())) & set(map(id, model.modules()))

    def test_tied_embeddings_stay_tied(self):
        text = {**TINY.text, "tie_word_embeddings": True}
        shape = ttft.Shape(TINY.vision, text, TINY.source)
        model = ttft.sharing_backdrop(ttft.build_llava(shape, "cpu", torch.float32))
        assert model.lm_head.weight is model.get_input_embeddings().weight

    @torch.no_grad()
    def test_unsplit_the_logits_are_llavas(self, bench):
        llava, backdrop = bench.contenders["llava"], bench.contenders["cold"]
        frame = ttft.background_image(*TINY.source, seed=3)
        inputs = llava.processor(images=[frame], text=[ttft.PROMPT], return_tensors="pt")
        theirs = llava.model(**inputs).logits
        ours = backdrop.model(**inputs).logits
        assert torch.equal(theirs, ours)
        assert theirs.std() > 0

    def test_the_prompt_has_as_many_tokens_as_a_real_tokenizer_gives(self):
        tokenizer = ttft.build_tokenizer()
        assert 45 <= len(tokenizer(ttft.PROMPT).input_ids) <= 75
        assert all(len(tokenizer) <= shape.text["vocab_size"] for shape in ttft.SHAPES.values())

    def test_memory_that_is_too_small_is_refused(self, monkeypatch):
        free = SimpleNamespace(available=8 * 2**30)
        monkeypatch.setattr(ttft, "psutil", SimpleNamespace(virtual_memory=lambda: free))
        with pytest.raises(
            ValueError, match=r"llava-1.5-7b in bfloat16 .* needs about 1\d.* 8.0 GiB are free"
        ):
            ttft._check_memory("llava-1.5-7b", "cpu", torch.bfloat16, 1)


class TestHits:
    def test_an_unknown_background_is_an_error(self, bench):
        contender = bench.contenders["tokens"]
        rng = np.random.default_rng(0)
        known, other = (ttft.background_image(*TINY.source, seed=seed) for seed in (5, 6))
        empty = ttft.Frame(known, np.zeros(16, dtype=bool), None)
        contender.store([empty])
        frames = [ttft.draw_frame(known, TINY, 0.25, rng)]
        _, inputs = ttft._hit_seconds(contender, frames, 1)
        assert inputs["group_kind"].tolist() == [0, 1]
        with pytest.raises(RuntimeError, match="Mode tokens, batch 1: 0 tokens hits"):
            ttft._hit_seconds(contender, [ttft.draw_frame(other, TINY, 0.25, rng)], 1)

    def test_a_prefix_that_was_forgotten_is_an_error(self, bench):
        contender = bench.contenders["tokens+prefix"]
        background = ttft.background_image(*TINY.source, seed=5)
        contender.store([ttft.Frame(background, np.zeros(16, dtype=bool), None)])
        contender.model.background_cache.clear()
        frames = [ttft.draw_frame(background, TINY, 0.25, np.random.default_rng(0))]
        with pytest.raises(RuntimeError, match="0 prefix hits and 1 misses"):
            ttft._hit_seconds(contender, frames, 1)

    def test_a_cold_call_runs_the_detector_and_splits_at_the_planted_box(self, bench, monkeypatch):
        contender = bench.contenders["cold"]
        seen = []
        detect = contender.detector._detector.detect
        monkeypatch.setattr(
            contender.detector._detector,
            "detect",
            lambda images, **k: seen.append(len(images)) or detect(images, **k),
        )
        background = ttft.background_image(*TINY.source, seed=5)
        frames = [ttft.draw_frame(background, TINY, 0.0625, np.random.default_rng(seed)) for seed in range(2)]
        _, inputs = contender.first_token(frames)
        assert seen == [2]
        for frame, owned in zip(frames, inputs["patch_mask"][inputs["group_kind"] == 1].numpy(), strict=True):
            assert (owned & frame.changed).any() and owned.sum() <= 9  # margin 1 around one patch


class TestFrames:
    @pytest.mark.parametrize("share", [0.02, 0.15, 0.4, 0.7])
    def test_exactly_the_drawn_patches_go_stale_at_full_size(self, share):
        shape = ttft.SHAPES["clip-l+135m"]
        processor = ttft.backdrop_processor(shape, detector=None).image_processor
        background = ttft.background_image(*shape.source, seed=1)
        reference = processor.model_images([background])[0]
        for seed in range(3):
            frame = ttft.draw_frame(background, shape, share, np.random.default_rng(seed))
            image = processor.model_images([frame.image])[0]
            stale = patch_staleness(reference, image, 14)
            assert ((stale > ttft.TOLERANCE) == frame.changed).all()
            assert (stale[~frame.changed] == 0).all()
            assert frame.changed.sum() == round(share * 576)

    def test_no_two_objects_are_the_same(self):
        background = ttft.background_image(*TINY.source, seed=1)
        rng = np.random.default_rng(0)
        frames = [ttft.draw_frame(background, TINY, 0.25, rng).image.tobytes() for _ in range(8)]
        assert len(set(frames)) == 8


class TestFlops:
    def test_attention_is_counted(self):
        """Twice the columns cost more than twice as much, though the head is paid once."""
        assert ttft.text_flops("tiny", 0, 80) > 2 * ttft.text_flops("tiny", 0, 40)
        assert ttft.group_flops("tiny", 16) > 2 * ttft.group_flops("tiny", 8) - 2 * ttft.group_flops(
            "tiny", 1
        )

    def test_a_cached_prefix_costs_only_what_attends_to_it(self):
        whole, prefix = ttft.text_flops("tiny", 0, 80), ttft.text_flops("tiny", 60, 20)
        assert ttft.text_flops("tiny", 0, 20) < prefix < whole / 2

    def test_a_whole_clip_l_costs_what_its_parameters_say(self):
        patches = 2 * 576 * 3 * 14 * 14 * 1024
        attention = 24 * 4 * 577**2 * 1024
        tower = 24 * 12 * 1024**2 * 2 * 577
        projector = 2 * 576 * (1024 * 576 + 576**2)
        assert ttft.stock_vision_flops("clip-l+135m") == tower + attention + patches + projector


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
