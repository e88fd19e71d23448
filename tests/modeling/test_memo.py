"""The memo: cached equals uncached, several backgrounds, tiers, leases, faults."""

import shutil
import tempfile
import threading
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from red_square import scene

import backdrop.modeling.background_cache_backdrop as cache_module
from backdrop.modeling.background_cache_backdrop import BackgroundCache
from backdrop.modeling.background_folder_backdrop import BackgroundFolder
from backdrop.modeling.weights_key_backdrop import weights_digest, weights_fingerprint


def inputs_of(layout, seed: int = 0, texts=None, kinds=None) -> dict:
    """Rows of group indices -> model inputs, padded on the left; group g is background where `kinds[g]` is 0."""
    groups = max([g for row in layout for g in row], default=-1) + 1
    pixels, mask, kind = tiny.random_groups(max(groups, 1), seed=seed)
    if kinds is not None:
        kind = torch.tensor(kinds)
    rows = tiny.prompt_ids(layout, mask, kind)
    for row, text in zip(rows, texts or [()] * len(rows), strict=True):
        row.extend(text)
    ids, attention = tiny.pad_left(rows)
    inputs = {"input_ids": ids, "attention_mask": attention}
    return inputs | ({"pixel_values": pixels, "patch_mask": mask, "group_kind": kind} if groups else {})


def generate(model, inputs, **options):
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)


# ---- cached = uncached


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 1000),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(10, 40), max_size=6), min_size=3, max_size=3),
    st.sampled_from([0, 2]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 1), min_size=9, max_size=9),
)
def test_cached_equals_uncached(seed, sizes, texts, prefusion, separate, separators, kinds):
    """Random images, masks, batches, prompts; prefusion on and off, shared and separate towers."""
    layout, g = [], 0
    for size in sizes:
        layout.append(list(range(g, g + size)))
        g += size
    model = tiny.backdrop_model(
        num_prefusion_layers=prefusion,
        separate_vision_towers=separate,
        separate_projectors=separate,
        separators=separators,
    )
    with torch.no_grad():
        for parameter in model.model.prefusion.parameters() if prefusion else ():
            parameter.add_(0.02 * torch.randn_like(parameter))
    # Groups of one row stand in order, backgrounds before objects or not: both must work.
    inputs = inputs_of(layout, seed, texts[: len(layout)], kinds[: max(g, 1)])
    if not separators:
        inputs["input_ids"][inputs["input_ids"] > tiny.IMAGE_ID] = 7
    expected = generate(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    model.enable_background_cache(10**7)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
        with torch.no_grad():
            prepared = model.prepare_prefill(**inputs)
            assert torch.allclose(model(**prepared).logits[:, -1], logits, atol=1e-5)
    # Another question, other objects, the same backgrounds.
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] = 35
    if g:
        other["pixel_values"] = inputs["pixel_values"].clone()
        other["pixel_values"][inputs["group_kind"] == 1] += 1
    found = generate(model, other)
    with model.background_cache.scope(bypass=True):
        assert torch.equal(found, generate(model, other))
    assert torch.equal(generate(model, inputs), expected)


def test_prepare_prefill_leaves_out_what_is_known():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    whole = model.prepare_prefill(**inputs)
    assert torch.equal(whole["input_ids"], inputs["input_ids"])
    model.enable_background_cache(10**7)
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        for _ in range(2):
            prepared = model.prepare_prefill(**inputs)
            outputs = model(**prepared)
    known = int(inputs["patch_mask"][0].sum())
    assert prepared["input_ids"].shape[1] <= inputs["input_ids"].shape[1] - known
    assert torch.allclose(outputs.logits[:, -1], expected, atol=1e-5)
    assert outputs.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    assert model.background_cache.stats()["prefix_hits"] == 1


def test_several_leading_backgrounds_are_each_reused():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1, 2]], kinds=[0, 0, 1])
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)
    assert torch.equal(generate(model, inputs), expected)
    before = model.background_cache.stats()
    assert (before["tokens_misses"], before["prefix_misses"]) == (2, 2)
    assert torch.equal(generate(model, inputs), expected)
    after = model.background_cache.stats()
    assert (after["tokens_hits"], after["prefix_hits"]) == (2, 2)
    # The second one changes: the first is still a hit.
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][1] += 1
    generate(model, changed)
    stats = model.background_cache.stats()
    assert (stats["prefix_hits"], stats["prefix_misses"]) == (3, 3)
    # The first one changes: the second's keys and values depend on it, its vision tokens do not.
    changed["pixel_values"] = inputs["pixel_values"].clone()
    changed["pixel_values"][0] += 1
    found = generate(model, changed)
    stats = model.background_cache.stats()
    assert (stats["prefix_hits"], stats["prefix_misses"], stats["tokens_hits"]) == (3, 5, 4)
    model.disable_background_cache()
    assert torch.equal(found, generate(model, changed))


def test_a_row_without_an_image_does_not_spoil_the_batch():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1], [], [2, 3]], texts=[(10, 11), (12,) * 30, (13,)])
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
    assert model.background_cache.stats()["prefix_hits"] == 2


def test_two_questions_from_one_prefix_do_not_disturb_each_other():
    model = tiny.backdrop_model()
    first, second = inputs_of([[0, 1]], texts=[(20, 21)]), inputs_of([[0, 1]], texts=[(30, 31, 32)])
    with torch.no_grad():
        expected = [model(**inputs).logits[:, -1] for inputs in (first, second)]
        model.enable_background_cache(10**7)
        prepared = [model.prepare_prefill(**inputs) for inputs in (first, second)]
        found = [model(**inputs).logits[:, -1] for inputs in prepared]
        # Decoding goes on in turns.
        caches = [inputs["past_key_values"] for inputs in prepared]
        for step in (40, 41):
            for inputs, cache in zip((first, second), caches, strict=True):
                token = torch.tensor([[step]])
                inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                last = model(
                    input_ids=token, attention_mask=inputs["attention_mask"], past_key_values=cache
                ).logits[:, -1]
                with model.background_cache.scope(bypass=True):
                    assert torch.allclose(last, model(**inputs).logits[:, -1], atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_later_turns_of_a_conversation_reuse_the_background(chat_model, processor):
    import transformers

    pipe = transformers.pipeline("image-text-to-text", model=chat_model, processor=processor)
    image = scene(14, 14)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}
    ]
    longer = [
        *chat,
        {"role": "assistant", "content": [{"type": "text", "text": "a bus"}]},
        {"role": "user", "content": [{"type": "text", "text": "red?"}]},
    ]
    expected = [
        pipe(text=c, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1] for c in (chat, longer)
    ]
    chat_model.enable_background_cache(10**7)
    found = [pipe(text=c, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1] for c in (chat, longer)]
    assert found == expected
    stats = chat_model.background_cache.stats()
    assert stats["prefix_hits"] == 1 == stats["tokens_hits"] and stats["seconds_saved"] > 0


def test_vision_tokens_alone_where_prefixes_are_off():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    expected = generate(model, inputs)
    model.enable_background_cache(10**7, prefixes=False)
    for _ in range(2):
        assert torch.equal(generate(model, inputs), expected)
    stats = model.background_cache.stats()
    assert stats["tokens_hits"] == 1 and stats["prefix_hits"] == stats["prefix_misses"] == 0


# ---- weights


def test_the_fingerprint_sees_hooks_and_returns_with_the_state():
    model = tiny.backdrop_model()
    before = weights_fingerprint(model)
    assert weights_fingerprint(model) == before
    handle = model.model.vision_tower.register_forward_hook(lambda *args: None)
    assert weights_fingerprint(model) != before
    handle.remove()
    assert weights_fingerprint(model) == before
    model.model.language_model.layers[0].register_buffer("extra", torch.ones(3))
    assert weights_fingerprint(model) != before


def test_the_digest_is_of_every_byte_and_the_same_in_equal_models():
    model, twin = tiny.backdrop_model(), tiny.backdrop_model()
    assert weights_digest(model) == weights_digest(twin)
    twin.model.vision_tower.encoder.layers[0].mlp.fc1.weight.data.view(-1)[123] += 1e-6
    assert weights_digest(model) != weights_digest(twin)


def test_language_model_adapters_keep_vision_tokens():
    from peft import LoraConfig, get_peft_model

    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    adapted = get_peft_model(
        model, LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=4, init_lora_weights=False)
    ).eval()
    model.enable_background_cache(10**7)
    generate(adapted, inputs)
    with adapted.disable_adapter():
        generate(adapted, inputs)
    stats = model.background_cache.stats()
    assert stats["tokens_hits"] == 1 and (stats["prefix_hits"], stats["prefix_misses"]) == (0, 2)


# ---- leases


def test_an_entry_in_use_is_not_evicted_and_the_budget_holds():
    cache = BackgroundCache(100)
    lease = cache.lease()
    cache.put("tokens", b"a" * 20, (torch.zeros(15),), lease=lease)
    cache.put("tokens", b"b" * 20, (torch.zeros(15),))  # 60 + 60 > 100, and a is in use
    assert cache.get("tokens", b"b" * 20) is None and cache.get("tokens", b"a" * 20) is not None
    assert cache.stats()["bytes"] == 60
    lease.release()
    lease.release()
    cache.put("tokens", b"b" * 20, (torch.zeros(15),))
    assert cache.get("tokens", b"a" * 20) is None and cache.get("tokens", b"b" * 20) is not None


def test_a_prefill_gives_its_entries_up():
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    model.enable_background_cache(10**7)

    def pinned():
        return sum(entry.pins for entry in model.background_cache.device_tier.entries.values())

    generate(model, inputs)
    assert pinned() == 0
    prepared = model.prepare_prefill(**inputs)
    assert pinned() == 1
    with torch.no_grad():
        model(**prepared)
    assert pinned() == 0
    prepared = model.prepare_prefill(**inputs)
    del prepared  # never run
    assert pinned() == 0


# ---- tiers


def test_what_is_evicted_comes_back_from_the_host():
    model = tiny.backdrop_model()
    first, second = inputs_of([[0, 1]], seed=1), inputs_of([[0, 1]], seed=2)
    expected = [generate(model, inputs) for inputs in (first, second)]
    model.enable_background_cache(10**7)
    generate(model, first)
    size = model.background_cache.stats()["bytes"]
    model.enable_background_cache(size + 10, host_max_bytes=10**6)
    for _ in range(3):
        for inputs, wanted in zip((first, second), expected, strict=True):
            assert torch.equal(generate(model, inputs), wanted)
    stats = model.background_cache.stats()
    assert stats["host_hits"] > 0 and stats["evictions"] == 0
    assert (stats["tokens_misses"], stats["prefix_misses"]) == (2, 2)


def test_the_folder_outlives_the_model_and_serves_no_other(tmp_path):
    inputs = inputs_of([[0, 1]])

    def fresh_model(seed=0, **changes):
        model = tiny.backdrop_model(seed=seed, **changes)
        expected = generate(model, inputs)
        cache = model.enable_background_cache(10**7, folder=tmp_path)
        # On a busy machine computing a tiny model again may be quicker than the disk, and the folder passed over.
        cache.folder.seconds_to_load = lambda num_bytes: 0.0
        assert torch.equal(generate(model, inputs), expected)
        assert cache.folder.flush(30)
        return cache.stats()["disk_hits"]

    assert fresh_model() == 0
    assert fresh_model() == 2  # tokens and prefix, in another model of equal weights
    assert fresh_model(seed=1) == 0
    model = tiny.backdrop_model()
    model.enable_background_cache(10**7, folder=tmp_path)
    with model.background_cache.scope(namespace="other"):
        generate(model, inputs)
    model.to(torch.bfloat16)
    generate(model, inputs)
    assert model.background_cache.stats()["disk_hits"] == 0
    model.background_cache.folder.flush(30)
    model.background_cache.clear()
    assert fresh_model() == 0


def test_adapters_on_and_off_never_share_a_folder_entry(tmp_path):
    from peft import LoraConfig, get_peft_model

    inputs = inputs_of([[0, 1]])
    for _ in range(2):
        model = tiny.backdrop_model()
        torch.manual_seed(5)
        adapted = get_peft_model(
            model,
            LoraConfig(
                target_modules=r".*(vision_tower|language_model).*\.(q_proj|v_proj)",
                r=4,
                init_lora_weights=False,
            ),
        ).eval()
        expected = generate(adapted, inputs)
        with adapted.disable_adapter():
            plain = generate(adapted, inputs)
        model.enable_background_cache(10**7, folder=tmp_path)
        assert torch.equal(generate(adapted, inputs), expected)
        with adapted.disable_adapter():
            assert torch.equal(generate(adapted, inputs), plain)
        adapted.merge_adapter()
        merged = generate(adapted, inputs)
        with model.background_cache.scope(bypass=True):
            assert torch.equal(generate(adapted, inputs), merged)
        model.background_cache.folder.flush(30)


def test_a_damaged_folder_costs_time_and_no_answer(tmp_path):
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    expected = generate(model, inputs)
    model.enable_background_cache(10**7, folder=tmp_path)
    generate(model, inputs)
    model.background_cache.folder.flush(30)
    for path in tmp_path.rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 4
        path.write_bytes(data)
    model.enable_background_cache(10**7, folder=tmp_path)
    assert torch.equal(generate(model, inputs), expected)
    stats = model.background_cache.stats()
    assert stats["disk_hits"] == 0 and stats["tiers"]["disk"]["corrupt"] == 2


def test_a_tier_that_costs_more_than_it_saves_is_left_out(tmp_path, monkeypatch):
    cache = BackgroundCache(100_000, folder=BackgroundFolder(tmp_path, 10**6))
    monkeypatch.setattr(cache.folder, "seconds_to_load", lambda num_bytes: 1.0)
    cache.put("tokens", b"a" * 20, (torch.ones(20_000),), seconds=0.5)
    cache.folder.flush(30)
    assert cache.folder.stats()["entries"] == 0 and cache.stats()["skipped_slow"] == 1
    cache.put("tokens", b"b" * 20, (torch.ones(20_000),), seconds=2.0)
    cache.folder.flush(30)
    assert cache.folder.stats()["entries"] == 1
    # A faster machine reads the folder: computing takes half a second there.
    other = BackgroundCache(100_000, folder=BackgroundFolder(tmp_path, 10**6))
    monkeypatch.setattr(other.folder, "seconds_to_load", lambda num_bytes: 1.0)
    other.put("tokens", b"c" * 20, (torch.ones(20_000),), seconds=0.5)
    assert other.get("tokens", b"b" * 20) is None
    monkeypatch.setattr(other.folder, "seconds_to_load", lambda num_bytes: 0.01)
    assert torch.equal(other.get("tokens", b"b" * 20)[0], torch.ones(20_000))


# ---- faults


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_no_memory_while_storing_and_the_answer_still_comes(monkeypatch, error):
    model = tiny.backdrop_model()
    inputs = inputs_of([[0, 1]])
    expected = generate(model, inputs)
    model.enable_background_cache(10**7)

    def fails(tensor):
        raise error

    monkeypatch.setattr(cache_module, "compact", fails)
    assert torch.equal(generate(model, inputs), expected)
    stats = model.background_cache.stats()
    assert stats["entries"] == 0 and stats["out_of_memory"] == 2


def test_sixteen_threads_get_their_own_answers(tmp_path):
    model = tiny.backdrop_model()
    batches = [inputs_of([[0, 1]], seed=seed) for seed in range(4)]
    expected = [generate(model, inputs) for inputs in batches]
    model.enable_background_cache(10**7)
    generate(model, batches[0])
    size = model.background_cache.stats()["bytes"]
    model.enable_background_cache(2 * size, host_max_bytes=size, folder=tmp_path, folder_max_bytes=10**6)
    wrong = []

    def ask(number: int) -> None:
        for turn in range(4):
            i = (number + turn) % 4
            with model.background_cache.scope(namespace=str(number % 2)):
                if not torch.equal(generate(model, batches[i]), expected[i]):
                    wrong.append((number, turn))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = model.background_cache.stats()
    assert not wrong and stats["tokens_hits"] > 0
    assert all(stats["tiers"][name]["bytes"] <= stats["tiers"][name]["max_bytes"] for name in stats["tiers"])
    model.background_cache.folder.flush(30)


class TieredCacheMachine(RuleBasedStateMachine):
    """Insert, evict, spill, reload, corrupt, restart, lease and concurrent use, against a dictionary."""

    keys = [bytes([i]) * 20 for i in range(6)]

    @initialize(
        device=st.integers(80, 400), host=st.sampled_from([0, 200]), disk=st.sampled_from([0, 1500, 4000])
    )
    def start(self, device, host, disk):
        self.path = Path(tempfile.mkdtemp())
        self.budgets = (device, host, disk)
        self.model: dict = {}
        self.leases: list = []
        self.open()

    def open(self):
        device, host, disk = self.budgets
        self.cache = BackgroundCache(device, True, host, BackgroundFolder(self.path, disk) if disk else None)
        self.leases = []

    @staticmethod
    def value(number: int, size: int):
        return (torch.full((size,), float(number)), torch.arange(size) + number)

    def check(self, number: int, found):
        if found is not None:
            assert number in self.model
            wanted = self.value(number, self.model[number])
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    @rule(number=st.integers(0, 5), size=st.integers(1, 12), leased=st.booleans())
    def put(self, number, size, leased):
        size = self.model.setdefault(number, size)  # a key has one value for ever
        lease = self.cache.lease() if leased else None
        self.cache.put("tokens", self.keys[number], self.value(number, size), 1e6, lease)
        if lease is not None:
            self.leases.append(lease)

    @rule(number=st.integers(0, 5))
    def get(self, number):
        self.check(number, self.cache.get("tokens", self.keys[number]))

    @rule()
    def release(self):
        if self.leases:
            self.leases.pop().release()

    @rule()
    def clear(self):
        self.cache.clear()

    @precondition(lambda self: self.budgets[2])
    @rule()
    def restart(self):
        self.cache.folder.flush(10)
        self.open()

    @precondition(lambda self: self.budgets[2])
    @rule(position=st.integers(0, 400), restarted=st.booleans())
    def corrupt(self, position, restarted):
        self.cache.folder.flush(10)
        for path in sorted(self.path.rglob("*.safetensors"))[:1]:
            data = bytearray(path.read_bytes())
            data[position % len(data)] ^= 16
            path.write_bytes(data)
        if restarted:
            self.open()

    @rule()
    def threads(self):
        problems = []

        def work(offset):
            try:
                for number in range(6):
                    number = (number + offset) % 6
                    self.check(number, self.cache.get("tokens", self.keys[number]))
                    if number in self.model:
                        value = self.value(number, self.model[number])
                        self.cache.put("tokens", self.keys[number], value, 1e6)
            except BaseException as error:
                problems.append(error)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not problems, problems

    @invariant()
    def budgets_hold(self):
        if not hasattr(self, "cache"):
            return
        stats = self.cache.stats()
        for name, tier in stats["tiers"].items():
            assert tier["bytes"] <= tier["max_bytes"], name
        for tier in (self.cache.device_tier, self.cache.host_tier):
            assert tier.num_bytes == sum(
                t.numel() * t.element_size() for e in tier.entries.values() for t in e.tensors
            )

    def teardown(self):
        if hasattr(self, "cache"):
            if self.cache.folder is not None:
                self.cache.folder.flush(10)
            shutil.rmtree(self.path, ignore_errors=True)


TestTieredCache = TieredCacheMachine.TestCase
TestTieredCache.settings = settings(deadline=None, max_examples=25, stateful_step_count=25)
