"""Stale pairs: what is reused is within the tolerance, and the other frame is of the same scene."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value, disable_progress_bars
from derived_sets import P, S, contents, group_of, picture, red_processor, said, stored, stored_group
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from backdrop.data.derive.groups import DatasetRows
from backdrop.data.derive.pairs import (
    DatasetFrames,
    FolderFrames,
    PairOptions,
    PairRows,
    pair_figures,
    pairs_recipe,
)
from backdrop.data.derive.shards import derive, source_digest
from backdrop.data.rows import TRAINING_FEATURES
from backdrop.processing.patch_groups_backdrop import (
    BACKGROUND,
    OBJECT,
    pixel_mask,
)

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # each example writes files


disable_progress_bars()


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
