"""Keys of the background cache: every change of inputs, weights, adapters or settings makes another."""

import pytest
import tiny
import torch
from model_inputs import batch, generate, inputs_of, misses
from torch.multiprocessing.reductions import StorageWeakRef

from backdrop.modeling.weights_fingerprint_backdrop import WeightsFingerprints, WeightsSnapshot
from backdrop.modeling.weights_key_backdrop import weights_digest


def test_the_key_sees_every_change_of_pixels_mask_prompt_and_namespace():
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


class Taken:
    """Fingerprints of one process, each taken anew."""

    def __init__(self, remembered=None):
        self.fingerprints = remembered or WeightsFingerprints()

    def __call__(self, *modules):
        self.fingerprints.clear()
        return self.fingerprints.of(*modules).fingerprint


def test_the_fingerprint_is_steady():
    model, taken = tiny.backdrop_model(), Taken()
    assert taken(model.model.language_model) == taken(model.model.language_model)
    assert taken(model.model.language_model) != taken(tiny.backdrop_model(seed=1).model.language_model)


def test_the_fingerprint_returns_with_the_state():
    model, taken = tiny.backdrop_model(), Taken()
    norm = model.model.language_model.norm
    before = taken(model.model.language_model)
    norm.variance_epsilon *= 2
    assert taken(model.model.language_model) != before
    norm.variance_epsilon /= 2
    assert taken(model.model.language_model) == before
    norm.register_buffer("extra", torch.ones(3))
    assert taken(model.model.language_model) != before


def test_a_storage_in_the_place_of_a_freed_one_is_another():
    """Two tensors that follow each other at one address, with equal samples and counters, are not the same weights."""
    linear, taken, found, addresses = torch.nn.Linear(100, 100, bias=False), Taken(), [], []
    values = linear.weight.detach().clone()
    for between_the_samples in (0.0, 3.0) * 8:
        linear.weight = None  # its memory is free for the next
        linear.weight = torch.nn.Parameter(values.clone())
        linear.weight.data[0, 1] += between_the_samples
        addresses.append(linear.weight.data_ptr())
        found.append(taken(linear))
        taken.fingerprints.clear()
    assert len(set(addresses)) < len(addresses)  # or the test shows nothing
    assert len(set(found)) == len(found)


def change_an_attribute(model):
    model.model.language_model.layers[0].self_attn.scaling *= 2


def swap_a_module(model):
    model.model.language_model.layers[0] = tiny.backdrop_model(seed=2).model.language_model.layers[0]


def swap_two_modules(model):
    layers = model.model.language_model.layers
    first, second = layers[0], layers[1]
    layers[0], layers[1] = second, first


def replace_a_parameter(model):
    linear = model.model.language_model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone())


def transpose_through_data(model):
    linear = model.model.language_model.layers[0].self_attn.q_proj
    assert linear.weight.shape[0] == linear.weight.shape[1]
    linear.weight.data = linear.weight.data.t()


def add_a_buffer(model):
    model.model.language_model.norm.register_buffer("extra", torch.ones(3))


def change_an_integer_buffer(model):
    model.model.vision_tower.embeddings.position_ids.data += 1


def reinterpret_through_data(model):
    norm = model.model.language_model.norm
    norm.weight.data = norm.weight.data.view(torch.int32).view(torch.float32).view(2, -1)


def edit_noncontiguous_through_data(model):
    weight = model.model.language_model.layers[1].self_attn.q_proj.weight
    weight.data += 1


def no_change(model):
    model.eval()


@pytest.mark.parametrize(
    "change",
    [
        edit_in_place,
        edit_through_data,
        load_another,
        change_the_dtype,
        change_an_attribute,
        swap_a_module,
        swap_two_modules,
        replace_a_parameter,
        transpose_through_data,
        add_a_buffer,
        change_an_integer_buffer,
        reinterpret_through_data,
        edit_noncontiguous_through_data,
        no_change,
    ],
)
def test_remembered_fingerprints_are_those_taken_anew(change):
    model = tiny.backdrop_model()
    inner = model.model
    scattered = inner.language_model.layers[1].self_attn.q_proj.weight
    scattered.data = scattered.data.t().contiguous().t()
    remembered = WeightsFingerprints()

    def fingerprints(of):
        return [
            of(*modules)
            for modules in ((inner.vision_tower, inner.multi_modal_projector), (inner.language_model,))
        ]

    def look(*modules):
        return remembered.of(*modules).fingerprint

    before = fingerprints(look)
    assert fingerprints(look) == before
    change(model)
    after = fingerprints(look)
    assert after == fingerprints(Taken(remembered)) == fingerprints(look)
    assert (after == before) == (change is no_change)


@pytest.mark.parametrize("merge", [False, True], ids=["switched", "merged"])
def test_remembered_fingerprints_follow_adapters(merge):
    from peft import LoraConfig, get_peft_model

    model = tiny.backdrop_model()
    config = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=4, init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    remembered, found = WeightsFingerprints(), []

    def look():
        found.append(remembered.of(model.model.language_model).fingerprint)
        assert found[-1] == Taken(remembered)(model.model.language_model)

    look()
    if merge:
        adapted.merge_adapter()
        look()
        adapted.unmerge_adapter()
    else:
        with adapted.disable_adapter():
            look()
    look()
    adapted.set_adapter("default")
    for module in model.modules():
        if isinstance(vars(module).get("scaling"), dict):
            module.scaling["default"] *= 2
    look()
    assert found[0] != found[1] and found[2] != found[3]


def test_an_unchanged_model_is_looked_at_and_not_walked(monkeypatch):
    model = tiny.backdrop_model()
    inputs = batch(model)
    model.enable_background_cache(10**7)
    generate(model, inputs)
    generate(model, inputs)
    taken = []
    monkeypatch.setattr(
        "backdrop.modeling.weights_fingerprint_backdrop.WeightsSnapshot",
        lambda modules, storages: taken.append(modules) or WeightsSnapshot(modules, storages),
    )
    generate(model, inputs)
    assert not taken
    edit_through_data(model)
    generate(model, inputs)
    assert len(taken) == 1  # the tower's; the language model is as it was


def test_a_model_that_moves_leaves_no_weights_behind():
    model = tiny.backdrop_model()
    model.enable_background_cache(10**7)
    generate(model, batch(model))
    weights = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()]
    assert not any(weight.expired() for weight in weights)
    model.to(torch.bfloat16)
    assert all(weight.expired() for weight in weights)
    generate(model, batch(model))


def test_the_key_is_the_same_after_a_move_and_back():
    model = tiny.backdrop_model()
    inputs = batch(model)
    model.enable_background_cache(10**7)
    generate(model, inputs)
    before = misses(model)
    model.background_cache.forget_weights()
    generate(model, inputs)
    assert misses(model) == before


def test_the_digest_is_of_every_byte_and_the_same_in_equal_models():
    model, twin = tiny.backdrop_model(), tiny.backdrop_model()
    assert weights_digest(model) == weights_digest(twin)
    twin.model.vision_tower.encoder.layers[0].mlp.fc1.weight.data.view(-1)[123] += 1e-6
    assert weights_digest(model) != weights_digest(twin)


def test_language_model_adapters_keep_vision_tokens():
    from peft import LoraConfig, get_peft_model

    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    adapted = get_peft_model(
        model, LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=4, init_lora_weights=False)
    ).eval()
    model.enable_background_cache(10**7)
    generate(adapted, inputs)
    with adapted.disable_adapter():
        generate(adapted, inputs)
    stats = model.background_cache.stats()
    assert stats["tokens_hits"] == 1 and (stats["prefix_hits"], stats["prefix_misses"]) == (0, 2)


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


def test_adapters_on_and_off_never_share_a_folder_entry(tmp_path):
    from peft import LoraConfig, get_peft_model

    inputs = inputs_of([[0, 1]])
    for _ in range(2):
        model = tiny.backdrop_model()
        torch.manual_seed(5)
        adapted = get_peft_model(
            model,
            LoraConfig(
                target_modules=r".*(vision_tower|language_model).*\.(q_proj|v_proj)",
                r=4,
                init_lora_weights=False,
            ),
        ).eval()
        expected = generate(adapted, inputs)
        with adapted.disable_adapter():
            plain = generate(adapted, inputs)
        model.enable_background_cache(10**7, folder=tmp_path)
        assert torch.equal(generate(adapted, inputs), expected)
        with adapted.disable_adapter():
            assert torch.equal(generate(adapted, inputs), plain)
        adapted.merge_adapter()
        merged = generate(adapted, inputs)
        with model.background_cache.scope(bypass=True):
            assert torch.equal(generate(adapted, inputs), merged)
        model.background_cache.folder.flush(30)
