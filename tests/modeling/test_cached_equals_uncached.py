"""The background cache changes no answer, whatever it holds, loses or is asked at once."""

import threading

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_inputs import batch, generate, inputs_of
from red_square import scene

import backdrop.modeling.background_cache_backdrop as cache_module
from backdrop.modeling.background_folder_backdrop import BackgroundFolder


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(10, 40), max_size=6), min_size=3, max_size=3),
    st.sampled_from([0, 2]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 1), min_size=9, max_size=9),
)
def test_cached_equals_uncached(seed, sizes, texts, prefusion, separate, separators, kinds):
    """Random images, masks, batches, prompts; prefusion on and off, shared and separate towers."""
    layout, g = [], 0
    for size in sizes:
        layout.append(list(range(g, g + size)))
        g += size
    model = tiny.backdrop_model(
        num_prefusion_layers=prefusion,
        separate_vision_towers=separate,
        separate_projectors=separate,
        separators=separators,
    )
    with torch.no_grad():
        for parameter in model.model.prefusion.parameters() if prefusion else ():
            parameter.add_(0.02 * torch.randn_like(parameter))
    # Groups of one row stand in order, backgrounds before objects or not: both must work.
    inputs = inputs_of(layout, seed, texts[: len(layout)], kinds[: max(g, 1)])
    if not separators:
        inputs["input_ids"][inputs["input_ids"] > tiny.IMAGE_ID] = 7
    expected = generate(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    model.enable_background_cache(10**7)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
        with torch.no_grad():
            prepared = model.prepare_prefill(**inputs)
            assert torch.allclose(model(**prepared).logits[:, -1], logits, atol=1e-5)
    # Another question, other objects, the same backgrounds.
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] = 35
    if g:
        other["pixel_values"] = inputs["pixel_values"].clone()
        other["pixel_values"][inputs["group_kind"] == 1] += 1
    found = generate(model, other)
    with model.background_cache.scope(bypass=True):
        assert torch.equal(found, generate(model, other))
    assert torch.equal(generate(model, inputs), expected)


def test_vision_tokens_alone_where_prefixes_are_off():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    expected = generate(model, inputs)
    model.enable_background_cache(10**7, prefixes=False)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
    stats = model.background_cache.stats()
    assert stats["tokens_hits"] == 1 and stats["prefix_hits"] == stats["prefix_misses"] == 0


def test_later_turns_of_a_conversation_reuse_the_background(chat_model, processor):
    import transformers

    pipe = transformers.pipeline("image-text-to-text", model=chat_model, processor=processor)
    image = scene(14, 14)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}
    ]
    longer = [
        *chat,
        {"role": "assistant", "content": [{"type": "text", "text": "a bus"}]},
        {"role": "user", "content": [{"type": "text", "text": "red?"}]},
    ]
    expected = [
        pipe(text=c, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1] for c in (chat, longer)
    ]
    chat_model.enable_background_cache(10**7)
    found = [pipe(text=c, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1] for c in (chat, longer)]
    assert found == expected
    stats = chat_model.background_cache.stats()
    assert stats["prefix_hits"] == 1 == stats["tokens_hits"] and stats["seconds_saved"] > 0


def test_training_and_gradients_bypass_the_cache():
    model = tiny.backdrop_model()
    inputs = batch(model)
    model.enable_background_cache(10**7)
    model(**inputs)
    model.train()
    with torch.no_grad():
        model(**inputs)
    assert model.background_cache.stats()["entries"] == 0


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


def test_a_damaged_folder_costs_time_and_no_answer(tmp_path, monkeypatch):
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    expected = generate(model, inputs)
    # On a busy machine computing a tiny model again may be quicker than the disk, and the folder passed over.
    monkeypatch.setattr(BackgroundFolder, "seconds_to_load", lambda self, num_bytes: 0.0)
    model.enable_background_cache(10**7, folder=tmp_path)
    generate(model, inputs)
    model.background_cache.folder.flush(30)
    for path in tmp_path.rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
    model.enable_background_cache(10**7, folder=tmp_path)
    assert torch.equal(generate(model, inputs), expected)
    stats = model.background_cache.stats()
    assert stats["disk_hits"] == 0 and stats["tiers"]["disk"]["corrupt"] == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_no_memory_while_storing_and_the_answer_still_comes(monkeypatch, error):
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)

    def fails(tensor):
        raise error

    monkeypatch.setattr(cache_module, "compact", fails)
    assert torch.equal(generate(model, inputs), expected)
    stats = model.background_cache.stats()
    assert stats["entries"] == 0 and stats["out_of_memory"] == 2


def test_threads_share_one_cache():
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


def test_sixteen_threads_get_their_own_answers(tmp_path):
    model = tiny.backdrop_model()
    batches = [inputs_of([[0, 1]], seed=seed) for seed in range(4)]
    expected = [generate(model, inputs) for inputs in batches]
    model.enable_background_cache(10**7)
    generate(model, batches[0])
    size = model.background_cache.stats()["bytes"]
    model.enable_background_cache(2 * size, host_max_bytes=size, folder=tmp_path, folder_max_bytes=10**6)
    wrong = []

    def ask(number: int) -> None:
        for turn in range(4):
            i = (number + turn) % 4
            with model.background_cache.scope(namespace=str(number % 2)):
                if not torch.equal(generate(model, batches[i]), expected[i]):
                    wrong.append((number, turn))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = model.background_cache.stats()
    assert not wrong and stats["tokens_hits"] > 0
    assert all(stats["tiers"][name]["bytes"] <= stats["tiers"][name]["max_bytes"] for name in stats["tiers"])
    model.background_cache.folder.flush(30)
