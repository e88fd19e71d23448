"""Arguments of a forward pass: LLaVA's choice of features works and is in the keys; what nobody takes is refused by name."""

import pytest
import tiny
import torch
from llava_pair import llava_and_backdrop, whole_images
from model_inputs import batch, row_of, trained_prefusion
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CHOICES = [
    {"vision_feature_layer": -1},
    {"vision_feature_layer": -4},  # the embeddings; stock LLaVA trips over 0
    {"vision_feature_layer": [1]},
    {"vision_feature_select_strategy": "full"},
    {"vision_feature_layer": -3, "vision_feature_select_strategy": "full"},
]


def of(choice) -> dict:
    """Whole images with as many placeholders as the choice gives tokens."""
    extra = int(choice.get("vision_feature_select_strategy") == "full")
    return whole_images([[0], [1]], extra=extra)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_calls_choice_of_features_is_llavas(choice):
    llava, model = llava_and_backdrop()
    inputs = of(choice)
    with torch.no_grad():
        assert torch.equal(model(**inputs, **choice).logits, llava(**inputs, **choice).logits)
        features = [
            m.get_image_features(inputs["pixel_values"], **choice).pooler_output for m in (model, llava)
        ]
        assert torch.equal(torch.stack(list(features[0])), torch.stack(list(features[1])))
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        found, expected = (
            m.generate(**inputs, **choice, **options, max_new_tokens=5, do_sample=False)
            for m in (model, llava)
        )
        assert torch.equal(found, expected), options


@torch.no_grad()
def test_choices_do_not_share_what_is_cached():
    _, model = llava_and_backdrop()
    choices = [{}, *CHOICES]
    expected = [(model(**of(choice), **choice).logits, generated(model, choice)) for choice in choices]
    model.enable_background_cache(max_bytes=10**7)
    for _ in range(2):
        for choice, (logits, tokens) in zip(choices, expected, strict=True):
            torch.testing.assert_close(model(**of(choice), **choice).logits, logits, rtol=0, atol=1e-5)
            assert torch.equal(generated(model, choice), tokens)
            prepared = model.prepare_prefill(**of(choice), **choice)
            last = model(**prepared).logits[:, -1]
            torch.testing.assert_close(last, logits[:, -1], rtol=0, atol=1e-5)
    assert model.background_cache.stats()["tokens_hits"] > 0


def generated(model, choice):
    return model.generate(**of(choice), **choice, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("choice", CHOICES[:3], ids=str)
@torch.no_grad()
def test_a_choice_reaches_groups_of_both_kinds(choice):
    model = tiny.backdrop_model()
    inputs = batch(model)
    layer = choice["vision_feature_layer"]
    other = tiny.backdrop_model(vision_feature_layer=layer)
    assert torch.equal(model(**inputs, **choice).logits, other(**inputs).logits)
    assert not torch.equal(model(**inputs).logits, other(**inputs).logits)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"vision_feature_layer": 9}, "vision_feature_layer is 9; the tower has 3 layers"),
        ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer is \[-1, -2\]; wanted 1"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is 'cls'; wanted"),
    ],
    ids=str,
)
def test_a_choice_that_cannot_work_is_refused(choice, message):
    _, model = llava_and_backdrop()
    for call in (model, model.generate, model.model, model.prepare_prefill):
        with pytest.raises(ValueError, match=message):
            call(**whole_images([[0]]), **choice)


@pytest.mark.parametrize(
    "argument",
    [
        {"vision_feature_layers": -1},
        {"pixel_mask": torch.ones(1)},
        {"image_sizes": torch.ones(1, 2)},
        {"tempreature": 1},
    ],
    ids=str,
)
def test_what_nobody_takes_is_refused_by_name(argument):
    model = tiny.backdrop_model()
    inputs = row_of(batch(model), 0, (0, 1))
    (name,) = argument
    visual = {k: inputs[k] for k in ("pixel_values", "patch_mask", "group_kind")}
    for call, given in (
        (model, inputs),
        (model.model, inputs),
        (model.get_image_features, visual),
        (model.prepare_prefill, inputs),
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            call(**given, **argument)
    with pytest.raises(ValueError, match=name):
        model.generate(**inputs, **argument)


def test_hidden_states_of_the_tower_are_refused_not_dropped():
    model = tiny.backdrop_model()
    pixels = batch(model)["pixel_values"]
    for name in ("output_hidden_states", "output_attentions"):
        model.get_image_features(pixels, **{name: False})
        with pytest.raises(TypeError, match=name):
            model.get_image_features(pixels, **{name: True})


def test_what_transformers_and_trl_send_is_taken():
    """`num_items_in_batch` and `shift_labels` of the Trainer, flags of generation, None for what is not there."""
    llava, model = llava_and_backdrop()
    inputs = whole_images([[0], [1]])
    labels = inputs["input_ids"].clone()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    for options in (
        {"num_items_in_batch": torch.tensor(7)},
        {"num_items_in_batch": 3, "output_router_logits": True},
        {"ignore_index": 5},
        {"shift_labels": shifted},
        {"output_hidden_states": True, "output_attentions": True},
        {"cu_seq_lens_q": None, "token_type_ids": None, "image_sizes": None, "return_dict": True},
    ):
        found, expected = (m(**inputs, labels=labels, **options) for m in (model, llava))
        torch.testing.assert_close(found.loss, expected.loss)
        assert (found.hidden_states is None) == (expected.hidden_states is None)


def test_what_an_attention_function_names_is_taken(monkeypatch):
    """Engines and users register attention functions with arguments of their own."""
    seen = []

    def counting(module, query, key, value, attention_mask, tally=None, **kwargs):
        seen.append(tally)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("counting", counting)
    model = tiny.backdrop_model()
    inputs = batch(model)
    with torch.no_grad():
        model.config.text_config._attn_implementation = "counting"
        model(**inputs, tally="here")
        assert seen == ["here"] * model.config.text_config.num_hidden_layers
        with pytest.raises(TypeError, match="unexpected keyword argument 'talley'"):
            model(**inputs, talley="here")


def test_packed_rows_reach_prefusion_too():
    """Where sequences of a packed row begin concerns every layer of the decoder."""
    seen = []

    def noting(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs.get("cu_seq_lens_q"))
        kwargs = {k: v for k, v in kwargs.items() if not k.startswith(("cu_", "max_length"))}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("noting", noting)
    model = trained_prefusion(tiny.backdrop_model(num_prefusion_layers=1))
    model.config.text_config._attn_implementation = "noting"
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    with torch.no_grad():
        model(
            input_ids=torch.arange(3, 12)[None], cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=5,
            max_length_k=5,
        )  # fmt: skip
    assert len(seen) == 3
    assert all(borders is found for found in seen)
