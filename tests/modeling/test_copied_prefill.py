"""The keys and values of `prepare_prefill` copied and pickled: prefilled once, branched many times."""

import copy
import io
import pickle
import threading

import pytest
import tiny
import torch
from model_inputs import batch


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, through_pickle, through_a_file]


@pytest.fixture(params=[False, True], ids=["plain", "captured"])
def prefill(request):
    model = tiny.backdrop_model()
    rows, groups = (((0, 1),), 2) if request.param else (((0, 1), (2, 3)), 4)
    inputs = batch(model, rows, groups=groups)
    model.enable_background_cache(10**7)
    if request.param:
        model.compile_reuse(capture=False)
    model.prepare_prefill(**inputs)
    return model, inputs


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_answers_alike_and_by_itself(prefill, copied):
    model, inputs = prefill
    with torch.no_grad():
        expected = model(**model.prepare_prefill(**inputs)).logits
        prepared = model.prepare_prefill(**inputs)
        branches = [copied(prepared) for _ in range(2)]
        for layer in branches[1]["past_key_values"].layers:
            layer.keys.zero_()  # a copy is its owner's to write to
        for branch in (branches[0], prepared):
            assert torch.allclose(model(**branch).logits, expected, atol=1e-5)
        assert torch.allclose(model(**model.prepare_prefill(**inputs)).logits, expected, atol=1e-5)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_what_was_run_goes_on(prefill, copied):
    """The prompt once, then several continuations of it, as in transformers' own recipe."""
    model, inputs = prefill
    with torch.no_grad():
        first = model(**model.prepare_prefill(**inputs))
        step = first.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], dim=-1)
        position = inputs["attention_mask"].sum(-1, keepdim=True)
        found = [
            model(
                step,
                attention_mask=mask,
                position_ids=position,
                past_key_values=copied(first.past_key_values),
            )
            for _ in range(2)
        ]
        expected = model(
            step, attention_mask=mask, position_ids=position, past_key_values=first.past_key_values
        )
    for branch in found:
        assert torch.equal(branch.logits, expected.logits)


def test_a_copy_holds_no_entry_and_no_lock(prefill):
    model, inputs = prefill
    prepared = model.prepare_prefill(**inputs)
    entries = model.background_cache.device_tier.entries.values()
    pins = [entry.pins for entry in entries]
    assert any(pins)
    branch = copy.deepcopy(prepared["past_key_values"])
    assert [entry.pins for entry in entries] == pins
    lock, done, release = model.background_cache._lock, [], branch.background_lease.release
    with lock:  # held here: releasing the copy's lease elsewhere does not wait for it
        thread = threading.Thread(target=lambda: done.append(release()))
        thread.start()
        thread.join(5)
    assert done == [None]
    branch = release = None
    assert [entry.pins for entry in entries] == pins
    del prepared
    assert not any(entry.pins for entry in entries)
