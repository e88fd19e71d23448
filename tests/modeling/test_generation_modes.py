"""Ways of generating: where no prefix may be kept none is, the log says why, and the tokens are the same; the rest as LLaVA.

Off is compared with `LlavaForConditionalGeneration` on the same weights, a miss and a hit with off.
"""

import contextlib
import copy
import logging

import pytest
import tiny
import torch
from model_inputs import batch, inputs_of, row_of
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer, QuantizedCache
from transformers.utils import logging as transformers_logging

ROWS = ((0, 1), (2, 3))


def twins(seed=0, **text):
    """(LLaVA, Backdrop without separators) of the same weights."""
    torch.manual_seed(seed)
    config = tiny.text_config(**text)
    llava = tiny.llava_model(seed, text_config=config)
    model = tiny.backdrop_model(seed, separators=False, text_config=config)
    model.load_state_dict(llava.state_dict())
    return llava, model


def whole_images(images=2, seed=0):
    """Inputs that both take: a row for each image, padded on the left."""
    pixels = torch.randn(images, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(seed))
    rows = [[1, 3, 4] + [tiny.IMAGE_ID] * tiny.PATCHES + [6, 7] + [8] * r for r in range(images)]
    ids, attention = tiny.pad_left(rows)
    return {"input_ids": ids, "attention_mask": attention, "pixel_values": pixels}


def tokens(model, inputs, **options):
    return model.generate(
        **inputs, **{"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8, **options}
    )


def said(caplog, call):
    """What `call` logs about prefixes."""
    transformers_logging.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            call()
    finally:
        transformers_logging.disable_propagation()
    return [record.message for record in caplog.records if "keeps no prefix" in record.message]


def check_no_prefix(model, inputs, expected, caplog, reason, generate=tokens, **options):
    """Miss and hit answer as expected, say once why, and neither store nor load a prefix; vision tokens are reused."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = base.enable_background_cache(10**7)
    found = []
    messages = said(caplog, lambda: found.extend(generate(model, inputs, **options) for _ in range(2)))
    assert all(torch.equal(each, expected) for each in found)
    assert len(messages) == 1 and reason in messages[0]
    stats = cache.stats()
    assert stats["prefix_hits"] == stats["prefix_misses"] == 0 and stats["tokens_hits"]


# ---- virtual tokens put in front


def peft_config(kind):
    import peft

    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    sizes = {"num_layers": 2, "token_dim": 32, "num_attention_heads": 2, "num_transformer_submodules": 1}
    return {
        "prompt tuning": lambda: peft.PromptTuningConfig(**common, **sizes),
        "P-tuning": lambda: peft.PromptEncoderConfig(**common, **sizes, encoder_hidden_size=16),
        "prefix tuning": lambda: peft.PrefixTuningConfig(**common, **sizes),
    }[kind]()


@pytest.mark.parametrize("kind", ["prompt tuning", "P-tuning", "prefix tuning"])
def test_virtual_tokens_in_front_leave_no_prefix(kind, caplog):
    peft = pytest.importorskip("peft")
    llava, model = (peft.get_peft_model(each, peft_config(kind)).eval() for each in twins())
    with torch.no_grad():
        for parameter in llava.prompt_encoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.prompt_encoder.load_state_dict(llava.prompt_encoder.state_dict())
    inputs = whole_images()
    expected = tokens(model, inputs)
    assert torch.equal(expected, tokens(llava, inputs))
    with model.disable_adapter():
        assert not torch.equal(expected, tokens(model, inputs))  # the virtual tokens matter
    check_no_prefix(model, inputs, expected, caplog, "prepare_inputs_for_generation is wrapped")


def test_an_unloaded_prompt_and_a_lora_leave_prefixes_alone():
    peft = pytest.importorskip("peft")
    _, model = twins()
    inputs = whole_images()
    tuned = peft.get_peft_model(model, peft_config("prompt tuning")).eval()
    tokens(tuned, inputs)  # peft puts the method back as an attribute
    expected = tokens(model, inputs)
    model.enable_background_cache(10**7)
    for _ in range(2):
        assert torch.equal(tokens(model, inputs), expected)
    assert model.background_cache.stats()["prefix_hits"] == 2
    adapted = peft.get_peft_model(
        twins()[1], peft.LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    ).eval()
    expected = tokens(adapted, inputs)
    adapted.get_base_model().enable_background_cache(10**7)
    for _ in range(2):
        assert torch.equal(tokens(adapted, inputs), expected)
    assert adapted.get_base_model().background_cache.stats()["prefix_hits"] == 2


# ---- positions that depend on the length

ORIGINAL = 24  # positions; a background of 16 patches ends before it


def rotary(kind):
    if kind == "longrope":
        factors = {
            "short_factor": [1.0] * 4,
            "long_factor": [8.0] * 4,
            "original_max_position_embeddings": ORIGINAL,
        }
        return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **factors}}
    return {
        "rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 8.0},
        "max_position_embeddings": ORIGINAL,
    }


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_leave_no_prefix(kind, caplog):
    llava, model = twins(**rotary(kind))
    inputs = whole_images(1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.full((1, 12), 9)], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = tokens(model, inputs)
    assert torch.equal(expected, tokens(llava, inputs))
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    check_no_prefix(model, inputs, expected, caplog, "rotary frequencies")
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(**model.prepare_prefill(**inputs)).logits[:, -1], logits)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn", "linear", "llama3"])
def test_prompts_within_the_original_length_keep_their_prefix(kind):
    """Also when a longer one came before, which leaves its frequencies behind."""
    if kind in ("dynamic", "longrope"):
        changes = rotary(kind)
    else:
        changes = {
            "rope_parameters": {
                "rope_type": kind,
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 512,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            "max_position_embeddings": 4096,
        }
    _, model = twins(**changes)
    inputs = whole_images(1)  # 21 positions
    longer = {
        name: torch.cat([value, torch.full((1, 12), 1)], 1)
        for name, value in inputs.items()
        if value.ndim == 2
    }
    longer["pixel_values"] = inputs["pixel_values"]
    short = {"max_new_tokens": 3, "min_new_tokens": 3}
    expected = tokens(model, inputs, **short)
    cache = model.enable_background_cache(10**7)
    for _ in range(2):
        assert torch.equal(tokens(model, inputs, **short), expected)
    # LongRoPE writes its frequencies at every pass; where it does no prefix is kept.
    stats = cache.stats()
    assert stats["prefix_hits"] == 1 or (kind == "longrope" and not stats["prefix_misses"])
    tokens(model, longer)
    assert torch.equal(tokens(model, inputs, **short), expected)


# ---- caches that do not hand back what was written


class RoundedLayer(DynamicLayer):
    """Keeps one decimal once it has been written to, as a quantised layer keeps few bits."""

    def update(self, key_states, value_states, *args, **kwargs):
        if self.is_initialized:
            self.keys, self.values = self.keys.mul(10).round() / 10, self.values.mul(10).round() / 10
        return super().update(key_states, value_states, *args, **kwargs)


class ForgetfulLayer(DynamicLayer):
    """Hands back the last 20 positions alone."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys.clone().index_fill_(2, torch.arange(max(0, keys.shape[2] - 20)), 0.0), values


class WatchedLayer(DynamicLayer):
    """An exact one of another name."""


class RoundedCache(DynamicCache):
    """Rounds in the cache instead of in its layers."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys.bfloat16().float(), values


def cache_of(layer, kind=DynamicCache):
    cache = kind()
    cache.layers = [layer() for _ in range(2)]
    cache.layer_class_to_replicate = None
    return cache


@pytest.mark.parametrize(
    "new_cache",
    [lambda: cache_of(RoundedLayer), lambda: cache_of(ForgetfulLayer), lambda: RoundedCache()],
    ids=["rounds", "forgets", "rounds in the cache"],
)
def test_a_cache_that_hands_back_something_else_leaves_no_prefix(new_cache, caplog):
    llava, model = twins()
    inputs = whole_images()

    def generate(model, inputs):
        return tokens(model, inputs, past_key_values=new_cache())

    expected = generate(model, inputs)
    assert torch.equal(expected, generate(llava, inputs))
    check_no_prefix(model, inputs, expected, caplog, "does not hand back", generate)


def test_an_exact_cache_of_another_class_keeps_its_prefix():
    _, model = twins()
    inputs = whole_images()
    torch.manual_seed(3)
    expected = tokens(model, inputs, do_sample=True)
    model.enable_background_cache(10**7)
    for _ in range(2):
        torch.manual_seed(3)  # trying the cache out draws nothing
        found = tokens(model, inputs, do_sample=True, past_key_values=cache_of(WatchedLayer))
        assert torch.equal(found, expected)
    assert model.background_cache.stats()["prefix_hits"] == 2


def test_a_quantized_cache_leaves_no_prefix(caplog):
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    llava, model = twins()
    inputs = whole_images()
    try:
        QuantizedCache(config=model.config, **options["cache_config"])
    except (TypeError, ValueError, ImportError):
        pytest.skip("this transformers has no quantised cache without another package")
    expected = tokens(model, inputs, **options)
    assert torch.equal(expected, tokens(llava, inputs, **options))
    check_no_prefix(model, inputs, expected, caplog, "QuantizedCache", **options)


# ---- drafts


def cached_states(model, call, expected):
    """Off, on a miss and on a hit."""
    assert torch.equal(call(), expected)
    model.enable_background_cache(10**7)
    for _ in range(2):
        assert torch.equal(call(), expected)
    assert model.background_cache.stats()["prefix_hits"]


def test_a_text_model_may_draft():
    llava, model = twins()
    torch.manual_seed(5)
    draft = LlamaForCausalLM(tiny.text_config()).eval()
    inputs = whole_images(1)
    expected = tokens(llava, inputs)
    with contextlib.suppress(ValueError):  # LLaVA of transformers 5.17 hands its pixels to a text model
        assert torch.equal(tokens(llava, inputs, assistant_model=draft), expected)
    cached_states(model, lambda: tokens(model, inputs, assistant_model=draft), expected)


@pytest.mark.parametrize("same", [False, True], ids=["another's weights", "same weights"])
def test_another_backdrop_may_draft(same):
    """With groups, and with a width of its own."""
    model = tiny.backdrop_model()
    draft = (
        tiny.backdrop_model()
        if same
        else tiny.backdrop_model(1, text_config=tiny.text_config(hidden_size=16, num_attention_heads=2))
    )
    draft.enable_background_cache(10**7)
    inputs = row_of(batch(model), 0, (0, 1))
    expected = tokens(model, inputs)
    cached_states(model, lambda: tokens(model, inputs, assistant_model=draft), expected)
    assert draft.background_cache.stats()["prefix_hits"]


def generates_placeholders(model, inputs):
    """Gives the placeholder the place of the second token that the model would generate."""
    taken = int(tokens(model, inputs)[0, inputs["input_ids"].shape[1] + 1])
    rows = torch.tensor([taken, tiny.IMAGE_ID])
    with torch.no_grad():
        model.lm_head.weight[rows] = model.lm_head.weight[rows.flip(0)]


def text_draft(model):
    """The language model alone, as one that drafts for it."""
    draft = LlamaForCausalLM(model.config.text_config).eval()
    draft.model.load_state_dict(model.model.language_model.state_dict())
    draft.lm_head.load_state_dict(model.lm_head.state_dict())
    return draft


@pytest.mark.parametrize("draft", ["prompt lookup", "text", "backdrop"])
@pytest.mark.parametrize("separators", [False, True])
def test_a_placeholder_among_new_tokens_is_text(draft, separators):
    """Drafted from the prompt's own placeholders, and generated: the greedy tokens either way."""
    model = tiny.backdrop_model(separators=separators)
    inputs = row_of(batch(model, separators=separators), 0, (0, 1))
    # Ends as it begins, so that the first lookup proposes what follows: placeholders.
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :4]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    generates_placeholders(model, inputs)
    expected = tokens(model, inputs, max_new_tokens=12)
    assert tiny.IMAGE_ID in expected[0, inputs["input_ids"].shape[1] :]
    options = {
        "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
        "text": lambda: {"assistant_model": text_draft(model)},
        "backdrop": lambda: {"assistant_model": copy.deepcopy(model)},
    }[draft]()
    cached_states(model, lambda: tokens(model, inputs, max_new_tokens=12, **options), expected)


# ---- encoded before, and fed in chunks


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_images_encoded_before(options):
    llava, model = twins()
    inputs = whole_images()
    pixels = inputs.pop("pixel_values")
    expected = tokens(llava, {**inputs, "pixel_values": pixels}, **options)
    for states in ("off", "miss", "hit"):
        if states == "miss":
            model.enable_background_cache(10**7)
        with torch.no_grad():
            encoded = {"image": model.get_image_features(pixels)}
        if options and "mm_encoder_outputs" not in llava.forward.__wrapped__.__code__.co_varnames:
            pytest.skip("this transformers does not repeat encoded images for beams")
        assert torch.equal(tokens(model, inputs, mm_encoder_outputs=encoded, **options), expected)
        with torch.no_grad():
            encoded = {
                "image": model.get_image_features(pixels)
            }  # for beams transformers repeats them in place
            found = model(**inputs, mm_encoder_outputs=encoded).logits
            assert torch.equal(found[:, -1], llava(**inputs, pixel_values=pixels).logits[:, -1])
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        model(**inputs, pixel_values=pixels, mm_encoder_outputs=encoded)
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        tokens(model, inputs, pixel_values=pixels, mm_encoder_outputs=encoded)


@pytest.mark.parametrize("size", [4, 7, 64])
def test_a_prompt_is_fed_in_chunks(size):
    llava, model = twins()
    if "mm_encoder_outputs" not in llava.forward.__wrapped__.__code__.co_varnames:
        pytest.skip("this transformers cannot feed a prompt with images in chunks")
    inputs = whole_images(1)
    expected = tokens(llava, inputs)
    assert torch.equal(tokens(llava, inputs, prefill_chunk_size=size), expected)
    split = tiny.backdrop_model()
    groups = inputs_of([[0, 1], [2, 3]])
    for each, given, wanted in ((model, inputs, expected), (split, groups, tokens(split, groups))):
        assert torch.equal(tokens(each, given, prefill_chunk_size=size), wanted)
        each.enable_background_cache(10**7)
        for _ in range(2):
            assert torch.equal(tokens(each, given, prefill_chunk_size=size), wanted)
        assert each.background_cache.stats()["tokens_hits"]


def test_attention_to_later_positions_leaves_no_prefix(caplog):
    model = tiny.backdrop_model()
    for layer in model.model.language_model.layers:
        layer.self_attn.is_causal = False
    inputs = row_of(
        batch(model), 0, (0, 1)
    )  # without padding, so that torch is told by the flag and not by a mask
    expected = tokens(model, inputs)
    assert not torch.equal(expected, tokens(tiny.backdrop_model(), inputs)), "the flag changes the answer"
    check_no_prefix(model, inputs, expected, caplog, "is_causal")
