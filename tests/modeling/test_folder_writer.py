"""Writing to a background folder later, on a thread of its own."""

import gc
import threading
import time
import weakref

import pytest
from folder_values import MIB, bits, file_size, files_in, key_of, value_of

from backdrop.modeling import background_folder_backdrop as module
from backdrop.modeling import folder_files_backdrop
from backdrop.modeling.background_folder_backdrop import BackgroundFolder


def test_put_soon_writes_within_its_bound(tmp_path, gate):
    folder = BackgroundFolder(tmp_path, MIB)
    folder.writer.max_pending_bytes = 2 * file_size(1000)
    assert folder.put_soon("tokens", key_of(1), value_of(1), 0.5)
    assert gate.reached.wait(10)
    assert folder.put_soon("tokens", key_of(2), value_of(2), 0.5)
    assert folder.put_soon("tokens", key_of(2), value_of(2), 0.5)  # waits already, and counts once
    assert folder.put_soon("tokens", key_of(1), value_of(1), 0.5)  # is being written
    assert folder.stats()["pending_bytes"] == 2 * file_size(1000)
    assert not folder.put_soon("tokens", key_of(3), value_of(3, 0), 0.5)
    assert folder.stats()["skipped_busy"] == 1
    assert not folder.flush(0.01)
    gate.set()
    assert folder.flush() and folder.stats()["pending_bytes"] == 0
    assert [folder.get("tokens", key_of(number)) is not None for number in (1, 2, 3)] == [True, True, False]
    # The keys and values of one long prefix alone may be more than the bound.
    assert folder.put_soon("tokens", key_of(4), value_of(4, 9000), 0.5) and folder.flush(10)
    assert bits(folder.get("tokens", key_of(4)).tensors) == bits(value_of(4, 9000))


def test_the_default_bound_is_never_more_than_the_budget(tmp_path):
    assert BackgroundFolder(tmp_path, 1000).writer.max_pending_bytes == 1000
    assert BackgroundFolder(tmp_path, 2**40).writer.max_pending_bytes == 256 * MIB


@pytest.mark.parametrize(
    ("where", "stage"), [(module, "encode_entry"), (folder_files_backdrop, "write_through")]
)
def test_clear_reaches_writes_that_wait_and_one_under_way(tmp_path, monkeypatch, where, stage):
    """One under way may hold the lock already, or not yet."""
    folder = BackgroundFolder(tmp_path, MIB)
    original, gate, reached = getattr(where, stage), threading.Event(), threading.Event()

    def wait(*arguments):
        reached.set()
        assert gate.wait(10)
        return original(*arguments)

    monkeypatch.setattr(where, stage, wait)
    for number in range(3):
        assert folder.put_soon("tokens", key_of(number), value_of(number), 1)
    assert reached.wait(10)
    clearing = threading.Thread(target=folder.clear)
    clearing.start()
    time.sleep(0.05)
    assert clearing.is_alive()
    gate.set()
    clearing.join(10)
    assert folder.flush(10) and not files_in(tmp_path) and folder.stats()["pending_bytes"] == 0
    assert folder.put_soon("tokens", key_of(1), value_of(1), 1) and folder.flush(10)
    assert folder.get("tokens", key_of(1)) is not None


def test_an_error_nobody_thought_of_does_not_stop_the_writer(tmp_path, monkeypatch):
    folder = BackgroundFolder(tmp_path, MIB)
    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_entry", None)
        assert folder.put_soon("tokens", key_of(1), value_of(1), 1) and folder.flush(10)
    assert folder.stats()["write_failures"] == 1
    assert folder.put_soon("tokens", key_of(1), value_of(1), 1) and folder.flush(10)
    assert folder.get("tokens", key_of(1)) is not None


def test_an_idle_folder_can_be_collected(tmp_path):
    folder = BackgroundFolder(tmp_path, MIB)
    assert folder.put_soon("tokens", key_of(1), value_of(1), 1) and folder.flush(10)
    reference = weakref.ref(folder)
    del folder
    deadline = time.monotonic() + 5
    while reference() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert reference() is None
