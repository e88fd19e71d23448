"""peft's adapters for single rows with the background cache on: each row's prefix is its own adapter's."""

import pytest
import tiny
import torch
from model_inputs import generate, inputs_of

from backdrop.modeling.adapter_rows_backdrop import is_adapter_hook

LANGUAGE = r".*language_model.*\.(q_proj|v_proj|up_proj)"
VISION = r".*(vision_tower|language_model).*\.(q_proj|v_proj)"
LAYOUT = [[0, 1], [2, 3], [4, 5]]


def adapted(target=LANGUAGE, **changes):
    """A model with the adapters "red" and "blue", and the `PeftModel` around it."""
    from peft import LoraConfig, get_peft_model

    model = tiny.backdrop_model(**changes)
    torch.manual_seed(3)
    config = LoraConfig(target_modules=target, r=4, lora_alpha=64, init_lora_weights=False)
    wrapped = get_peft_model(model, config, adapter_name="red")
    wrapped.add_adapter("blue", config)
    return model, wrapped.eval()


def same_background(layout=LAYOUT):
    """Rows that differ in their objects alone."""
    inputs = inputs_of(layout)
    mask = inputs["patch_mask"].clone()
    pixels = inputs["pixel_values"].clone()
    for g in range(0, len(mask), 2):
        pixels[g], mask[g] = pixels[0], mask[0]
    rows = tiny.prompt_ids(layout, mask, inputs["group_kind"])
    ids, attention = tiny.pad_left(rows)
    return inputs | {
        "input_ids": ids, "attention_mask": attention, "pixel_values": pixels, "patch_mask": mask
    }  # fmt: skip


def hooked(model):
    return [part for part in model.modules() if any(map(is_adapter_hook, part._forward_pre_hooks.values()))]


MIXES = [
    ["red", "blue", "__base__"],
    ["__base__", "__base__", "red"],
    ["blue", "blue", "blue"],
    ["__base__", "red", "blue"],
]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("prefusion", [0, 1])
def test_rows_with_adapters_of_their_own_get_the_same_tokens(beams, prefusion):
    model, wrapped = adapted(num_prefusion_layers=prefusion)
    inputs = same_background()
    expected = [generate(wrapped, inputs, adapter_names=list(mix), num_beams=beams) for mix in MIXES]
    assert len({tuple(tokens.flatten().tolist()) for tokens in expected}) > 1
    model.enable_background_cache(10**7)
    for _ in range(2):
        for mix, tokens in zip(MIXES, expected, strict=True):
            assert torch.equal(generate(wrapped, inputs, adapter_names=list(mix), num_beams=beams), tokens)
            assert not hooked(model)
    stats = model.background_cache.stats()
    assert stats["prefix_misses"] == 3 and stats["prefix_hits"]  # one background, with three adapters
    assert stats["tokens_misses"] == 1  # no adapter is in the tower


def test_a_named_adapter_and_the_active_one_never_meet():
    model, wrapped = adapted()
    inputs = same_background()
    expected = generate(wrapped, inputs)
    model.enable_background_cache(10**7)
    generate(wrapped, inputs, adapter_names=["blue"] * 3)
    assert torch.equal(generate(wrapped, inputs), expected)
    wrapped.base_model.set_adapter("blue")
    generate(wrapped, inputs, adapter_names=["red"] * 3)
    with model.background_cache.scope(bypass=True):
        expected = generate(wrapped, inputs)
    assert torch.equal(generate(wrapped, inputs), expected)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("cached", [False, True], ids=["off", "on"])
def test_adapters_in_the_tower_follow_the_rows_of_the_groups(cached, beams):
    """Each row as if it were alone with its adapter active."""
    model, wrapped = adapted(VISION)
    inputs = same_background()
    expected = {}
    for name in ("red", "blue"):
        wrapped.set_adapter(name)
        expected[name] = generate(wrapped, inputs, num_beams=beams)
    with wrapped.disable_adapter():
        expected["__base__"] = generate(wrapped, inputs, num_beams=beams)
    wrapped.set_adapter("red")
    if cached:
        model.enable_background_cache(10**7)
    for mix in MIXES * 2:
        found = generate(wrapped, inputs, adapter_names=list(mix), num_beams=beams)
        for r, name in enumerate(mix):
            assert torch.equal(found[r], expected[name][r]), (mix, r)
    assert not hooked(model)


@pytest.mark.parametrize("cached", [False, True], ids=["off", "on"])
def test_no_hook_stays_when_generate_raises(cached):
    model, wrapped = adapted()
    inputs = same_background()
    if cached:
        model.enable_background_cache(10**7)
    expected = generate(wrapped, inputs)

    def fail(*args):
        raise RuntimeError("stop")

    for broken in (
        {"inputs": inputs, "stopping_criteria": [fail]},
        {"inputs": {**inputs, "pixel_values": inputs["pixel_values"][:1]}},
        {"inputs": {**inputs, "no_such_argument": 1}},
    ):
        with pytest.raises((RuntimeError, ValueError)):
            generate(wrapped, broken.pop("inputs"), adapter_names=["red", "blue", "red"], **broken)
        assert not hooked(model)
        assert torch.equal(generate(wrapped, inputs), expected)


def test_too_few_names_are_pefts_error_with_the_cache_too():
    model, wrapped = adapted()
    model.enable_background_cache(10**7)
    with pytest.raises(ValueError, match="adapter_names"):
        generate(wrapped, same_background(), adapter_names=["red"])
    assert not hooked(model)


def test_captured_passes_know_no_named_adapters():
    model, wrapped = adapted()
    inputs = inputs_of([[0, 1]])
    expected = {mix: generate(wrapped, inputs, adapter_names=[mix]) for mix in ("red", "blue")}
    plain = generate(wrapped, inputs)
    model.enable_background_cache(10**7)
    model.compile_reuse(capture=False)
    for _ in range(2):
        assert torch.equal(generate(wrapped, inputs), plain)
        for mix, tokens in expected.items():
            assert torch.equal(generate(wrapped, inputs, adapter_names=[mix]), tokens)
