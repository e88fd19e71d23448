"""The background cache's tiers: budgets, order of use, leases, what moves up and down."""

import shutil
import tempfile
import threading
from pathlib import Path

import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model_inputs import generate, inputs_of

from backdrop.modeling.background_cache_backdrop import BackgroundCache
from backdrop.modeling.background_folder_backdrop import BackgroundFolder


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60), st.integers(50, 400))
def test_the_byte_budget_holds_and_the_oldest_goes_first(steps, budget):
    cache, model = BackgroundCache(budget), {}
    for name, size in steps:
        key = bytes([name])
        value = torch.full((size,), float(name * 100 + size))
        cache.put("tokens", key, (value,))
        model[key] = value
        assert cache.stats()["bytes"] <= budget
        stored = sum(t.numel() * 4 for v in cache.device_tier.entries.values() for t in v.tensors)
        assert stored == cache.stats()["bytes"]
        for known, expected in model.items():
            found = cache.device_tier.entries.get(("tokens", known))
            assert found is None or torch.equal(found.tensors[0], expected)
        if size * 4 <= budget:
            assert ("tokens", key) in cache.device_tier.entries
    cache.clear()
    assert cache.stats()["entries"] == 0 == cache.stats()["bytes"]


def test_a_view_is_stored_as_its_own_bytes():
    cache = BackgroundCache(1000)
    big = torch.zeros(10_000)
    cache.put("tokens", b"k", (big[:10],))
    (kept,) = cache.get("tokens", b"k")
    assert kept.untyped_storage().nbytes() == 40
    big[:10] = 1
    assert not kept.any()


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
