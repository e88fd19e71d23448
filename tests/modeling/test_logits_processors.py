"""What a user forbids stays forbidden beside the separators, and every form of `generate` that transformers has is taken."""

import pytest
import tiny
import torch
from llava_pair import llava_and_backdrop, whole_images
from model_inputs import batch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

BANNED = list(range(3, 60))
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 1},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}
FORMS = {
    "keyword": lambda **options: {"suppress_tokens": BANNED, **options},
    "configuration": lambda **options: {
        "generation_config": GenerationConfig(suppress_tokens=BANNED, pad_token_id=0, **options)
    },
    "processor": lambda **options: {
        "logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor(BANNED)]),
        **options,
    },
    "list": lambda **options: {"logits_processor": [SuppressTokensLogitsProcessor(BANNED)], **options},
}


def eager_for(model, tokens):
    """A head that would say these tokens first."""
    with torch.no_grad():
        model.lm_head.weight[tokens] *= 50
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_suppressed_is_neither_generated_nor_makes_separators_possible(form, way):
    model = eager_for(tiny.backdrop_model(), [*BANNED, *tiny.SEPARATOR_IDS])
    inputs = batch(model)
    if way == "prompt lookup":
        inputs = batch(model, ((0, 1),), groups=2)
    torch.manual_seed(0)
    new = model.generate(**inputs, **FORMS[form](max_new_tokens=6, **WAYS[way]))
    new = new[:, inputs["input_ids"].shape[1] :]
    assert not set(new.flatten().tolist()) & {*BANNED, *tiny.SEPARATOR_IDS}


def test_the_models_own_generation_configuration_counts():
    model = eager_for(tiny.backdrop_model(), BANNED)
    model.generation_config.suppress_tokens = BANNED
    inputs = batch(model)
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert not set(new.flatten().tolist()) & set(BANNED)


class AllBut(LogitsProcessor):
    """Scores that want one token alone."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        wanted = torch.zeros_like(scores)
        wanted[:, self.token] = 1e9
        return wanted


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 1}], ids=str)
def test_a_processor_of_the_users_cannot_bring_separators_back(options):
    model = tiny.backdrop_model()
    inputs = batch(model)
    processors = LogitsProcessorList([AllBut(tiny.SEPARATOR_IDS[0])])
    new = model.generate(**inputs, max_new_tokens=3, logits_processor=processors, **options)
    assert not set(new[:, inputs["input_ids"].shape[1] :].flatten().tolist()) & set(tiny.SEPARATOR_IDS)
    assert len(processors) == 1  # the user's list is the user's


def positional(length: int) -> dict:
    def allowed(row, ids):
        return list(range(20, 60))

    return {
        "configuration": (GenerationConfig(max_new_tokens=5, pad_token_id=0),),
        "processors": (
            GenerationConfig(max_new_tokens=5, pad_token_id=0),
            LogitsProcessorList([SuppressTokensLogitsProcessor(BANNED)]),
        ),
        "criteria": (
            GenerationConfig(pad_token_id=0, suppress_tokens=BANNED),
            None,
            StoppingCriteriaList([MaxLengthCriteria(length + 4)]),
        ),
        "allowed": (
            GenerationConfig(max_new_tokens=5, pad_token_id=0),
            LogitsProcessorList(),
            None,
            allowed,
            False,
            None,
            None,
        ),
    }


@pytest.mark.parametrize("form", positional(0))
def test_generate_takes_what_llavas_takes_by_position(form):
    llava, model = llava_and_backdrop()
    inputs = whole_images([[0], [1]])
    ids = inputs.pop("input_ids")
    arguments = positional(ids.shape[1])[form]
    expected = llava.generate(ids, *arguments, **inputs)
    assert torch.equal(model.generate(ids, *arguments, **inputs), expected)
    with_separators = eager_for(tiny.backdrop_model(), tiny.SEPARATOR_IDS)
    inputs = batch(with_separators)
    ids = inputs.pop("input_ids")
    new = with_separators.generate(ids, *positional(ids.shape[1])[form], **inputs)[:, ids.shape[1] :]
    assert not set(new.flatten().tolist()) & set(tiny.SEPARATOR_IDS)


def test_continuous_batching_suppresses_too():
    model = tiny.backdrop_model()
    scores = torch.zeros(2, tiny.VOCAB)
    processors = model._get_logits_processor(GenerationConfig(do_sample=False))
    found = processors(torch.zeros(2, 1, dtype=torch.long), scores)
    assert found[:, tiny.SEPARATOR_IDS].isneginf().all()
    assert found[:, :90].isfinite().all()
