"""Prompts as `inputs_embeds` with images: beams, several sequences, rows with different numbers of images."""

import pytest
import tiny
import torch
from llava_pair import llava_and_backdrop, whole_images
from model_inputs import batch

WAYS = [
    {},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
]


def embedded(model, inputs) -> dict:
    """The same prompt with its ids embedded, placeholders too."""
    inputs = dict(inputs)
    return {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")).detach()}


def without_ids(inputs) -> dict:
    return {name: value for name, value in inputs.items() if name != "input_ids"}


def new_tokens(model, inputs, **options):
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, **options}
    return model.generate(**inputs, **options)[:, start:]


@pytest.mark.parametrize("cached", [False, True], ids=["off", "cache"])
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("rows", [((0, 1), (2, 3)), ((0, 1, 2), (3,)), ((), (0, 1)), ((0,), ())], ids=str)
def test_embedded_prompts_give_the_tokens_of_their_ids(rows, options, cached):
    model = tiny.backdrop_model()
    inputs = batch(model, rows, groups=sum(map(len, rows)))
    expected = new_tokens(model, inputs, **options)
    if cached:
        model.enable_background_cache(max_bytes=10**7)
    prompt = without_ids(embedded(model, inputs))
    for _ in range(2):
        assert torch.equal(new_tokens(model, prompt, **options), expected)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("form", ["ids", "embedded"])
def test_vision_tokens_instead_of_pixels_are_expanded_with_their_rows(form, options):
    model = tiny.backdrop_model()
    inputs = batch(model, ((0, 1, 2), (3,)))
    expected = new_tokens(model, inputs, **options)
    visual = {name: inputs.pop(name) for name in ("pixel_values", "patch_mask", "group_kind")}
    with torch.no_grad():
        tokens = torch.cat(model.get_image_features(**visual).pooler_output)
    if form == "embedded":
        inputs = without_ids(embedded(model, inputs))
    assert torch.equal(new_tokens(model, {**inputs, "image_embeds": tokens}, **options), expected)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_embedded_prompts_with_one_image_each_as_llava(options):
    llava, model = llava_and_backdrop()
    inputs = whole_images([[0], [1]])
    prompts = [without_ids(embedded(which, inputs)) for which in (llava, model)]
    assert torch.equal(new_tokens(model, prompts[1], **options), new_tokens(llava, prompts[0], **options))


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_wrong_number_of_groups_names_the_row(options):
    model = tiny.backdrop_model()
    inputs = batch(model, ((0, 1), (2, 3)))
    inputs["patch_mask"] = inputs["patch_mask"].clone()
    last = inputs["patch_mask"][1].nonzero()[-1]
    inputs["patch_mask"][1, last] = False
    match = r"Image features and image tokens do not match: row 0 has \d+ placeholders"
    for prompt in (inputs, without_ids(embedded(model, inputs))):
        with pytest.raises(ValueError, match=match):
            new_tokens(model, prompt, **options)
