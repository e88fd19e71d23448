"""Contract 7 for every kind of adapter of peft: the cache changes no answer, and an adapter's values stay its own."""

import peft_kinds
import pytest
import tiny
import torch
from model_inputs import batch

from backdrop.modeling.background_folder_backdrop import BackgroundFolder

FAST = ("LORA", "IA3", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "TRAINABLE_TOKENS")


def logits_and_tokens(model, inputs):
    found = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return torch.stack(found.logits), found.sequences


@pytest.mark.parametrize(
    "kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.real) for k in peft_kinds.KINDS]
)
def test_adapters_and_the_cache(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(BackgroundFolder, "seconds_to_load", lambda self, num_bytes: 0.0)
    # In double precision, since some adapters are large and blow rounding up: what is left would be an error.
    plain = tiny.backdrop_model().double()
    inputs = batch(plain)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    unadapted = logits_and_tokens(plain, inputs)
    # What the base model stored must not serve the adapter, neither from memory nor from the folder.
    plain.enable_background_cache(10**8, folder=tmp_path)
    logits_and_tokens(plain, inputs)
    plain.background_cache.folder.flush(30)
    model = peft_kinds.with_adapter(plain.float(), kind).double()  # some are made in single precision only
    plain.disable_background_cache()
    off = logits_and_tokens(model, inputs)
    assert not torch.allclose(off[0][0], unadapted[0][0]), "the adapter does nothing: the test shows nothing"
    plain.enable_background_cache(10**8, folder=tmp_path)
    miss = logits_and_tokens(model, inputs)
    assert torch.equal(miss[1], off[1]) and torch.allclose(miss[0], off[0], atol=1e-4)
    for state in ("hit", "hit again", "folder"):
        if state == "folder":
            plain.background_cache.folder.flush(30)
            plain.enable_background_cache(10**8, folder=tmp_path)
        found = logits_and_tokens(model, inputs)
        assert torch.equal(found[1], off[1]) and torch.equal(found[0], miss[0]), state
