"""A prefill as one graph (`torch.compile(fullgraph=True)`), an exported forward pass, and flex attention.

Whole images, as LLaVA takes them, are encoded inside the graph. Groups under masks have lengths that depend on their
values, so their vision tokens are made outside: `get_image_features` or `prepare_prefill`, then one graph.
"""

import pytest
import tiny
import torch
from llava_pair import llava_and_backdrop, whole_images
from model_inputs import batch, trained_prefusion


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_graph(module):
    return torch.compile(module, fullgraph=True, backend="eager")


@pytest.mark.parametrize(("prefusion", "cached"), [(0, False), (1, True)])
@torch.no_grad()
def test_a_prefill_of_whole_images_is_one_graph(prefusion, cached):
    llava, model = llava_and_backdrop()
    if prefusion:
        model = trained_prefusion(tiny.backdrop_model(num_prefusion_layers=1, separators=False))
    inputs = whole_images([[0], [1, 2]])
    expected = model(**inputs).logits
    if not prefusion:
        assert torch.equal(expected, llava(**inputs).logits)
    if cached:
        model.enable_background_cache(max_bytes=10**7)
    compiled = one_graph(model)
    assert torch.equal(compiled(**inputs).logits, expected)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert torch.equal(compiled(**other).logits, model(**other).logits)


@torch.no_grad()
def test_groups_encoded_outside_go_through_one_graph():
    model = trained_prefusion(tiny.backdrop_model(num_prefusion_layers=1))
    inputs = batch(model)
    expected = model(**inputs).logits
    model.enable_background_cache(max_bytes=10**7)
    visual = {name: inputs.pop(name) for name in ("pixel_values", "patch_mask", "group_kind")}
    compiled, from_prefix = one_graph(model), one_graph(model.forward)
    for _ in range(2):
        tokens = torch.cat(model.get_image_features(**visual).pooler_output)
        found = compiled(**inputs, image_embeds=tokens).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        prepared = model.prepare_prefill(**inputs, **visual)
        found = from_prefix(**prepared).logits[:, -1]
        torch.testing.assert_close(found, expected[:, -1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_choice_of_features_and_transformers_arguments_stay_in_the_graph():
    _, model = llava_and_backdrop()
    inputs = whole_images([[0]])
    options = {"vision_feature_layer": -1, "num_items_in_batch": 3, "logits_to_keep": 1, "labels": None}
    assert torch.equal(one_graph(model)(**inputs, **options).logits, model(**inputs, **options).logits)


@pytest.mark.parametrize(("separators", "strict"), [(False, False), (True, True)])
@torch.no_grad()
def test_the_forward_pass_is_exported_as_llavas(separators, strict):
    llava, model = llava_and_backdrop()
    if separators:
        model = tiny.backdrop_model()
    inputs = {**whole_images([[0], [1]]), "use_cache": False}
    program = torch.export.export(model, (), inputs, strict=strict)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert torch.equal(program.module()(**other).logits, model(**other).logits)
    if not separators:
        assert torch.equal(program.module()(**inputs).logits, llava(**inputs).logits)


@pytest.mark.parametrize(("tower", "cached"), [("clip", True), ("siglip", False), ("dinov2", False)])
@torch.no_grad()
def test_flex_attention_equals_eager(tower, cached):
    model = trained_prefusion(tiny.backdrop_model(tower=tower, num_prefusion_layers=1))
    inputs = batch(model)
    model.set_attn_implementation("eager")
    real = inputs[
        "attention_mask"
    ].bool()  # at padding nothing is attended to, and every kernel has a filler of its own
    logits = model(**inputs).logits[real]
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("flex_attention")
    assert model.config.vision_config._attn_implementation == "flex_attention"
    if cached:
        model.enable_background_cache(max_bytes=10**7)
    with torch.compiler.set_stance(
        "force_eager"
    ):  # transformers compiles flex attention, which takes a minute here
        for _ in range(1 + cached):
            torch.testing.assert_close(model(**inputs).logits[real], logits, rtol=0, atol=2e-5)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    if cached:
        assert model.background_cache.stats()["prefix_hits"] > 0


@torch.no_grad()
def test_a_wrong_number_of_tokens_is_refused_outside_a_graph_as_before():
    _, model = llava_and_backdrop()
    inputs = whole_images([[0], [1]])
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    with pytest.raises(
        ValueError, match="Image features and image tokens do not match, tokens: 32, features 16"
    ):
        model(**inputs)
