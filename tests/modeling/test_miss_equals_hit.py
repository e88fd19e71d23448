"""A miss and a hit of one call are equal bit for bit in every dtype: what is stored for a key depends on the key alone."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_inputs import inputs_of, row_of, trained_prefusion

from backdrop.modeling.background_folder_backdrop import BackgroundFolder

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def model_in(dtype, prefusion=0, separate=False, **changes):
    model = tiny.backdrop_model(
        num_prefusion_layers=prefusion,
        separate_vision_towers=separate,
        separate_projectors=separate,
        **changes,
    )
    return (trained_prefusion(model) if prefusion else model).to(dtype)


def scores(model, inputs, new=2, **options):
    """Logits `[B, vocab]` of the first new tokens."""
    return model.generate(
        **inputs,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    ).logits


def assert_same_bits(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("prefusion", "separate"), [(0, False), (1, True)], ids=["shared", "separate and prefusion"]
)
def test_miss_and_hit_have_the_same_bits(dtype, prefusion, separate, tmp_path, monkeypatch):
    """Rows of several images, chained backgrounds, a row without an image; memory, the host's memory, a folder."""
    model = model_in(dtype, prefusion, separate)
    inputs = inputs_of(
        [[0, 1], [2, 3, 4, 5], [], [6, 7, 8]],
        texts=[(10, 11), (12,) * 7, (13,), ()],
        kinds=[0, 1, 0, 1, 0, 1, 0, 0, 1],
    )
    monkeypatch.setattr(BackgroundFolder, "seconds_to_load", lambda self, num_bytes: 0.0)
    cache = model.enable_background_cache(10**7, host_max_bytes=10**7, folder=tmp_path)
    miss = scores(model, inputs)
    assert_same_bits(scores(model, inputs), miss)
    assert cache.stats()["prefix_hits"] and cache.stats()["tokens_hits"]
    with torch.no_grad():
        prepared = []
        for _ in range(2):
            with cache.scope(namespace="another"):
                prepared.append(model(**model.prepare_prefill(**inputs)).logits)
    assert torch.equal(*prepared)
    cache.folder.flush(30)
    cache = model.enable_background_cache(10**7, folder=tmp_path)
    assert_same_bits(scores(model, inputs), miss)
    assert cache.stats()["disk_hits"]
    # Evicted into the host's memory and fetched back.
    cache = model.enable_background_cache(3000, host_max_bytes=10**7)
    assert_same_bits(scores(model, inputs), miss)
    assert_same_bits(scores(model, inputs), miss)


@pytest.mark.parametrize(
    "changes", [{}, {"masked_attention": False}, {"attn_implementation": "eager"}], ids=str
)
def test_a_batch_has_the_same_bits_whichever_of_its_backgrounds_are_known(changes):
    """Some rows are asked alone before: their backgrounds are hits, those of the others misses."""
    model = model_in(torch.float32, **changes)  # half precision makes a kernel for every new shape
    model.enable_background_cache(10**7)

    @settings(deadline=None, max_examples=10)
    @given(
        st.integers(0, 1000),
        st.lists(st.integers(0, 4), min_size=2, max_size=3),
        st.lists(st.integers(0, 1), min_size=12, max_size=12),
        st.lists(st.booleans(), min_size=3, max_size=3),
    )
    def check(seed, sizes, kinds, known):
        layout, g = [], 0
        for size in sizes:
            layout.append(list(range(g, g + size)))
            g += size
        inputs = inputs_of(layout, seed, kinds=kinds[: max(g, 1)])
        model.background_cache.clear()
        miss = scores(model, inputs, new=1)
        assert_same_bits(scores(model, inputs, new=1), miss)
        model.background_cache.clear()
        for r, (groups, asked) in enumerate(zip(layout, known, strict=False)):
            if asked and groups:
                scores(model, row_of(inputs, r, groups), new=1)
        assert_same_bits(scores(model, inputs, new=1), miss)

    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vision_tokens_of_a_background_do_not_depend_on_what_stands_beside_it(dtype):
    model = model_in(dtype)
    pixels, mask, kind = tiny.random_groups(8)
    model.enable_background_cache(10**7)
    with torch.no_grad():
        together = model.get_image_features(pixels, mask, kind).pooler_output
        for g in range(0, 8, 2):
            model.background_cache.clear()
            (alone,) = model.get_image_features(pixels[[g]], mask[[g]], kind[[g]]).pooler_output
            assert torch.equal(alone, together[g])


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_ways_of_generating_have_the_same_bits(options):
    model = model_in(torch.bfloat16)
    inputs = inputs_of([[0, 1], [2, 3]])
    model.enable_background_cache(10**7)
    miss = scores(model, inputs, **options)
    assert_same_bits(scores(model, inputs, **options), miss)


def test_captured_reuse_has_the_same_bits():
    """The padded passes of `compile_reuse` serve the objects of a miss as those of a hit."""
    model = model_in(torch.bfloat16)
    inputs = inputs_of([[0, 1]])
    model.enable_background_cache(10**7)
    model.compile_reuse(capture=False)
    miss = scores(model, inputs)
    assert_same_bits(scores(model, inputs), miss)
    assert model.compiled_reuse.stats()["tower"] == 2
