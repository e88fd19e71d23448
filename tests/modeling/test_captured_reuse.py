"""Reused answers from captured graphs are the plain path's; what does not fit takes the plain path and is counted."""

import copy
import pickle
import threading

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_inputs import generate, inputs_of
from recorded_graph import RecordedGraph, capture_on_the_cpu

import backdrop.modeling.captured_graphs_backdrop as graphs_module
from backdrop.modeling.captured_reuse_backdrop import CapturedReuse


@pytest.fixture
def recorded(monkeypatch):
    """Graphs are recorded on the CPU."""
    capture_on_the_cpu(monkeypatch)


def ask(model, inputs, **options):
    """Ids of a short greedy answer, and the logits of each of its tokens."""
    out = generate(model, inputs, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences, torch.stack(out.logits)


def agree(found, wanted):
    torch.testing.assert_close(found[1], wanted[1], atol=1e-5, rtol=0)
    assert torch.equal(found[0], wanted[0])


def reusing(model, **options):
    """The model with its cache and captured reuse on; tiny buckets, so that several are met."""
    model.enable_background_cache(10**7)
    return model.compile_reuse(**{"bucket": 8, "capture": False, **options})


def with_question(inputs, ids):
    """The same prompts with another question behind them."""
    extra = torch.tensor([ids] * inputs["input_ids"].shape[0])
    return {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], extra], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(extra)], 1),
    }


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 1000),
    st.lists(st.lists(st.integers(10, 40), max_size=20), min_size=1, max_size=2),
    st.sampled_from([[0], [0, 1], [0, 0, 1], [0, 1, 1], [1, 0]]),
    st.integers(1, 40),
    st.sampled_from(["sdpa", "eager"]),
    st.booleans(),
)
def test_miss_and_hit_equal_the_plain_path(seed, texts, kinds, bucket, attention, padded):
    """Lengths, segments, batches, left padding, both attentions; the graphs replayed, or run by Python."""
    count = len(kinds)
    layout = [list(range(r * count, (r + 1) * count)) for r in range(len(texts))]
    inputs = inputs_of(layout, seed, texts, kinds * len(texts))
    if padded:
        inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (3, 0), value=0)
        inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (3, 0), value=0)
    model = tiny.backdrop_model()
    model.set_attn_implementation(attention)
    wanted = ask(model, inputs)
    other = with_question(inputs, [12, 13, 14])
    wanted_other = ask(model, other)
    with pytest.MonkeyPatch.context() as patch:
        capture_on_the_cpu(patch)
        reuse = reusing(model, bucket=bucket, max_batch=4, capture=bool(seed % 2))
        miss = ask(model, inputs)
        hit = ask(model, inputs)
        agree(miss, wanted)
        agree(hit, wanted)
        agree(ask(model, other), wanted_other)
        agree(ask(model, inputs), wanted)
        stats = reuse.stats()
        reuse.clear()
    led = kinds[0] == 0
    assert (
        stats["language_model"] == (4 if led else 0) and not stats["fallbacks"] and stats["failure"] is None
    )
    if led:
        assert bool(stats["captures"]) == bool(seed % 2)


def test_a_hit_equals_its_miss_bit_for_bit_in_the_language_model(recorded):
    model = tiny.backdrop_model()
    reuse = reusing(model, capture=True)
    inputs = inputs_of([[0]])  # no objects: the tower computes nothing on a hit
    first, second = ask(model, inputs), ask(model, inputs)
    assert torch.equal(first[1], second[1]) and reuse.stats()["captures"] == 1


def test_the_prefix_is_copied_only_when_another_one_is_asked_for(recorded):
    model = tiny.backdrop_model()
    reuse = reusing(model, capture=True)
    one, two = inputs_of([[0, 1]], seed=0), inputs_of([[0, 1]], seed=1)
    for inputs in (one, two):
        generate(model, inputs)  # a miss: what it copies is not the stored tensors themselves
    copies = reuse.stats()["prefix_copies"]
    for inputs, added in ((one, 1), (one, 0), (two, 1), (two, 0), (one, 1)):
        generate(model, inputs)
        copies += added
        assert reuse.stats()["prefix_copies"] == copies


def test_values_changed_unseen_are_computed_again_after_clear():
    """The same key after `clear` may stand for other values; the buffer must not keep the old ones."""
    model = tiny.backdrop_model()
    reusing(model)
    inputs = inputs_of([[0, 1]])
    generate(model, inputs), generate(model, inputs)
    weight = model.model.language_model.layers[0].self_attn.k_proj.weight
    weight.data[1, 1] += 3  # between the sampled elements: the fingerprint does not see it
    model.background_cache.clear()
    found = ask(model, inputs)
    with model.background_cache.scope(bypass=True):
        agree(found, ask(model, inputs))


def test_stored_values_are_never_written_and_the_cache_continues(recorded):
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    turn = inputs["input_ids"].shape[1]

    def two_turns():
        first = generate(model, inputs, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[20, 21, 22]])], 1)
        return generate(
            model,
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            past_key_values=first.past_key_values,
        )

    wanted = two_turns()
    reusing(model, capture=True)
    generate(model, inputs)
    tier = model.background_cache.device_tier
    kept = {key: [t.clone() for t in value.tensors] for key, value in tier.entries.items()}
    for _ in range(2):
        assert torch.equal(two_turns(), wanted) and wanted.shape[1] > turn
    for key, tensors in kept.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, tier.entries[key].tensors, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ],
)
@pytest.mark.parametrize("max_batch", [1, 4])
def test_every_mode_of_generation_gives_the_same_tokens(options, max_batch):
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])

    def run():
        torch.manual_seed(3)
        found = model.generate(**inputs, max_new_tokens=5, **{"do_sample": False, **options})
        return getattr(found, "sequences", found)

    wanted = run()
    reuse = reusing(model, max_batch=max_batch)
    for _ in range(3):
        assert torch.equal(run(), wanted)
    stats = reuse.stats()
    assert stats["failure"] is None
    beams = options.get("num_beams", options.get("num_return_sequences", 1))
    if beams > max_batch:
        assert stats["language_model"] == 0 and stats["fallbacks"]["batch"]


def test_prepared_prefill_and_changed_weights():
    """Weights in other places between `prepare_prefill` and `forward` are seen."""
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    reuse = reusing(model)
    with torch.no_grad():
        wanted = model(**inputs).logits[:, -1]
        for _ in range(2):
            prepared = model.prepare_prefill(**inputs)
            torch.testing.assert_close(model(**prepared).logits[:, -1], wanted, atol=1e-5, rtol=0)
        prepared = model.prepare_prefill(**inputs)
        before = reuse._graphs._passes.copy()
        for parameter in model.model.language_model.parameters():
            parameter.data = parameter.data.clone()
        torch.testing.assert_close(model(**prepared).logits[:, -1], wanted, atol=1e-5, rtol=0)
    assert not set(map(id, before.values())) & set(map(id, reuse._graphs._passes.values())) - {
        id(value) for name, value in before.items() if name[0] == "tower"
    }


def test_graphs_go_when_weights_change_and_answers_follow(recorded):
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    reuse = reusing(model, capture=True)
    for _ in range(2):
        generate(model, inputs)
    assert reuse.stats()["captures"] == 2  # the language model's and the tower's
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    found = ask(model, inputs)
    with model.background_cache.scope(bypass=True):
        agree(found, ask(model, inputs))
    assert reuse.stats()["captures"] == 4  # a miss: its objects run captured too


def test_bounds_on_graphs_and_bytes(recorded):
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    questions = [with_question(inputs, [11] * n) for n in (1, 9, 17, 25, 1)]
    wanted = [ask(model, question) for question in questions]
    reuse = reusing(model, capture=True, max_graphs=2)
    for _ in range(2):
        for question, answer in zip(questions, wanted, strict=True):
            agree(ask(model, question), answer)
            assert reuse.stats()["graphs"] <= 2
    held = reuse.stats()["buffer_bytes"]
    assert held == 2 * 2 * 2 * 8 * 512 * 4  # keys and values, layers, heads, width, positions, float32
    reuse = reusing(model, max_bytes=held - 1)
    agree(ask(model, questions[0]), wanted[0])
    assert reuse.stats()["fallbacks"] == {"max_bytes": 1} and reuse.stats()["buffer_bytes"] == 0


def _prefusion():
    return tiny.backdrop_model(num_prefusion_layers=1)


def _dynamic_rope():
    changed = tiny.text_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    return tiny.backdrop_model(text_config=changed)


def _hooked():
    model = tiny.backdrop_model()
    model.enable_input_require_grads()  # a hook of transformers' own, which the background cache lets pass
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_prefusion, "prefusion"),
        (_dynamic_rope, "positions that depend on the length"),
        (_hooked, "hooks"),
    ],
)
def test_models_that_cannot_be_captured(build, reason):
    model = build()
    inputs = inputs_of([[0, 1]])
    wanted = ask(model, inputs)
    reuse = reusing(model)
    for _ in range(2):
        agree(ask(model, inputs), wanted)
    assert reuse.stats()["fallbacks"] == {reason: 2} and reuse.stats()["language_model"] == 0


def test_objects_with_a_tower_of_their_own_take_the_plain_path():
    model = tiny.backdrop_model(separate_vision_towers=True, separate_projectors=True)
    inputs = inputs_of([[0, 1]])
    wanted = ask(model, inputs)
    reuse = reusing(model)
    for _ in range(2):
        agree(ask(model, inputs), wanted)
    assert reuse.stats()["tower"] == 0 and reuse.stats()["language_model"] == 2


def test_on_the_cpu_nothing_is_captured():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    wanted = ask(model, inputs)
    reuse = reusing(model, capture=True)
    for _ in range(2):
        agree(ask(model, inputs), wanted)
    assert reuse.stats()["fallbacks"] == {"no CUDA device": 4}  # tower and language model, twice


def test_a_call_with_gradients_or_autocast_takes_the_plain_path():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    reuse = reusing(model)
    generate(model, inputs)
    prepared = model.prepare_prefill(**inputs)
    assert model(**prepared).logits.requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**model.prepare_prefill(**inputs))
    assert reuse.stats()["fallbacks"] == {"gradients": 1, "autocast": 2}  # there the objects too


def test_hooks_of_transformers_for_hidden_states_do_not_hinder():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    reuse = reusing(model)
    generate(model, inputs, output_hidden_states=True, return_dict_in_generate=True)
    for _ in range(2):
        generate(model, inputs)
    assert reuse.stats()["language_model"] == 2 and reuse.stats()["tower"] == 3


@pytest.mark.parametrize("when", ["capture", "replay"])
def test_an_error_ends_capturing_and_the_answer_still_comes(recorded, monkeypatch, when):
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    wanted = ask(model, inputs)
    reuse = reusing(model, capture=True)

    def fails(*args):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    if when == "capture":
        monkeypatch.setattr(graphs_module.CapturedGraphs, "_captured", fails)
    else:
        monkeypatch.setattr(RecordedGraph, "replay", fails)
    for _ in range(3):
        agree(ask(model, inputs), wanted)
    stats = reuse.stats()
    assert "not permitted" in stats["failure"] and stats["graphs"] == stats["buffer_bytes"] == 0
    assert set(stats["fallbacks"]) == {"failure"}


def test_a_pass_that_waits_for_the_device_cannot_be_captured(recorded, monkeypatch):
    """The stand-in for a capture refuses what a real one refuses."""
    with pytest.raises(RuntimeError, match="not permitted"), RecordedGraph():
        torch.ones(2).sum().item()


def test_threads_get_their_own_answers(recorded):
    model = tiny.backdrop_model()
    batches = [inputs_of([[0, 1]], seed=seed) for seed in range(3)]
    wanted = [generate(model, inputs) for inputs in batches]
    reusing(model, capture=True, max_graphs=3)
    wrong = []

    def work(number):
        for turn in range(4):
            i = (number + turn) % 3
            if not torch.equal(generate(model, batches[i]), wanted[i]):
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inference_mode_and_no_grad_take_turns(recorded):
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    wanted = generate(model, inputs)
    reuse = reusing(model, capture=True)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(generate(model, inputs), wanted)
    assert reuse.stats()["failure"] is None and reuse.stats()["language_model"] == 4


def test_switched_on_and_off_copied_and_checked():
    model = tiny.backdrop_model()
    assert model.compiled_reuse is None
    model.disable_compiled_reuse()
    reuse = reusing(model)
    assert model.compiled_reuse is reuse is model.model.compiled_reuse
    generate(model, inputs_of([[0, 1]]))
    for copied in (copy.deepcopy(reuse), pickle.loads(pickle.dumps(reuse))):
        assert copied.options == reuse.options and copied.stats()["graphs"] == 0
    model.disable_compiled_reuse()
    assert model.compiled_reuse is None and reuse.stats()["graphs"] == 0
    with pytest.raises(ValueError, match="bucket is 0; wanted a whole number, 1 or more"):
        CapturedReuse(bucket=0)
