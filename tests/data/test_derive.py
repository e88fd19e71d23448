"""Derived data sets: what is made equals what the processor gives, whoever is killed when, and says only what is seen."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from command import run
from datasets import Dataset, Features, Image, disable_progress_bars, load_from_disk
from derived_sets import (
    P,
    S,
    contents,
    make_groups,
    mixed_rows,
    picture,
    red_processor,
    said,
    stored,
    stored_group,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from paths import EXAMPLE, SUPPORT
from PIL import Image as PILImage
from red_detector import RedDetector

from backdrop.data.derive import shards as derive_shards
from backdrop.data.derive.groups import DatasetRows, GroupWork, groups_recipe
from backdrop.data.derive.shards import Shard, derive, source_digest
from backdrop.data.rows import TRAINING_FEATURES, BadRowError
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import (
    OBJECT,
    group_to_image,
)

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # each example writes files
SCENES_MODEL = EXAMPLE
disable_progress_bars()


def test_groups_are_what_the_processor_gives(tmp_path):
    rows = mixed_rows(10, tmp_path)
    record = make_groups(rows, tmp_path / "out")
    made = contents(tmp_path / "out")
    processor = red_processor()
    wanted = []
    for row in rows.with_format("arrow")[:].to_pylist():
        if row["id"] == "row4":
            continue
        images = [Image().decode_example(image) for image in row["images"]]
        groups = [group for found in processor.image_groups(images) for group in found]
        wanted.append((row["id"], row["messages"], groups))
    assert [(row["id"], row["messages"]) for row in made] == [(i, m) for i, m, _ in wanted]
    for row, (_, _, groups) in zip(made, wanted, strict=True):
        assert len(row["images"]) == len(groups)
        for image, group in zip(row["images"], groups, strict=True):
            found = PILImage.open(BytesIO(image["bytes"]))
            assert np.array_equal(np.asarray(found), np.asarray(group_to_image(group, P)))
            assert json.loads(found.info["backdrop"])["geometry"] == "resize+crop"
    assert any(group.kind == OBJECT for _, _, groups in wanted for group in groups)
    assert [bad[0] for bad in record["bad_rows"]] == ["row4"]
    about = json.loads((tmp_path / "out" / "derived.json").read_text())["about"]
    assert (about["image_size"], about["patch_size"], about["geometry"]) == (S, P, "resize+crop")
    assert about["processor"]["margin"] == 0


def test_a_group_stays_as_it_is_and_a_shared_image_is_split_once(tmp_path):
    detector, shared, group = RedDetector(), stored(picture(1)), stored_group(2)
    processor = red_processor()
    processor.set_detector(detector)
    rows = Dataset.from_list(
        [{"images": images, "messages": said("x")} for images in ([shared], [group], [shared, shared])],
        features=Features({name: TRAINING_FEATURES[name] for name in ("images", "messages")}),
    )
    make_groups(rows, tmp_path / "out", lambda: processor, shard_rows=8)
    made = contents(tmp_path / "out")
    assert [row["id"] for row in made] == ["0", "1", "2"]
    assert made[1]["images"] == [group]
    assert made[2]["images"] == 2 * made[0]["images"]
    assert detector.calls == 2  # that it is there, and the shared image


def test_bad_rows_are_named_or_stop_the_run(tmp_path):
    rows = mixed_rows(10, tmp_path)
    with pytest.raises(BadRowError, match="row row4"):
        make_groups(rows, tmp_path / "out", on_bad_row="raise")
    assert not (tmp_path / "out").exists()
    record = make_groups(rows, tmp_path / "out")
    assert record["bad_rows"][0][0] == "row4" and "no format" in record["bad_rows"][0][1]
    with pytest.raises(BadRowError, match="row row4"):  # the finished data set has it, too
        make_groups(rows, tmp_path / "out", on_bad_row="raise")
    rows = Dataset.from_list([{"id": "a", "images": [stored_group()], "messages": said("x")}] * 2)
    rows = rows.cast(TRAINING_FEATURES)
    small = partial(red_processor, crop_size={"height": 28, "width": 28})
    assert "56 x 56" in make_groups(rows, tmp_path / "small", small)["bad_rows"][0][1]


class Interrupted(Exception):
    pass


@settings(
    max_examples=12,
    deadline=None,
    phases=NO_SHRINKING,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), count=st.integers(1, 11), shard_rows=st.integers(1, 5))
def test_interruptions_and_shards_leave_no_trace(tmp_path_factory, data, count, shard_rows):
    folder = tmp_path_factory.mktemp("derive")
    rows = mixed_rows(count, folder)
    wanted = make_groups(rows, folder / "whole", shard_rows=100)
    written = -(-count // shard_rows) * 2  # files of a run: data and report of each shard
    stops = data.draw(st.lists(st.integers(0, written - 1), max_size=3), label="file writes until a stop")
    write = derive_shards.write_atomically
    for stop in stops:
        left = [stop]

        def write_some(path, contents, left=left):
            if path.name == "derived.json":
                return write(path, contents)
            if left[0] == 0:
                path.with_name(f".{path.name}.1.tmp").write_bytes(b"half a fi")
                raise Interrupted
            left[0] -= 1
            return write(path, contents)

        derive_shards.write_atomically = write_some
        try:
            make_groups(rows, folder / "out", shard_rows=shard_rows)
        except Interrupted:
            pass
        finally:
            derive_shards.write_atomically = write
    found = make_groups(rows, folder / "out", shard_rows=shard_rows)
    assert contents(folder / "out") == contents(folder / "whole")
    assert (found["rows"], found["counts"], found["bad_rows"]) == (
        wanted["rows"],
        wanted["counts"],
        wanted["bad_rows"],
    )
    assert not list((folder / "out").rglob("*.tmp")) and not (folder / "out.partial").exists()


def test_finished_shards_are_kept(tmp_path):
    rows, seen = mixed_rows(12, tmp_path, bad=False), []
    source = DatasetRows(rows)
    recipe = groups_recipe(red_processor, source_digest(source), 4)

    def stopping(after: int):
        work = GroupWork(red_processor)

        def run(first: int, part: list[dict]) -> Shard:
            if len(seen) == after:
                raise Interrupted
            seen.append(first)
            return work(first, part)

        return run

    with pytest.raises(Interrupted):
        derive(source, replace(recipe, make_work=partial(stopping, 2)), tmp_path / "out")
    derive(source, replace(recipe, make_work=partial(stopping, 9)), tmp_path / "out")
    assert seen == [0, 4, 8]
    derive(source, replace(recipe, make_work=partial(stopping, 3)), tmp_path / "out")  # nothing left to do


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_and_finished_by_one(tmp_path):
    rows = mixed_rows(40, tmp_path)
    rows.save_to_disk(str(tmp_path / "rows"))
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom derived_sets import slow_groups\nif __name__ == '__main__':\n    slow_groups(*sys.argv[1:])\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "rows"), str(tmp_path / "out")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    partial_folder = tmp_path / "out.partial"
    deadline = time.monotonic() + 400  # a busy machine takes long to start three processes
    while len(list(partial_folder.glob("reports/*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = _children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in partial_folder.glob("data-*.arrow")}
    assert 5 <= len(kept) < 40 and len(workers) >= 2
    while any(_runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in workers)  # nobody is left behind
    reported = {path.stem for path in partial_folder.glob("reports/*.json")}
    rows = load_from_disk(str(tmp_path / "rows"))
    make_groups(rows, tmp_path / "out", shard_rows=1)
    make_groups(rows, tmp_path / "serial", shard_rows=16)
    assert contents(tmp_path / "out") == contents(tmp_path / "serial")
    for name, changed in kept.items():
        if name[5:10] in reported:
            assert (tmp_path / "out" / name).stat().st_mtime_ns == changed


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_is_mixed(tmp_path):
    rows = mixed_rows(6, tmp_path)
    source = DatasetRows(rows)
    begun = groups_recipe(red_processor, source_digest(source), 4)

    def broken():
        raise Interrupted

    with pytest.raises(Interrupted):
        derive(source, replace(begun, make_work=broken), tmp_path / "begun")
    make_groups(rows, tmp_path / "done")
    for out in (tmp_path / "begun", tmp_path / "done"):
        with pytest.raises(ValueError, match="another processor.*remove that folder"):
            make_groups(rows, out, partial(red_processor, margin=1))
        with pytest.raises(ValueError, match="another source"):
            make_groups(rows.select([0, 1, 2, 3, 5, 4]), out)
        with pytest.raises(ValueError, match="another shard_rows: 4, now 3"):
            make_groups(rows, out, shard_rows=3)
    (tmp_path / "else").mkdir()
    with pytest.raises(ValueError, match=r"has no derived\.json"):
        make_groups(rows, tmp_path / "else")


def test_a_second_run_at_the_same_time_is_refused(tmp_path):
    (tmp_path / "out.partial").mkdir()
    with derive_shards._only_run(tmp_path / "out.partial"), pytest.raises(ValueError, match="another run"):
        make_groups(mixed_rows(2, tmp_path), tmp_path / "out")
    make_groups(mixed_rows(2, tmp_path), tmp_path / "out")


def test_the_source_is_known_by_what_it_holds(tmp_path):
    rows = mixed_rows(6, tmp_path)
    digest = source_digest(DatasetRows(rows))
    rows.save_to_disk(str(tmp_path / "saved"))
    assert source_digest(DatasetRows(Dataset.from_list(rows.to_list(), features=TRAINING_FEATURES))) == digest
    assert source_digest(DatasetRows(rows.select([1, 0, 2, 3, 4, 5]))) != digest
    assert source_digest(DatasetRows(rows.map(lambda row: {"id": row["id"] + "b"}))) != digest
    os.utime(tmp_path / "1.png", ns=(0, 1))
    assert source_digest(DatasetRows(rows)) != digest
    with pytest.raises(ValueError, match="no rows"):
        make_groups(rows.select([]), tmp_path / "out")


def test_no_detector_is_said_before_any_row(tmp_path):
    def load():
        return BackdropImageProcessor(
            size={"shortest_edge": S}, crop_size={"height": S, "width": S}, patch_size=P
        )

    with pytest.raises(ValueError, match="has no detector"):
        make_groups(mixed_rows(2, tmp_path), tmp_path / "out", load)


@pytest.mark.real
def test_the_command_with_a_trained_detector(tmp_path, monkeypatch, capsys):
    from backdrop.scenes.world import render_scene

    scenes = [render_scene("street", seed, seed).image for seed in (1, 2)]
    rows = [
        {"id": str(i), "images": [stored(np.asarray(s))], "messages": said("x")} for i, s in enumerate(scenes)
    ]
    Dataset.from_list(rows, features=TRAINING_FEATURES).save_to_disk(str(tmp_path / "rows"))
    arguments = [
        "groups",
        "--model",
        str(SCENES_MODEL),
        "--dataset",
        str(tmp_path / "rows"),
        "--workers",
        "1",
    ]
    code, out, _ = run(monkeypatch, capsys, "derive", *arguments, "--out", tmp_path / "out")
    assert code == 0 and "2 rows from 2; no bad rows" in out
    processor = BackdropImageProcessor.from_pretrained(SCENES_MODEL)
    for row, found in zip(contents(tmp_path / "out"), processor.image_groups(scenes), strict=True):
        images = [np.asarray(PILImage.open(BytesIO(image["bytes"]))) for image in row["images"]]
        assert len(images) == len(found) == 2
        for image, group in zip(images, found, strict=True):
            assert np.array_equal(image, np.asarray(group_to_image(group, processor.patch_size)))
    code, _, err = run(
        monkeypatch, capsys, "derive", *arguments, "--out", tmp_path / "out", "--shard-rows", "9"
    )
    assert code != 0 and re.search("backdrop: .* was made with another shard_rows", err)


def test_the_command_names_what_it_lacks(tmp_path, monkeypatch, capsys):
    arguments = ["captions", "--model", "m", "--images", tmp_path, "--out", tmp_path / "out"]
    code, _, err = run(monkeypatch, capsys, "derive", *arguments)
    assert code != 0 and "backdrop: Wanted either --coco-captions" in err
