"""How long a load takes: measured once per machine, or guessed."""

import time

import torch
from folder_values import MIB, bytes_in, files_in, key_of, value_of

from backdrop.modeling import folder_entry_backdrop, folder_speed_backdrop
from backdrop.modeling.background_folder_backdrop import BackgroundFolder


def test_the_speed_is_measured_once_per_machine(tmp_path, monkeypatch):
    budget = 2 * MIB
    folder = BackgroundFolder(tmp_path, budget)
    folder.put("tokens", key_of(1), value_of(1), 1)
    largest = []
    read_entry = folder_speed_backdrop.read_entry
    monkeypatch.setattr(
        folder_speed_backdrop,
        "read_entry",
        lambda *args: (largest.append(bytes_in(tmp_path)), read_entry(*args))[1],
    )
    state = torch.get_rng_state()
    one, two = folder.seconds_to_load(MIB), folder.seconds_to_load(100 * MIB)
    assert 0 < one < two < 1000
    assert len(largest) == 2 and MIB <= max(largest) <= budget
    assert torch.equal(torch.get_rng_state(), state)
    assert len(files_in(tmp_path)) == 1 and folder.stats()["evictions"] == 0
    other = BackgroundFolder(tmp_path, budget)
    assert other.seconds_to_load(MIB) == one and other.seconds_to_load(100 * MIB) == two
    assert len(largest) == 2
    folder.clear()  # the machine stays what it is
    assert BackgroundFolder(tmp_path, budget).seconds_to_load(MIB) == one and len(largest) == 2
    monkeypatch.setattr(folder_speed_backdrop.platform, "node", lambda: "another")
    assert BackgroundFolder(tmp_path, budget).seconds_to_load(MIB) > 0 and len(largest) == 4
    for machine in tmp_path.glob("v1/machine-*.json"):
        machine.write_text('{"bytes_per_second": 0, "latency_s": 1}')
    assert BackgroundFolder(tmp_path, budget).seconds_to_load(MIB) > 0 and len(largest) == 6


def test_a_folder_without_room_evicts_nothing_to_measure(tmp_path):
    folder = BackgroundFolder(tmp_path, 100_000)
    for number in range(9):
        folder.put("tokens", key_of(number), value_of(number, 10_000), 1)
    assert folder.seconds_to_load(2000) > folder.seconds_to_load(1000) > 0
    assert folder.stats()["entries"] == 9 and not list(tmp_path.glob("v1/machine-*"))


def test_a_disk_that_lies_gives_a_guess(tmp_path, monkeypatch):
    folder = BackgroundFolder(tmp_path, MIB)
    monkeypatch.setattr(folder_entry_backdrop, "checksum_of", lambda *args: str(time.perf_counter_ns()))
    assert folder.seconds_to_load(1000) > 0 and not files_in(tmp_path)
