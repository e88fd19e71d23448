"""One forward: training, prefill and generation agree; a batch equals its rows; dtypes, attention, devices."""

import pytest
import tiny
import torch
from model_inputs import batch, positions, row_of, trained_prefusion

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration


@pytest.mark.parametrize("prefusion", [0, 2])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("tower", ["clip", "siglip", "dinov2"])
def test_training_prefill_and_cached_generation_agree(tower, separate, prefusion):
    model = tiny.backdrop_model(
        tower=tower,
        separate_vision_towers=separate,
        separate_projectors=separate,
        num_prefusion_layers=prefusion,
    )
    if prefusion:
        trained_prefusion(model)
    inputs = batch(model)
    place = positions(inputs["attention_mask"])
    out = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    ids = torch.cat([inputs["input_ids"], new], dim=1)
    attention = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    with torch.no_grad():
        prefill = model(**inputs, position_ids=place).logits
        full = {**inputs, "input_ids": ids, "attention_mask": attention, "position_ids": positions(attention)}
        model.train()
        training = model(**full, labels=ids, use_cache=False).logits
        model.eval()
    length = inputs["input_ids"].shape[1]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(training[:, :length][real], prefill[real], atol=1e-5, rtol=1e-4)
    generated = torch.stack(out.logits, dim=1)
    torch.testing.assert_close(training[:, length - 1 : -1], generated, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prefusion", [0, 2])
def test_batch_equals_single_and_left_padding_changes_nothing(prefusion):
    model = tiny.backdrop_model(num_prefusion_layers=prefusion)
    if prefusion:
        trained_prefusion(model)
    rows = ((0, 1), (2,), (3, 4))
    inputs = batch(model, rows, groups=5)
    with torch.no_grad():
        together = model(**inputs, position_ids=positions(inputs["attention_mask"])).logits
        for r, groups in enumerate(rows):
            alone = model(**row_of(inputs, r, groups)).logits[0]
            torch.testing.assert_close(together[r, -alone.shape[0] :], alone, atol=1e-5, rtol=1e-4)
    generated = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for r, groups in enumerate(rows):
        single = row_of(inputs, r, groups)
        alone = model.generate(**single, max_new_tokens=6, do_sample=False)[0, single["input_ids"].shape[1] :]
        assert torch.equal(generated[r], alone)


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny.backdrop_model(num_prefusion_layers=1)
    trained_prefusion(model)
    inputs = batch(model)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_eager_and_sdpa_agree():
    model = tiny.backdrop_model(num_prefusion_layers=1)
    trained_prefusion(model)
    inputs = batch(model)
    with torch.no_grad():
        sdpa = model(**inputs).logits
        model.set_attn_implementation("eager")
        eager = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(eager[real], sdpa[real], atol=2e-5, rtol=1e-4)


def test_bfloat16_runs_without_a_tensor_of_another_dtype():
    model = tiny.backdrop_model(num_prefusion_layers=1, separate_vision_towers=True).to(torch.bfloat16)
    inputs = batch(model)
    with torch.no_grad():
        out = model(**inputs)
    assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits).all()
    model.enable_background_cache(10**7)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert model.background_cache.stats()["tokens_hits"] == 2


def test_devices_are_kept_apart_by_an_offloaded_device_map(tmp_path):
    """Weights on meta, moved in by accelerate's hooks: an operation that mixes devices would raise."""
    from accelerate import cpu_offload

    model = tiny.backdrop_model(num_prefusion_layers=1, separate_vision_towers=True)
    trained_prefusion(model)
    inputs = batch(model)
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)


def test_an_automatic_device_map_over_two_devices_runs(tmp_path):
    model = tiny.backdrop_model(num_prefusion_layers=1)
    model.save_pretrained(tmp_path)
    inputs = batch(model)
    split = BackdropForConditionalGeneration.from_pretrained(
        tmp_path,
        device_map={
            "model.vision_tower": "cpu",
            "model.multi_modal_projector": "disk",
            "model.language_model": "cpu",
            "model.prefusion": "disk",
            "lm_head": "cpu",
        },
        offload_folder=tmp_path / "offload",
    )
    with torch.no_grad():
        torch.testing.assert_close(split(**inputs).logits, model(**inputs).logits)
