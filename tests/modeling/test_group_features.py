"""Vision tokens of groups: bad groups, raster order, attention without a mask."""

import pytest
import tiny
import torch
from model_inputs import batch, generate


def test_bad_groups_are_named():
    model = tiny.backdrop_model()
    good = batch(model)
    cases = [
        (
            {"pixel_values": torch.zeros(4, 3, 28, 28)},
            r"pixel_values is \(4, 3, 28, 28\); wanted \(groups, 3, 56, 56\)",
        ),
        ({"patch_mask": torch.ones(4, 9, dtype=torch.bool)}, r"patch_mask is \(4, 9\); wanted \(4, 16\)"),
        ({"group_kind": torch.tensor([0, 1, 2, 0])}, r"group_kind is \[0, 1, 2, 0\]; wanted 4 values"),
        ({"patch_mask": torch.zeros(4, 16, dtype=torch.bool)}, r"groups \[0, 1, 2, 3\] own no patch"),
        ({"pixel_values": None}, r"image placeholders, but no pixel_values"),
        (
            {"patch_mask": torch.ones(4, 16, dtype=torch.bool)},
            r"Image features and image tokens do not match",
        ),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**{**good, **change})
    with pytest.raises(ValueError, match="row 0 has"):
        model.generate(**{**good, "input_ids": good["input_ids"].flip(0)}, max_new_tokens=1, num_beams=2)


def test_an_untrained_split_warns_once(caplog):
    import logging

    from transformers.utils import logging as transformers_logging

    model = tiny.backdrop_model(trained_on_groups=False)
    transformers_logging.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        model(**batch(model))
        model(**batch(model))
    said = [record for record in caplog.records if "not finetuned on patch groups" in record.message]
    transformers_logging.disable_propagation()
    assert len(said) == 1


def test_raster_order_puts_tokens_back_into_the_grid():
    pixels, mask, kinds = tiny.random_groups(4)
    mask[1], mask[3] = ~mask[0], ~mask[2]
    plain = tiny.backdrop_model(separators=False)
    raster = tiny.backdrop_model(separators=False, raster_order=True)
    apart = plain.model.get_image_features(pixels, mask, kinds).pooler_output
    ordered = raster.model.get_image_features(pixels, mask, kinds).pooler_output
    assert [len(group) for group in ordered] == [len(group) for group in apart]
    for first in (0, 2):
        grid = torch.zeros(tiny.PATCHES, apart[0].shape[1])
        for g in (first, first + 1):
            grid[mask[g]] = apart[g]
        assert torch.equal(torch.cat(ordered[first : first + 2]), grid)
    # Two images, not two groups of one: they stay as they are.
    both = torch.ones_like(mask[:2])
    one, two = (
        m.model.get_image_features(pixels[:2], both, kinds[:2]).pooler_output for m in (plain, raster)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_unmasked_attention_sees_the_whole_group_image_and_still_caches():
    pixels, mask, kinds = tiny.random_groups(3)
    model = tiny.backdrop_model(masked_attention=False)
    with torch.no_grad():
        found = model.model.get_image_features(pixels, mask, kinds).pooler_output
        whole = model.model.get_image_features(pixels, None, kinds).pooler_output
        for g in range(3):
            torch.testing.assert_close(found[g], whole[g][mask[g]], atol=1e-5, rtol=1e-4)
        model.enable_background_cache(max_bytes=2**20)
        for _ in range(2):
            again = model.model.get_image_features(pixels, mask, kinds).pooler_output
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, found, strict=True))
    assert model.background_cache.stats()["vision_tokens_reused"] > 0


def test_one_background_twice_in_a_batch_is_encoded_once():
    model = tiny.backdrop_model()
    inputs = batch(model)
    for name in ("pixel_values", "patch_mask"):
        inputs[name][2] = inputs[name][0]
    ids, attention = tiny.pad_left(
        tiny.prompt_ids([[0, 1], [2, 3]], inputs["patch_mask"], inputs["group_kind"])
    )
    inputs |= {"input_ids": ids, "attention_mask": attention}
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)
    assert torch.equal(generate(model, inputs), expected)
    stats = model.background_cache.stats()
    assert stats["tokens_misses"] == 1 and stats["entries"] == 2
    assert stats["vision_tokens_reused"] == int(inputs["patch_mask"][0].sum())
