"""Saving and loading: bit-equal, or an error that names the weights."""

import re

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration, BackdropModel


@pytest.mark.parametrize(
    "changes", [{}, {"num_prefusion_layers": 2, "separate_vision_towers": True, "separate_projectors": True}]
)
def test_save_then_load_is_bit_equal(tmp_path, changes):
    model = tiny.backdrop_model(**changes)
    model.save_pretrained(tmp_path)
    again, info = BackdropForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    base = BackdropModel.from_pretrained(tmp_path)
    assert torch.equal(base.language_model.norm.weight, model.model.language_model.norm.weight)


def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_weights(tmp_path):
    tiny.backdrop_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing keys \(model\.prefusion\.layers\.0"):
        BackdropForConditionalGeneration.from_pretrained(tmp_path, num_prefusion_layers=1)
    tiny.backdrop_model(num_prefusion_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unexpected keys \(model\.prefusion\.layers\.0"):
        BackdropForConditionalGeneration.from_pretrained(tmp_path, num_prefusion_layers=0)


def test_a_corrupt_safetensors_is_an_error(tmp_path):
    tiny.backdrop_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)safetensors|header|buffer"):
        BackdropForConditionalGeneration.from_pretrained(tmp_path)


def test_no_weight_is_among_the_keys_to_ignore():
    # vLLM leaves out of a checkpoint what the class that it builds ignores: an untied head must not be.
    model = tiny.backdrop_model(num_prefusion_layers=1, separate_vision_towers=True, separate_projectors=True)
    for cls in (BackdropModel, BackdropForConditionalGeneration):
        for pattern in cls._keys_to_ignore_on_load_unexpected:
            assert not [name for name in model.state_dict() if re.search(pattern, name)], pattern


def test_the_base_model_loads_from_a_folder_with_a_head_and_from_no_other(tmp_path):
    model = tiny.backdrop_model()
    model.save_pretrained(tmp_path)
    base = BackdropModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(value, model.model.state_dict()[name]) for name, value in base.state_dict().items()
    )
    state = load_file(tmp_path / "model.safetensors") | {"lm_tail.weight": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lm_tail"):
        BackdropModel.from_pretrained(tmp_path)
