"""Prefixes of backgrounds in prefill: segments, rows that differ, leases, models without prefixes."""

import tiny
import torch
from model_inputs import batch, generate, inputs_of


def test_prepare_prefill_leaves_out_what_is_known():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    whole = model.prepare_prefill(**inputs)
    assert torch.equal(whole["input_ids"], inputs["input_ids"])
    model.enable_background_cache(10**7)
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        for _ in range(2):
            prepared = model.prepare_prefill(**inputs)
            outputs = model(**prepared)
    known = int(inputs["patch_mask"][0].sum())
    assert prepared["input_ids"].shape[1] <= inputs["input_ids"].shape[1] - known
    assert torch.allclose(outputs.logits[:, -1], expected, atol=1e-5)
    assert outputs.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    assert model.background_cache.stats()["prefix_hits"] == 1


def test_several_leading_backgrounds_are_each_reused():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1, 2]], kinds=[0, 0, 1])
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)
    assert torch.equal(generate(model, inputs), expected)
    before = model.background_cache.stats()
    assert (before["tokens_misses"], before["prefix_misses"]) == (2, 2)
    assert torch.equal(generate(model, inputs), expected)
    after = model.background_cache.stats()
    assert (after["tokens_hits"], after["prefix_hits"]) == (2, 2)
    # The second one changes: the first is still a hit.
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][1] += 1
    generate(model, changed)
    stats = model.background_cache.stats()
    assert (stats["prefix_hits"], stats["prefix_misses"]) == (3, 3)
    # The first one changes: the second's keys and values depend on it, its vision tokens do not.
    changed["pixel_values"] = inputs["pixel_values"].clone()
    changed["pixel_values"][0] += 1
    found = generate(model, changed)
    stats = model.background_cache.stats()
    assert (stats["prefix_hits"], stats["prefix_misses"], stats["tokens_hits"]) == (3, 5, 4)
    model.disable_background_cache()
    assert torch.equal(found, generate(model, changed))


def test_a_row_without_an_image_does_not_spoil_the_batch():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1], [], [2, 3]], texts=[(10, 11), (12,) * 30, (13,)])
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
    assert model.background_cache.stats()["prefix_hits"] == 2


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


def test_two_questions_from_one_prefix_do_not_disturb_each_other():
    model = tiny.backdrop_model()
    first, second = inputs_of([[0, 1]], texts=[(20, 21)]), inputs_of([[0, 1]], texts=[(30, 31, 32)])
    with torch.no_grad():
        expected = [model(**inputs).logits[:, -1] for inputs in (first, second)]
        model.enable_background_cache(10**7)
        prepared = [model.prepare_prefill(**inputs) for inputs in (first, second)]
        found = [model(**inputs).logits[:, -1] for inputs in prepared]
        # Decoding goes on in turns.
        caches = [inputs["past_key_values"] for inputs in prepared]
        for step in (40, 41):
            for inputs, cache in zip((first, second), caches, strict=True):
                token = torch.tensor([[step]])
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                last = model(
                    input_ids=token, attention_mask=inputs["attention_mask"], past_key_values=cache
                ).logits[:, -1]
                with model.background_cache.scope(bypass=True):
                    assert torch.allclose(last, model(**inputs).logits[:, -1], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_a_prefill_gives_its_entries_up():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    model.enable_background_cache(10**7)

    def pinned():
        return sum(entry.pins for entry in model.background_cache.device_tier.entries.values())

    generate(model, inputs)
    assert pinned() == 0
    prepared = model.prepare_prefill(**inputs)
    assert pinned() == 1
    with torch.no_grad():
        model(**prepared)
    assert pinned() == 0
    prepared = model.prepare_prefill(**inputs)
    del prepared  # never run
    assert pinned() == 0


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
