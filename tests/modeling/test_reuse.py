"""Matching and the memo: never stale beyond the bound, never another's, never over the budget."""

import threading

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from red_square import scene
from test_model import batch

from backdrop.modeling.background_cache_backdrop import BackgroundCache
from backdrop.modeling.weights_key_backdrop import weights_fingerprint
from backdrop.processing.background_matching_backdrop import BackgroundMatcher
from backdrop.processing.patch_groups_backdrop import BACKGROUND, OBJECT, patch_staleness, pixel_mask

# ---- matching


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 2.0, 10.0]),
    st.lists(st.integers(0, 6), min_size=2, max_size=6),
)
def test_every_patch_is_reused_within_tolerance_or_fresh(seed, tolerance, history):
    """Contract 4's first line over random images, noise and histories."""
    rng = np.random.default_rng(seed)
    bases = [rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for _ in range(3)]
    matcher = BackgroundMatcher(14, tolerance, min_reuse=0.2, max_overridden=0.8, max_references=2)
    for step in history:
        noise = rng.normal(0, step, (56, 56, 3))
        image = np.clip(bases[step % 3] + noise, 0, 255).astype(np.uint8)
        image[: 14 * (step % 3), :14] = 0
        match = matcher.match(image)
        if match is None:
            owned = rng.random(16) < 0.8
            owned[0] = True
            matcher.add(image, owned)
            continue
        reused = ~match.fresh
        staleness = patch_staleness(match.reference.pixels, image, 14)
        assert (staleness[reused] <= tolerance).all()
        assert match.reference.patch_mask[reused].all()
        if tolerance == 0:
            same = pixel_mask(reused, 56, 14)
            assert np.array_equal(match.reference.pixels[same], image[same])
        assert matcher.stats()["references"] <= 2


def test_a_moved_object_still_hits_and_the_fresh_group_overrides(image_processor, detector):
    image_processor.enable_background_matching(tolerance=0)
    first = image_processor.image_groups([scene(14, 14)])[0]
    second = image_processor.image_groups([scene(28, 28)])[0]
    assert detector.calls == 1  # on a match the detector does not run
    assert [g.kind for g in second] == [BACKGROUND, OBJECT]
    assert np.array_equal(second[0].pixels, first[0].pixels)
    # Fresh: where the object is now, and what the reference never showed.
    assert np.flatnonzero(second[1].patch_mask).tolist() == [5, 10]
    assert second[0].patch_mask[10]


def test_an_unchanged_frame_has_no_object_group_beyond_what_the_reference_lacks(image_processor):
    image_processor.enable_background_matching(tolerance=0)
    image_processor.image_groups([scene(width=0)])
    (again,) = image_processor.image_groups([scene(width=0)])[0]
    assert again.kind == BACKGROUND and again.patch_mask.all()


def test_detect_always_adds_detected_objects(image_processor, detector):
    image_processor.enable_background_matching(tolerance=255, detect="always")
    image_processor.image_groups([scene(width=0)])
    groups = image_processor.image_groups([scene(14, 14)])[0]
    assert detector.calls == 2 and np.flatnonzero(groups[1].patch_mask).tolist() == [5]


def test_images_of_one_batch_match_each_other(image_processor):
    image_processor.enable_background_matching(tolerance=0)
    groups = image_processor.image_groups([scene(0, 0), scene(28, 28), scene(42, 0)])
    assert all(np.array_equal(g[0].pixels, groups[0][0].pixels) for g in groups)


def test_too_much_override_is_refused():
    matcher = BackgroundMatcher(14, 0, min_reuse=0.1, max_overridden=0.25)
    reference = np.zeros((56, 56, 3), dtype=np.uint8)
    matcher.add(reference, np.ones(16, dtype=bool))
    image = reference.copy()
    image[:14] = 9  # 4 of 16 patches
    assert matcher.match(image).fresh.sum() == 4
    image[14:28, :14] = 9  # 5 of 16
    assert matcher.match(image) is None


def test_the_reference_with_the_least_to_compute_is_chosen():
    matcher = BackgroundMatcher(14, 0)
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    worse, better = image.copy(), image.copy()
    worse[:28, :14] = 0
    better[:14, :14] = 0
    for reference in (better, worse):
        matcher.add(reference, np.ones(16, dtype=bool))
    assert np.flatnonzero(matcher.match(image).fresh).tolist() == [0]


def test_namespaces_bypass_clear_ttl_and_bytes(image_processor, detector):
    matcher = image_processor.enable_background_matching(tolerance=0, max_references=4, ttl=1000)
    with matcher.scope(namespace="a"):
        image_processor.image_groups([scene(14, 14)])
    with matcher.scope(namespace="b"):
        image_processor.image_groups([scene(28, 14)])
    with matcher.scope(namespace="a", bypass=True):
        image_processor.image_groups([scene(28, 14)])
    assert detector.calls == 3 and matcher.stats()["matches"] == 0
    with matcher.scope(namespace="a"):
        image_processor.image_groups([scene(28, 14)])
    assert detector.calls == 3 and matcher.stats()["matches"] == 1
    for step in range(5):
        matcher.add(np.full((56, 56, 3), step, dtype=np.uint8), np.ones(16, dtype=bool))
    assert matcher.stats()["references"] == 4
    assert matcher.stats()["file_bytes"] == 4 * (56 * 56 * 3 + 16)
    with matcher.scope(namespace="a"):  # the namespace with most gave way
        assert matcher.match(np.asarray(scene(14, 14))) is not None
        for step in range(5):
            matcher.add(np.full((56, 56, 3), step, dtype=np.uint8), np.ones(16, dtype=bool))
        assert matcher.match(np.asarray(scene(14, 14))) is None  # the least recently used of its own
        assert matcher.stats()["references"] == 4
    matcher.clear()
    assert matcher.stats()["references"] == 0 == matcher.stats()["bytes"]


def test_references_expire(image_processor, monkeypatch):
    matcher = image_processor.enable_background_matching(tolerance=0, ttl=100)
    now = [0.0]
    monkeypatch.setattr("backdrop.processing.reference_store_backdrop.time.monotonic", lambda: now[0])
    image = np.asarray(scene(14, 14))
    matcher.add(image, np.ones(16, dtype=bool))
    now[0] = 99
    assert matcher.match(image) is not None
    now[0] = 101
    assert matcher.match(image) is None and matcher.stats()["expired"] == 1
    assert matcher.stats()["references"] == 0


def test_a_caller_that_draws_into_its_frame_changes_no_reference():
    matcher = BackgroundMatcher(14, 0)
    frame = np.zeros((56, 56, 3), dtype=np.uint8)
    matcher.add(frame, np.ones(16, dtype=bool))
    frame[:] = 255
    assert matcher.match(np.zeros((56, 56, 3), dtype=np.uint8)) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1}, "tolerance is -1"),
        ({"min_reuse": 0}, "min_reuse is 0"),
        ({"max_overridden": 2}, "max_overridden is 2"),
        ({"detect": "never"}, "detect is 'never'"),
        ({"max_references": 0}, "max_references is 0"),
        ({"ttl": 0}, "ttl is 0"),
    ],
)
def test_bad_matching_options_are_named(image_processor, options, message):
    with pytest.raises(ValueError, match=message):
        image_processor.enable_background_matching(**options)


# ---- the memo


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60), st.integers(50, 400))
def test_the_byte_budget_holds_and_the_oldest_goes_first(steps, budget):
    cache, model = BackgroundCache(budget), {}
    for name, size in steps:
        key = bytes([name])
        value = torch.full((size,), float(name * 100 + size))
        cache.put("tokens", key, (value,))
        model[key] = value
        assert cache.stats()["bytes"] <= budget
        stored = sum(t.numel() * 4 for v in cache.device_tier.entries.values() for t in v.tensors)
        assert stored == cache.stats()["bytes"]
        for known, expected in model.items():
            found = cache.device_tier.entries.get(("tokens", known))
            assert found is None or torch.equal(found.tensors[0], expected)
        if size * 4 <= budget:
            assert ("tokens", key) in cache.device_tier.entries
    cache.clear()
    assert cache.stats()["entries"] == 0 == cache.stats()["bytes"]


def test_a_view_is_stored_as_its_own_bytes():
    cache = BackgroundCache(1000)
    big = torch.zeros(10_000)
    cache.put("tokens", b"k", (big[:10],))
    (kept,) = cache.get("tokens", b"k")
    assert kept.untyped_storage().nbytes() == 40
    big[:10] = 1
    assert not kept.any()


def generate(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)


def misses(model):
    stats = model.background_cache.stats()
    return stats["tokens_misses"], stats["prefix_misses"]


def test_the_memo_sees_every_change_of_pixels_mask_prompt_and_namespace():
    model = tiny.backdrop_model()
    inputs = {
        name: value[:1] if name in ("input_ids", "attention_mask") else value[:2]
        for name, value in batch(model, ((0, 1),), groups=2).items()
    }
    model.enable_background_cache(10**7)
    generate(model, inputs)
    generate(model, inputs)
    assert misses(model) == (1, 1)
    pixels = inputs["pixel_values"].clone()
    pixels[0, 0, 0, 0] += 1e-6
    generate(model, {**inputs, "pixel_values": pixels})
    assert misses(model) == (2, 2)
    moved = inputs["pixel_values"].clone()
    moved[1] += 1  # the object group: other objects before the same background
    expected = tiny.backdrop_model().generate(
        **{**inputs, "pixel_values": moved}, max_new_tokens=5, do_sample=False
    )
    assert torch.equal(generate(model, {**inputs, "pixel_values": moved}), expected)
    assert misses(model) == (2, 2)
    ids = inputs["input_ids"].clone()
    ids[0, 1] = 33  # another system prompt
    generate(model, {**inputs, "input_ids": ids})
    assert misses(model) == (2, 3)
    ids = inputs["input_ids"].clone()
    ids[0, -1] = 34  # another question
    generate(model, {**inputs, "input_ids": ids})
    assert misses(model) == (2, 3)
    with model.background_cache.scope(namespace="other"):
        generate(model, inputs)
    assert misses(model) == (3, 4)
    with model.background_cache.scope(bypass=True):
        generate(model, inputs)
    assert misses(model) == (3, 4)


def edit_in_place(model):
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight.mul_(1.5)


def edit_through_data(model):
    model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.data += 0.01


def load_another(model):
    model.load_state_dict(tiny.backdrop_model(seed=3).state_dict())


def step_an_optimizer(model):
    inputs = batch(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def change_the_dtype(model):
    model.to(torch.bfloat16)


def change_the_attention(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    "change",
    [
        edit_in_place,
        edit_through_data,
        load_another,
        step_an_optimizer,
        change_the_dtype,
        change_the_attention,
    ],
)
def test_a_changed_model_never_hits(change):
    model = tiny.backdrop_model()
    inputs = batch(model)
    model.enable_background_cache(10**7)
    generate(model, inputs)
    before = model.background_cache.stats()
    change(model)
    cached = generate(model, inputs)
    after = model.background_cache.stats()
    assert after["tokens_hits"] == before["tokens_hits"] and after["prefix_hits"] == before["prefix_hits"]
    model.disable_background_cache()
    assert torch.equal(cached, generate(model, inputs))


def test_adapters_on_off_and_merged_never_hit_each_others_values():
    from peft import LoraConfig, get_peft_model

    model = tiny.backdrop_model()
    inputs = batch(model)
    peft_model = get_peft_model(
        model,
        LoraConfig(
            target_modules=r".*(vision_tower|language_model).*\.(q_proj|v_proj)", r=4, init_lora_weights=False
        ),
    ).eval()
    model.enable_background_cache(10**7)
    states = []

    def check():
        found = generate(peft_model, inputs)
        states.append(misses(model))
        with model.background_cache.scope(bypass=True):
            assert torch.equal(found, generate(peft_model, inputs))

    check()
    with peft_model.disable_adapter():
        check()
    peft_model.merge_adapter()
    check()
    peft_model.unmerge_adapter()
    assert all(later > earlier for earlier, later in zip(states, states[1:], strict=False))


def test_training_and_gradients_bypass_the_memo():
    model = tiny.backdrop_model()
    inputs = batch(model)
    model.enable_background_cache(10**7)
    model(**inputs)
    model.train()
    with torch.no_grad():
        model(**inputs)
    assert model.background_cache.stats()["entries"] == 0


def test_one_background_twice_in_a_batch_is_encoded_once():
    model = tiny.backdrop_model()
    inputs = batch(model)
    for name in ("pixel_values", "patch_mask"):
        inputs[name][2] = inputs[name][0]
    ids, attention = tiny.pad_left(
        tiny.prompt_ids([[0, 1], [2, 3]], inputs["patch_mask"], inputs["group_kind"])
    )
    inputs |= {"input_ids": ids, "attention_mask": attention}
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)
    assert torch.equal(generate(model, inputs), expected)
    stats = model.background_cache.stats()
    assert stats["tokens_misses"] == 1 and stats["entries"] == 2
    assert stats["vision_tokens_reused"] == int(inputs["patch_mask"][0].sum())


def test_rows_that_hit_miss_or_have_no_image_share_a_batch():
    model = tiny.backdrop_model()
    pixels, mask, kind = tiny.random_groups(4)
    rows = tiny.prompt_ids([[0, 1], [], [2, 3]], mask, kind)
    ids, attention = tiny.pad_left(rows)
    inputs = {
        "input_ids": ids,
        "attention_mask": attention,
        "pixel_values": pixels,
        "patch_mask": mask,
        "group_kind": kind,
    }
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
    ids, attention = tiny.pad_left([rows[0], rows[2]])
    both = {**inputs, "input_ids": ids, "attention_mask": attention}
    first = {
        **{k: v[:2] for k, v in inputs.items()},
        "input_ids": torch.tensor([rows[0]]),
        "attention_mask": torch.ones(1, len(rows[0]), dtype=torch.long),
    }
    model.background_cache.clear()
    generate(model, first)
    found = generate(model, both)
    model.disable_background_cache()
    assert torch.equal(found, generate(model, both))


def test_values_too_large_or_evicted_cost_time_and_no_answer():
    model = tiny.backdrop_model()
    inputs = batch(model)
    expected = generate(model, inputs)
    for budget in (1, 1500, 6000):
        model.enable_background_cache(budget)
        for _ in range(2):
            assert torch.equal(generate(model, inputs), expected)
        assert model.background_cache.stats()["bytes"] <= budget


def test_stored_values_are_never_written():
    model = tiny.backdrop_model()
    inputs = batch(model)
    model.enable_background_cache(10**7)
    generate(model, inputs)
    kept = {
        key: [t.clone() for t in value.tensors]
        for key, value in model.background_cache.device_tier.entries.items()
    }
    for options in (
        {},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ):
        single = options.get("prompt_lookup_num_tokens")
        one = {k: v[:1] if k in ("input_ids", "attention_mask") else v[:2] for k, v in inputs.items()}
        if single:
            start = int(one["attention_mask"].argmax())
            one = {k: v[:, start:] if k in ("input_ids", "attention_mask") else v for k, v in one.items()}
        generate(model, one if single else inputs, **options)
    for key, tensors in kept.items():
        assert all(
            torch.equal(a, b)
            for a, b in zip(tensors, model.background_cache.device_tier.entries[key].tensors, strict=True)
        )


def test_threads_share_one_memo():
    model = tiny.backdrop_model()
    inputs = batch(model)
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)
    wrong = []

    def work():
        for _ in range(3):
            if not torch.equal(generate(model, inputs), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and model.background_cache.stats()["entries"] == 4


def test_a_sliding_window_keeps_vision_tokens_only():
    from transformers import MistralConfig

    text = MistralConfig(
        **{
            k: v
            for k, v in tiny.text_config().to_dict().items()
            if k
            in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "vocab_size",
                "pad_token_id",
            )
        },
        sliding_window=8,
    )
    model = tiny.backdrop_model(text_config=text)
    inputs = batch(model)
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
    stats = model.background_cache.stats()
    assert stats["tokens_hits"] == 2 and stats["prefix_hits"] == stats["prefix_misses"] == 0


def test_the_fingerprint_is_steady():
    model = tiny.backdrop_model()
    assert weights_fingerprint(model) == weights_fingerprint(model)
    assert weights_fingerprint(model) != weights_fingerprint(tiny.backdrop_model(seed=1))


# ---- both together


def test_another_image_with_the_same_background_reuses_tokens_and_prefix(processor, chat_model):
    processor.enable_background_matching(tolerance=0)
    cache = chat_model.enable_background_cache(10**8)

    def ask(image):
        inputs = processor(images=image, text="USER: <image>\nwhat? ASSISTANT:", return_tensors="pt")
        out = chat_model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with cache.scope(bypass=True):
            assert torch.equal(out, chat_model.generate(**inputs, max_new_tokens=4, do_sample=False))

    ask(scene(14, 14))
    before = cache.stats()
    ask(scene(28, 28))
    after = cache.stats()
    assert after["tokens_hits"] - before["tokens_hits"] == 1
    assert after["prefix_hits"] - before["prefix_hits"] == 1
    assert after["vision_tokens_reused"] - before["vision_tokens_reused"] == 15
    ask(Image.new("RGB", (56, 56), (1, 2, 3)))
    assert cache.stats()["tokens_hits"] == after["tokens_hits"]
