"""A conversation that goes on from its cache: the new images alone (LLaVA's way), or all of them again."""

import pytest
import tiny
import torch
from llava_pair import llava_and_backdrop, whole_images
from model_inputs import batch, trained_prefusion

TEXT = ((3, 4), (7,))


def second_turn(first_ids, first_mask, rows, mask, kind, separators):
    """Ids and attention mask of both turns; `rows`: groups of the second turn. The turn is padded on its left."""
    more, more_mask = tiny.pad_left(
        [ids[1:] for ids in tiny.prompt_ids(rows, mask, kind, separators, texts=TEXT)]
    )
    answered = first_ids.shape[1] - first_mask.shape[1]
    return (
        torch.cat([first_ids, more], dim=1),
        torch.cat([first_mask, torch.ones(len(rows), answered, dtype=torch.long), more_mask], dim=1),
    )


def generate(model, **inputs):
    return model.generate(**inputs, do_sample=False, return_dict_in_generate=True, pad_token_id=0)


@pytest.mark.parametrize("cached", [False, True], ids=["off", "cache"])
@pytest.mark.parametrize("rows", [[[0]], [[0], [1, 2]], [[0, 1], []]], ids=str)
def test_new_images_alone_as_llava_takes_them(rows, cached):
    llava, model = llava_and_backdrop()
    first = whole_images([[r] for r in range(len(rows))])
    images = max(g for row in rows for g in row) + 1
    whole = torch.ones(images, tiny.PATCHES, dtype=torch.bool)
    pixels = torch.randn(images, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(5))
    if cached:
        model.enable_background_cache(max_bytes=10**7)
    found = []
    for which in (llava, model, model):
        turn = generate(which, **first, max_new_tokens=4, eos_token_id=None)
        ids, mask = second_turn(
            turn.sequences, first["attention_mask"], rows, whole, [0] * images, separators=False
        )
        options = {"input_ids": ids, "attention_mask": mask, "past_key_values": turn.past_key_values}
        answer = generate(which, **options, pixel_values=pixels, max_new_tokens=5, output_logits=True)
        found.append((answer.sequences, torch.stack(answer.logits)))
    for sequences, logits in found[1:]:
        assert torch.equal(sequences, found[0][0])
        torch.testing.assert_close(logits, found[0][1], rtol=0, atol=1e-5)


def select(inputs, groups) -> dict:
    return {name: inputs[name][list(groups)] for name in ("pixel_values", "patch_mask", "group_kind")}


def joined(first, second, rows, more_rows) -> dict:
    """Groups of both turns in the order of their rows."""
    names, parts = ("pixel_values", "patch_mask", "group_kind"), []
    for row, more in zip(rows, more_rows, strict=True):
        parts += [select(first, row), select(second, more)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


@pytest.mark.parametrize("cached", [False, True], ids=["off", "cache"])
@pytest.mark.parametrize(
    ("begun_by", "more_rows", "prefusion"),
    [
        ("generate", ((0, 1), (2, 3)), 1),
        ("generate", ((0, 1, 2, 3), ()), 0),
        ("prepare_prefill", ((0,), (1, 2, 3)), 0),
        ("prepare_prefill", ((0, 1), (2, 3)), 1),
    ],
    ids=str,
)
def test_new_groups_alone_and_all_groups_give_the_whole_conversations_tokens(
    more_rows, begun_by, cached, prefusion
):
    model = tiny.backdrop_model(num_prefusion_layers=prefusion)
    if prefusion:
        trained_prefusion(model)
    rows = ((0, 1), (2, 3))
    first, (pixels, mask, kind) = batch(model, rows), tiny.random_groups(4, seed=9)
    second = {"pixel_values": pixels, "patch_mask": mask, "group_kind": kind}
    every = joined(first, second, rows, more_rows)

    def begin():
        if begun_by == "generate":
            turn = generate(model, **first, max_new_tokens=4, eos_token_id=None)
            return turn.sequences, turn.past_key_values
        prepared = model.prepare_prefill(**first)
        with torch.no_grad():
            return first["input_ids"], model(**prepared).past_key_values

    def ask(visual, past_key_values=None):
        return generate(
            model, input_ids=ids, attention_mask=whole_mask, **visual, max_new_tokens=5,
            past_key_values=past_key_values,
        ).sequences  # fmt: skip

    sequences, _ = begin()
    ids, whole_mask = second_turn(sequences, first["attention_mask"], more_rows, mask, kind, separators=True)
    expected = ask(every)
    if cached:
        model.enable_background_cache(max_bytes=10**7)
    for _ in range(2):
        for visual in (select(second, range(4)), every):
            assert torch.equal(ask(visual, begin()[1]), expected)


@pytest.mark.parametrize("which", [range(3), [0, 1, 2, 3, 3], [0]], ids=str)
def test_a_wrong_number_of_groups_is_refused(which):
    model = tiny.backdrop_model()
    first, (pixels, mask, kind) = batch(model), tiny.random_groups(4, seed=9)
    turn = generate(model, **first, max_new_tokens=4, eos_token_id=None)
    rows = ((0, 1), (2, 3))
    ids, attention = second_turn(turn.sequences, first["attention_mask"], rows, mask, kind, separators=True)
    second = {"pixel_values": pixels, "patch_mask": mask, "group_kind": kind}
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        generate(
            model, input_ids=ids, attention_mask=attention, **select(second, which),
            past_key_values=turn.past_key_values, max_new_tokens=3,
        )  # fmt: skip


@pytest.mark.parametrize("form", ["new", "all"])
def test_vision_tokens_given_instead_of_pixels_go_on_too(form):
    model = tiny.backdrop_model()
    rows = ((0, 1), (2, 3))
    first, (pixels, mask, kind) = batch(model, rows), tiny.random_groups(4, seed=9)
    second = {"pixel_values": pixels, "patch_mask": mask, "group_kind": kind}
    turn = generate(model, **first, max_new_tokens=4, eos_token_id=None)
    ids, attention = second_turn(turn.sequences, first["attention_mask"], rows, mask, kind, separators=True)
    prompt, every = {"input_ids": ids, "attention_mask": attention}, joined(first, second, rows, rows)
    expected = generate(model, **prompt, **every, max_new_tokens=5).sequences
    with torch.no_grad():
        tokens = torch.cat(model.get_image_features(**(second if form == "new" else every)).pooler_output)
    found = generate(
        model, **prompt, image_embeds=tokens, past_key_values=turn.past_key_values, max_new_tokens=5
    )
    assert torch.equal(found.sequences, expected)
