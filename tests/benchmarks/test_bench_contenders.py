"""What the time-to-first-token benchmark times: shared weights, hits that are hits, a detector that really runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from backdrop.benchmarks import contenders, devices, shapes
from backdrop.benchmarks.frames import Frame, background_image, draw_frame

TINY = shapes.SHAPES["tiny"]


class TestModels:
    def test_all_modes_have_the_same_storage(self, bench):
        llava = bench.contenders["llava"].model
        wanted = {tensor.data_ptr() for tensor in (*llava.parameters(), *llava.buffers())}
        for mode in contenders.MODES[1:]:
            model = bench.contenders[mode].model
            assert {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())} == wanted
            assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in llava.parameters())

    def test_a_hook_on_llava_is_not_backdrops(self, bench):
        llava, model = bench.contenders["llava"].model, bench.contenders["cold"].model
        assert not set(map(id, llava.modules())) & set(map(id, model.modules()))

    def test_tied_embeddings_stay_tied(self):
        text = {**TINY.text, "tie_word_embeddings": True}
        shape = shapes.Shape(TINY.vision, text, TINY.source)
        model = contenders.sharing_backdrop(contenders.build_llava(shape, "cpu", torch.float32))
        assert model.lm_head.weight is model.get_input_embeddings().weight

    @torch.no_grad()
    def test_unsplit_the_logits_are_llavas(self, bench):
        llava, backdrop = bench.contenders["llava"], bench.contenders["cold"]
        frame = background_image(*TINY.source, seed=3)
        inputs = llava.processor(images=[frame], text=[shapes.PROMPT], return_tensors="pt")
        theirs = llava.model(**inputs).logits
        ours = backdrop.model(**inputs).logits
        assert torch.equal(theirs, ours)
        assert theirs.std() > 0

    def test_the_prompt_has_as_many_tokens_as_a_real_tokenizer_gives(self):
        tokenizer = shapes.build_tokenizer()
        assert 45 <= len(tokenizer(shapes.PROMPT).input_ids) <= 75
        assert all(len(tokenizer) <= shape.text["vocab_size"] for shape in shapes.SHAPES.values())

    def test_memory_that_is_too_small_is_refused(self, monkeypatch):
        free = SimpleNamespace(available=8 * 2**30)
        monkeypatch.setattr(devices, "psutil", SimpleNamespace(virtual_memory=lambda: free))
        with pytest.raises(
            ValueError, match=r"llava-1.5-7b in bfloat16 .* needs about 1\d.* 8.0 GiB are free"
        ):
            devices.check_memory("llava-1.5-7b", "cpu", torch.bfloat16, 1)


class TestHits:
    def test_an_unknown_background_is_an_error(self, bench):
        contender = bench.contenders["tokens"]
        rng = np.random.default_rng(0)
        known, other = (background_image(*TINY.source, seed=seed) for seed in (5, 6))
        empty = Frame(known, np.zeros(16, dtype=bool), None)
        contender.store([empty])
        frames = [draw_frame(known, TINY, 0.25, rng)]
        _, inputs = contender.first_token_on_hits(frames, 1)
        assert inputs["group_kind"].tolist() == [0, 1]
        with pytest.raises(RuntimeError, match="Mode tokens, batch 1: 0 tokens hits"):
            contender.first_token_on_hits([draw_frame(other, TINY, 0.25, rng)], 1)

    def test_a_prefix_that_was_forgotten_is_an_error(self, bench):
        contender = bench.contenders["tokens+prefix"]
        background = background_image(*TINY.source, seed=5)
        contender.store([Frame(background, np.zeros(16, dtype=bool), None)])
        contender.model.background_cache.clear()
        frames = [draw_frame(background, TINY, 0.25, np.random.default_rng(0))]
        with pytest.raises(RuntimeError, match="0 prefix hits and 1 misses"):
            contender.first_token_on_hits(frames, 1)

    def test_a_cold_call_runs_the_detector_and_splits_at_the_planted_box(self, bench, monkeypatch):
        contender = bench.contenders["cold"]
        seen = []
        detect = contender.detector._detector.detect
        monkeypatch.setattr(
            contender.detector._detector,
            "detect",
            lambda images, **k: seen.append(len(images)) or detect(images, **k),
        )
        background = background_image(*TINY.source, seed=5)
        frames = [draw_frame(background, TINY, 0.0625, np.random.default_rng(seed)) for seed in range(2)]
        _, inputs = contender.first_token(frames)
        assert seen == [2]
        for frame, owned in zip(frames, inputs["patch_mask"][inputs["group_kind"] == 1].numpy(), strict=True):
            assert (owned & frame.changed).any() and owned.sum() <= 9  # margin 1 around one patch
