"""A background folder shared by threads and processes, some of which hang, fork or die."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from folder_values import MIB, bits, bytes_in, file_size, files_in, key_of, value_of

from backdrop.modeling import background_folder_backdrop as module
from backdrop.modeling import folder_files_backdrop
from backdrop.modeling.background_folder_backdrop import BackgroundFolder


def test_threads_never_see_a_wrong_value(tmp_path):
    folder = BackgroundFolder(tmp_path, 5 * file_size(1000))
    values = {number: value_of(number) for number in range(8)}
    expected = {number: bits(value) for number, value in values.items()}
    failures, hits = [], []

    def work(seed: int):
        choice = random.Random(seed)
        try:
            for _ in range(25):
                number = choice.randrange(8)
                step = choice.choices(["get", "put", "put_soon", "clear", "stats"], [8, 4, 2, 0.3, 1])[0]
                if step == "get":
                    found = folder.get("tokens", key_of(number))
                    if found is not None:
                        hits.append(number)
                        assert bits(found.tensors) == expected[number]
                elif step in ("put", "put_soon"):
                    getattr(folder, step)("tokens", key_of(number), values[number], 0.5)
                elif step == "clear":
                    folder.clear()
                else:
                    assert folder.stats()["bytes"] >= 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert folder.flush(10) and not failures and hits
    stats = folder.stats()
    assert stats["corrupt"] == stats["write_failures"] == 0 and stats["pending_bytes"] == 0
    assert stats["bytes"] == bytes_in(tmp_path) <= folder.max_bytes and folder.verify() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_wait_for_its_parents_threads(tmp_path, gate):
    folder = BackgroundFolder(tmp_path, MIB)
    gate.set()
    value = value_of(1)
    with folder.files.thread_lock, folder.writer.state:
        folder.writer.pending_bytes = 1
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(20)
                code = 0 if folder.flush(0) and folder.put("tokens", key_of(1), value, 1) else 2
            finally:
                os._exit(code)
        folder.writer.pending_bytes = 0
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert folder.get("tokens", key_of(1)) is not None


# Loads the file and its siblings without their package, which would import transformers' models.
PREAMBLE = """
import importlib, os, random, sys, time, types
from pathlib import Path
package = types.ModuleType("package")
package.__path__ = [str(Path(sys.argv[1]).parent)]
sys.modules["package"] = package
module = importlib.import_module("package." + Path(sys.argv[1]).stem)
import torch
"""


def start(script: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", PREAMBLE + script, module.__file__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


HANG = """
def replace(*paths):
    print("ready", flush=True)
    time.sleep(60)
folder = module.BackgroundFolder(sys.argv[2], 2**20)
os.replace = replace
folder.put("tokens", bytes([2]) * 20, (torch.ones(1000),), 1)
"""


def test_a_writer_that_hangs_holds_nobody_and_one_that_is_killed_leaves_nothing(tmp_path, monkeypatch):
    folder = BackgroundFolder(tmp_path, MIB)
    folder.put("tokens", key_of(1), value_of(1), 1)
    writer = start(HANG, tmp_path)
    try:
        assert writer.stdout.readline() == "ready\n"
        monkeypatch.setattr(folder_files_backdrop, "LOCK_TIMEOUT", 0.2)
        began = time.monotonic()
        assert not folder.put("tokens", key_of(3), value_of(3), 1)
        assert 0.2 <= time.monotonic() - began < 2
        assert folder.stats()["write_failures"] == 1
        assert folder.get("tokens", key_of(1)) is not None  # readers take no lock
        with pytest.raises(TimeoutError):
            folder.prune()
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    assert folder.get("tokens", key_of(2)) is None and folder.stats()["corrupt"] == 0
    (orphan,) = [path for path in files_in(tmp_path) if path.suffix == ".tmp"]
    assert folder.stats()["bytes"] == bytes_in(tmp_path) > 4000 and folder.stats()["entries"] == 1
    assert folder.put("tokens", key_of(2), value_of(2), 1)
    assert not orphan.exists() and len(files_in(tmp_path)) == 2 and folder.verify() == []


WRITE = """
seed, budget = int(sys.argv[3]), int(sys.argv[4])
choice = random.Random(seed)
folder = module.BackgroundFolder(sys.argv[2], budget)
print("ready", flush=True)
while not os.path.exists(os.path.join(sys.argv[2], "go")):
    time.sleep(0.001)
for _ in range(150):
    number = choice.randrange(30)
    value = (torch.full((500 + 250 * number,), number, dtype=torch.uint8),)
    found = folder.get("tokens", bytes([number]) * 20)
    assert found is None or torch.equal(found.tensors[0], value[0])
    assert found is not None or folder.put("tokens", bytes([number]) * 20, value, 1)
assert folder.stats()["corrupt"] == 0
open(os.path.join(sys.argv[2], f"done-{seed}"), "w").close()
while not os.path.exists(os.path.join(sys.argv[2], f"done-{3 - seed}")):
    time.sleep(0.001)
# Nobody waits for this one: the end of the process does.
assert folder.put_soon("prefix", bytes([seed]) * 20, value, 1)
"""


def test_two_writing_processes_share_one_budget(tmp_path):
    budget = 20_000
    totals, done = [], threading.Event()

    def listing() -> dict:
        found = {}
        for path in files_in(tmp_path):
            try:
                stat = path.stat()
            except FileNotFoundError:
                return {}
            found[path] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return found

    def sample():
        # Files that two listings in a row show alike were all there at once, between the two.
        while not done.is_set():
            first = listing()
            if first and first == listing():
                totals.append(sum(size for _, size, _ in first.values()))

    writers = [start(WRITE, tmp_path, seed, budget) for seed in (1, 2)]
    sampler = threading.Thread(target=sample)
    try:
        assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
        sampler.start()
        (tmp_path / "go").touch()
        assert [writer.wait(60) for writer in writers] == [0, 0]
    finally:
        done.set()
        for writer in writers:
            writer.kill()
            writer.stdout.close()
        sampler.join()
    assert len(totals) > 20 and max(totals) > budget / 2
    assert max(totals) <= budget and bytes_in(tmp_path) <= budget
    folder = BackgroundFolder(tmp_path, budget)
    assert folder.verify() == [] and not [path for path in files_in(tmp_path) if path.suffix == ".tmp"]
    assert all(folder.get("prefix", key_of(seed)) is not None for seed in (1, 2))
