"""Contract 3: what is off is LLaVA, bit for bit."""

import pytest
import tiny
import torch

from backdrop.hub_export.extend import extend_model
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration


@pytest.mark.parametrize("prefusion", [0, 2])
@pytest.mark.parametrize(
    "changes", [{}, {"vision_feature_select_strategy": "full"}, {"vision_feature_layer": [-2, -1]}]
)
def test_off_is_llava_bit_for_bit(changes, prefusion):
    llava = tiny.llava_model(**changes)
    model = BackdropForConditionalGeneration(tiny.backdrop_config(separators=False, **changes)).eval()
    model.load_state_dict(llava.state_dict())
    extend_model(model, num_prefusion_layers=prefusion, separate_vision_towers=True, separate_projectors=True)
    pixels = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    extra = int(changes.get("vision_feature_select_strategy") == "full")
    whole = torch.ones(2, tiny.PATCHES, dtype=torch.bool)
    ids, _ = tiny.pad_left(tiny.prompt_ids([[0], [1]], whole, [0, 0], separators=False, extra=extra))
    with torch.no_grad():
        expected = llava(input_ids=ids, pixel_values=pixels).logits
        assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, expected)
        assert torch.equal(model(input_ids=ids, pixel_values=pixels, patch_mask=whole).logits, expected)
    kwargs = {"input_ids": ids, "pixel_values": pixels, "max_new_tokens": 8, "do_sample": False}
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**kwargs, **options), llava.generate(**kwargs, **options)), options
