"""Namespaces of the background cache and of matching in threads: a call whose tenant is lost is computed by itself."""

import asyncio
import contextvars
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
import torch
from model_inputs import batch, generate
from transformers import TextIteratorStreamer
from transformers.utils import logging as transformers_logging

from backdrop.processing.background_matching_backdrop import BackgroundMatcher


@pytest.fixture
def model():
    model = tiny.backdrop_model()
    model.enable_background_cache(10**7)
    return model


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def counted(model):
    stats = model.background_cache.stats()
    return sum(stats[name] for name in ("tokens_hits", "tokens_misses", "prefix_hits", "prefix_misses"))


def test_a_thread_started_in_a_scope_stores_nothing_for_everybody(model):
    inputs = batch(model)
    with model.background_cache.scope(bypass=True):
        expected = generate(model, inputs)
    transformers_logging.warning_once.cache_clear()
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("backdrop.modeling.background_cache_backdrop").addHandler(handler)
    with model.background_cache.scope(namespace="tenant-a"):
        for _ in range(2):
            assert torch.equal(in_thread(lambda: generate(model, inputs)), expected)
    assert counted(model) == 0 and not model.background_cache.stats()["entries"]
    assert torch.equal(
        in_thread(lambda: generate(model, inputs)), expected
    )  # the scope is closed, the tenant still lost
    assert counted(model) == 0
    logging.getLogger("backdrop.modeling.background_cache_backdrop").removeHandler(handler)
    assert len(lines) == 1 and "copy_context().run" in lines[0]


def test_the_recipe_takes_the_scope_along(model):
    inputs = batch(model)
    with model.background_cache.scope(namespace="tenant-a"):
        generate(model, inputs)
        context = contextvars.copy_context()
        known = model.background_cache.stats()
        in_thread(lambda: context.run(generate, model, inputs))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(contextvars.copy_context().run, generate, model, inputs).result()
        asyncio.run(asyncio.to_thread(generate, model, inputs))
    stats = model.background_cache.stats()
    assert (
        stats["tokens_hits"] == known["tokens_hits"] + 6 and stats["tokens_misses"] == known["tokens_misses"]
    )


def test_the_streamer_recipe_of_the_guide(model):
    inputs = {name: value[:1] if value.shape[0] == 2 else value[:2] for name, value in batch(model).items()}
    expected = generate(model, inputs)[0].tolist()
    tokenizer = tiny.tokenizer()
    with model.background_cache.scope(namespace="tenant-a"):
        generate(model, inputs)
        hits = model.background_cache.stats()["prefix_hits"]
        streamer = TextIteratorStreamer(tokenizer)
        arguments = {**inputs, "streamer": streamer, "max_new_tokens": 5, "do_sample": False}
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(model.generate,), kwargs=arguments)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == tokenizer.decode(expected)
    assert model.background_cache.stats()["prefix_hits"] == hits + 1


def test_a_thread_may_choose(model):
    inputs = batch(model)
    cache = model.background_cache
    generate(model, inputs)
    with cache.scope(namespace="tenant-a"):
        generate(model, inputs)

    def choose(name):
        with cache.scope(namespace=name):
            generate(model, inputs)

    before = cache.stats()
    in_thread(lambda: choose("tenant-a"))
    in_thread(lambda: choose(""))
    after = cache.stats()
    assert (
        after["tokens_misses"] == before["tokens_misses"]
        and after["prefix_misses"] == before["prefix_misses"]
    )


def test_who_left_a_scope_is_in_the_namespace_without_a_name(model):
    inputs = batch(model)
    with model.background_cache.scope(namespace="tenant-a"):
        generate(model, inputs)
    generate(model, inputs)
    with model.background_cache.scope(bypass=False):
        generate(model, inputs)
    stats = model.background_cache.stats()
    assert stats["tokens_misses"] == 4 and stats["tokens_hits"] == 2


def test_without_names_threads_share_the_cache(model):
    inputs = batch(model)
    generate(model, inputs)
    with model.background_cache.scope(bypass=True):
        in_thread(lambda: generate(model, inputs))
    assert model.background_cache.stats()["prefix_hits"] == 2


@pytest.mark.parametrize(
    "options", [{"namespace": 3}, {"namespace": b"a"}, {"bypass": 1}, {"bypass": "no"}], ids=str
)
def test_what_is_no_namespace_is_named(model, options):
    (name, value), *_ = options.items()
    for scoped in (model.background_cache, BackgroundMatcher(14)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; wanted"), scoped.scope(**options):
            pass


def test_matching_in_a_thread_without_a_scope_uses_and_leaves_nothing():
    matcher = BackgroundMatcher(14)
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    with matcher.scope(namespace="tenant-a"):
        assert in_thread(lambda: matcher.bypassed)
        assert not in_thread(lambda: contextvars.Context().run(lambda: matcher.namespace))
        context = contextvars.copy_context()
        assert in_thread(lambda: context.run(lambda: (matcher.namespace, matcher.bypassed))) == (
            "tenant-a",
            False,
        )
        matcher.add(image, np.ones(16, dtype=bool))
        assert matcher.find(image) is not None
    assert matcher.namespace == "" and not matcher.bypassed and matcher.find(image) is None
