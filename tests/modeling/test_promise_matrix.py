"""Contract 7 for every way of generating: off is LLaVA, and the cache changes no answer in any of its states.

The fast suite runs every row in fp32 on one model; the real suite runs all rows on all kinds of models in all dtypes.
"""

import contextlib
import copy
import gc

import pytest
import tiny
import torch
from generation_modes import NEW_TOKENS, ROWS, WITHOUT_MEANING, offered
from model_inputs import batch, row_of, trained_prefusion

from backdrop.modeling.background_folder_backdrop import BackgroundFolder
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

MODELS = {
    "plain": {},
    "prefusion": {"num_prefusion_layers": 2},
    "separate towers": {"separate_vision_towers": True, "separate_projectors": True},
    "no separators": {"separators": False},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {"bf16": 0.25, "fp16": 0.05}  # of logits, between passes of other shapes


@pytest.fixture(autouse=True)
def quick_folder(monkeypatch):
    """On a busy machine computing a tiny model again may be quicker than the disk, and the folder passed over."""
    monkeypatch.setattr(BackgroundFolder, "seconds_to_load", lambda self, num_bytes: 0.0)


def build(name: str, dtype: torch.dtype):
    model = tiny.backdrop_model(**MODELS[name])
    if model.config.num_prefusion_layers:
        trained_prefusion(model)
    return model.to(dtype)


def inputs_for(model, row, seed=0):
    inputs = batch(model, seed=seed, separators=model.config.separator_token_ids is not None)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs if row.rows > 1 else row_of(inputs, 0, (0, 1))


def answer(model, row, inputs):
    """Tokens, and the logits of every step `[n, B, V]` where the mode has them."""
    torch.manual_seed(7)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **row.options(model)}
    if "generation_config" in options:
        options = {"generation_config": options["generation_config"]}
    if row.logits:
        options |= {"return_dict_in_generate": True, "output_logits": True}
    found = model.generate(**inputs, **options)
    if not row.logits:
        return found, None
    return found.sequences, torch.stack(found.logits) if found.logits else None


def same_tokens(found, expected, dtype: str) -> bool:
    """Equal tokens; in half precision they may part where the logits that they were chosen by are equal up to rounding."""
    if torch.equal(found[0], expected[0]):
        return True
    if dtype == "fp32" or expected[1] is None:
        return False
    return torch.allclose(found[1][0].float(), expected[1][0].float(), atol=ROUNDING[dtype], rtol=0)


def states(model, row, inputs, folder):
    """The answer in each state of the cache, by name; "miss" first."""
    # Other pictures under the same masks: transformers keeps a static cache for the next call, and one that a longer prompt
    # has left is longer, which rounds otherwise, in LLaVA too.
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1).contiguous()}
    cache = model.enable_background_cache(10**8, folder=folder)
    yield "miss", answer(model, row, inputs)
    yield "hit", answer(model, row, inputs)
    yield "hit again", answer(model, row, inputs)
    cache.folder.flush(30)
    size = cache.stats()["bytes"]
    model.enable_background_cache(10**8, folder=folder)
    yield "folder", answer(model, row, inputs)
    # Room for one of two pictures: the other evicts what was kept, to the host and beyond.
    model.enable_background_cache(max(size, 1), host_max_bytes=max(size // 2, 1))
    answer(model, row, inputs)
    answer(model, row, other)
    yield "evicted", answer(model, row, inputs)
    model.disable_background_cache()


def check_cell(model_name: str, dtype_name: str, row_name: str, folder) -> None:
    model, row = build(model_name, DTYPES[dtype_name]), ROWS[row_name]
    inputs = inputs_for(model, row)
    if model.config.num_prefusion_layers and row_name == "rounding cache":
        with pytest.raises(ValueError, match="cannot grow"):  # refused by name, cache or not
            answer(model, row, inputs)
        return
    off = answer(model, row, inputs)
    found = dict(states(model, row, inputs, folder))
    for state, value in found.items():
        assert same_tokens(value, off, dtype_name), f"{state}: {value[0].tolist()}, off: {off[0].tolist()}"
        assert torch.equal(value[0], found["miss"][0]), state
        if value[1] is not None:
            assert torch.equal(value[1], found["miss"][1]), (state, (value[1] - found["miss"][1]).abs().max())


def check_off(dtype_name: str, row_name: str) -> None:
    """Everything off: LLaVA's tokens and logits."""
    llava = tiny.llava_model().to(DTYPES[dtype_name])
    model = BackdropForConditionalGeneration(tiny.backdrop_config(separators=False)).eval()
    model.load_state_dict(llava.state_dict())
    model.to(DTYPES[dtype_name])
    row = ROWS[row_name]
    torch.manual_seed(0)
    pixels = torch.randn(row.rows, 3, tiny.SIDE, tiny.SIDE, dtype=model.dtype)
    whole = torch.ones(row.rows, tiny.PATCHES, dtype=torch.bool)
    rows = [[r] for r in range(row.rows)]
    ids, mask = tiny.pad_left(tiny.prompt_ids(rows, whole, [0] * row.rows, separators=False))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    try:
        expected = answer(llava, row, copy.copy(inputs))
    except Exception as error:  # what LLaVA cannot do, this model may do or not
        pytest.skip(f"LLaVA does not have it: {error}")
    found = answer(model, row, inputs)
    assert torch.equal(found[0], expected[0])
    if expected[1] is not None:
        assert torch.equal(found[1], expected[1])


def test_every_way_of_generating_has_a_row():
    covered = {name for row in ROWS.values() for name in row.covers}
    missing = offered() - covered - set(WITHOUT_MEANING)
    assert not missing, (
        f"new in transformers, and in no row of tests/support/generation_modes.py: {sorted(missing)}"
    )
    assert not covered & set(WITHOUT_MEANING)


@pytest.mark.parametrize("row", ROWS)
def test_off_is_llava(row):
    check_off("fp32", row)


@pytest.mark.parametrize("row", ROWS)
def test_cached_equals_uncached(row, tmp_path):
    check_cell("plain", "fp32", row, tmp_path)


@pytest.mark.parametrize("model", [name for name in MODELS if name != "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_model_in_every_dtype(model, dtype, tmp_path):
    check_cell(model, dtype, "greedy", tmp_path)


@pytest.mark.real
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_the_whole_matrix(model, dtype, tmp_path):
    failed = {}
    for row in ROWS:
        try:
            if model == "plain":
                with contextlib.suppress(pytest.skip.Exception):
                    check_off(dtype, row)
            check_cell(model, dtype, row, tmp_path / row.replace(" ", "_"))
        except Exception as error:  # all of them are told
            failed[row] = f"{type(error).__name__}: {error}"
        gc.collect()
    assert not failed, "\n".join(f"{row}: {why}" for row, why in failed.items())
