"""Generation: its ways agree with and without caches; images keep to their rows; separators stay out."""

import pytest
import tiny
import torch
from model_inputs import batch, row_of, trained_prefusion


@pytest.mark.parametrize("prefusion", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"do_sample": True, "temperature": 0.7},
    ],
    ids=str,
)
def test_cached_generation_equals_uncached_generation(options, prefusion):
    model = tiny.backdrop_model(num_prefusion_layers=prefusion)
    if prefusion:
        trained_prefusion(model)
    inputs = batch(model)
    arguments = {"max_new_tokens": 6, "do_sample": False, **options}
    torch.manual_seed(7)
    expected = model.generate(**inputs, **arguments)
    model.enable_background_cache(max_bytes=10**7)
    for _ in range(2):
        torch.manual_seed(7)
        assert torch.equal(model.generate(**inputs, **arguments), expected)
    stats = model.background_cache.stats()
    # Without a cache every step encodes the images again, and the background cache has them.
    assert stats["tokens_hits"] == 2 if options.get("use_cache", True) else stats["tokens_hits"] > 2
    if options.get("use_cache", True):
        assert stats["prefix_hits"] == 2
    model.disable_background_cache()
    assert model.background_cache is None


def test_several_images_in_a_row_keep_their_order_under_beams():
    """Stock expansion would hand the second row the first row's images."""
    model = tiny.backdrop_model()
    inputs = batch(model, ((0, 1, 2), (3, 4)), groups=5)
    together = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=4)
    for r, groups in enumerate(((0, 1, 2), (3, 4))):
        single = row_of(inputs, r, groups)
        alone = model.generate(**single, max_new_tokens=6, do_sample=False, num_beams=4)
        new = alone[0, single["input_ids"].shape[1] :]
        assert torch.equal(together[r, -len(new) :], new) or torch.equal(
            together[r, inputs["input_ids"].shape[1] :][: len(new)], new
        )


def test_a_cached_conversation_goes_on_with_the_rest_of_its_images():
    model = tiny.backdrop_model()
    inputs = row_of(batch(model), 0, (0, 1))
    first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    pixels, mask, kind = tiny.random_groups(2, seed=9)
    more = tiny.prompt_ids([[0, 1]], mask, kind, texts=((3,), (7,)))[0][1:]
    ids = torch.cat([first.sequences, torch.tensor([more])], dim=1)
    visual = {
        "pixel_values": torch.cat([inputs["pixel_values"], pixels]),
        "patch_mask": torch.cat([inputs["patch_mask"], mask]),
        "group_kind": torch.cat([inputs["group_kind"], kind]),
    }
    whole = model.generate(input_ids=ids, **visual, max_new_tokens=5, do_sample=False)
    going_on = model.generate(
        input_ids=ids, **visual, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False
    )
    assert torch.equal(going_on, whole)


def test_prompt_lookup_decoding_gives_the_greedy_tokens():
    model = tiny.backdrop_model(num_prefusion_layers=1)
    trained_prefusion(model)
    inputs = row_of(batch(model), 0, (0, 1))
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2), expected
    )


def test_separators_are_never_generated():
    model = tiny.backdrop_model()
    with torch.no_grad():
        model.lm_head.weight[tiny.SEPARATOR_IDS] *= 1000
    inputs = batch(model)
    with torch.no_grad():
        favourite = model(**inputs).logits[:, -1].argmax(-1)
    assert set(favourite.tolist()) & set(tiny.SEPARATOR_IDS)
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        new = model.generate(**inputs, max_new_tokens=6, **{"do_sample": False, **options})[
            :, inputs["input_ids"].shape[1] :
        ]
        assert not set(new.flatten().tolist()) & set(tiny.SEPARATOR_IDS)
