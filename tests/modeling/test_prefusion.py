"""Prefusion: starts as the identity, keeps its keys and values, folds into the decoder."""

import pytest
import tiny
import torch
from model_inputs import batch, positions, trained_prefusion
from transformers import Qwen2Config

from backdrop.hub_export.extend import extend_model, fold_prefusion
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration


def test_prefusion_and_copies_start_as_what_was_there():
    model = tiny.backdrop_model()
    inputs = batch(model)
    with torch.no_grad():
        before = model(**inputs).logits
        extend_model(model, num_prefusion_layers=3)
        assert torch.equal(model(**inputs).logits, before)
        # The kinds are packed apart now: the same function in another order of additions.
        extend_model(model, separate_vision_towers=True, separate_projectors=True)
        torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-4)
    assert model.config.num_prefusion_layers == 3
    fresh = BackdropForConditionalGeneration(tiny.backdrop_config(num_prefusion_layers=1))
    assert not fresh.model.prefusion.layers[0].mlp.down_proj.weight.any()


def test_prefusion_without_rotary_positions_differs_and_still_caches():
    model = trained_prefusion(tiny.backdrop_model(num_prefusion_layers=1))
    inputs = batch(model)
    with torch.no_grad():
        rotary = model(**inputs).logits
        model.model.prefusion.rotary = False
        assert not torch.allclose(model(**inputs).logits, rotary)
    cached = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False), cached)


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_folded_prefusion_is_the_same_function(text):
    changes = {}
    if text == "qwen2":  # has layer_types
        values = {
            n: v
            for n, v in tiny.text_config().to_diff_dict().items()
            if n not in ("model_type", "architectures")
        }
        changes = {"text_config": Qwen2Config(**values)}
    model = trained_prefusion(tiny.backdrop_model(num_prefusion_layers=2, **changes))
    inputs = batch(model)
    place = positions(inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = model(**inputs, position_ids=place).logits
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        fold_prefusion(model)
        torch.testing.assert_close(model(**inputs, position_ids=place).logits[real], before[real])
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), tokens)
    assert model.config.num_prefusion_layers == 0 and not hasattr(model.model, "prefusion")
    # What is saved is a plain model of as many layers.
    again = BackdropForConditionalGeneration(BackdropConfig.from_dict(model.config.to_dict())).eval()
    again.load_state_dict(model.state_dict())
    assert len(again.model.language_model.layers) == 4
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs, position_ids=place).logits[real], before[real])


def test_prefusion_without_positions_cannot_be_folded():
    with pytest.raises(ValueError, match="no positions"):
        fold_prefusion(tiny.backdrop_model(num_prefusion_layers=1, prefusion_rotary=False))
    fold_prefusion(tiny.backdrop_model())  # nothing to do
