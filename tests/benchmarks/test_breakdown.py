"""Where the time goes: every stage's functions exist, and each second is counted once."""

import time
from types import SimpleNamespace

import pytest

from backdrop.benchmarks import breakdown
from backdrop.benchmarks.breakdown import REST, STAGES, StageClock, find, measured, render


@pytest.mark.parametrize("target", [target for targets in STAGES.values() for target in targets])
def test_every_function_of_a_stage_exists(target):
    owner, name = find(target)
    assert callable(getattr(owner, name))


def test_a_function_that_is_not_there_is_an_error():
    with pytest.raises(AttributeError):
        find("backdrop.benchmarks.breakdown:StageClock.no_such_function")


@pytest.fixture
def seconds(monkeypatch) -> SimpleNamespace:
    """A clock that moves only when it is told to."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(breakdown, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_nested_stages_are_counted_once(seconds):
    clock = StageClock()

    def spend(amount):
        seconds.now += amount

    inner = clock.timed("inner", lambda: spend(3))
    same = clock.timed("outer", lambda: spend(4))

    def run():
        spend(1)
        inner()
        same()
        inner()

    clock.timed("outer", run)()
    assert clock.seconds == {"inner": 6, "outer": 5}  # 1 and 4 in the outer functions


def test_a_stage_that_raises_is_counted_too(seconds):
    clock = StageClock()

    def fail():
        seconds.now += 2
        raise KeyError("inner")

    def run():
        seconds.now += 1
        with pytest.raises(KeyError):
            clock.timed("inner", fail)()

    clock.timed("outer", run)()
    assert clock.seconds == {"inner": 2, "outer": 1}


def test_functions_are_as_before_after_the_measurement():
    def attributes():
        return {
            target: vars(find(target)[0]).get(find(target)[1])
            for targets in STAGES.values()
            for target in targets
        }

    before = attributes()
    with measured(StageClock()):
        during = attributes()
    assert attributes() == before
    assert all(during[target] is not before[target] for target in before)


def test_what_no_stage_covers_is_the_rest(monkeypatch):
    monkeypatch.setattr(breakdown, "STAGES", {"sleep": ("time:sleep",)})

    def call() -> float:
        started = time.perf_counter()
        time.sleep(0.01)
        return time.perf_counter() - started + 1

    rows = breakdown.breakdown(call, 3, synchronize=False)
    assert list(rows) == ["sleep", REST, "total"]
    assert rows["sleep"] >= 10 and rows[REST] == pytest.approx(1000, abs=50)
    assert "| sleep |" in render({"mode": rows})
