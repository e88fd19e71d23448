"""The made scenes: shared backgrounds, sound boxes, labels and answers."""

import numpy as np
import pytest

from backdrop.scenes.families import phone
from backdrop.scenes.world import (
    COLOURS,
    DENSE_LABELS,
    DETECTOR_CLASSES,
    FAMILIES,
    GLYPHS,
    THINGS,
    background_seeds,
    box_patches,
    camera_clip,
    contact_sheet,
    disturbed,
    render_scene,
    sample_scenes,
)

FRAMES = range(12)


def _outside(scene):
    keep = np.ones(scene.image.size[::-1], dtype=bool)
    for item in scene.objects:
        x0, y0, x1, y1 = item.xyxy
        keep[y0:y1, x0:x1] = False
    return keep


def _answers(scene):
    return {q.topic: q.answer for q in scene.questions}


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_share_every_pixel_outside_their_boxes(family):
    scenes = [render_scene(family, 3, frame) for frame in FRAMES] + camera_clip(family, 3, 6, seed=0)
    assert len({scene.image.tobytes() for scene in scenes}) > 6
    first = scenes[0]
    for scene in scenes[1:]:
        both = _outside(first) & _outside(scene)
        assert np.array_equal(np.asarray(first.image)[both], np.asarray(scene.image)[both])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scene_follows_from_its_seeds(family):
    one, two = render_scene(family, 11, 5), render_scene(family, 11, 5)
    assert one.image.tobytes() == two.image.tobytes()
    assert (one.objects, one.questions) == (two.objects, two.questions)
    assert all(np.array_equal(one.labels[head], two.labels[head]) for head in DENSE_LABELS)
    assert one.image.tobytes() != render_scene(family, 12, 5).image.tobytes()
    clips = [camera_clip(family, 11, 4, seed=2) for _ in range(2)]
    assert [s.image.tobytes() for s in clips[0]] == [s.image.tobytes() for s in clips[1]]


@pytest.mark.parametrize(("size", "patch_size"), [(168, 14), (336, 28), (336, 14)])
def test_image_boxes_and_labels_fit_the_size(size, patch_size):
    for family in FAMILIES:
        for frame in range(4):
            scene = render_scene(family, 7, frame, size, patch_size)
            assert scene.image.size == (size, size)
            assert scene.image.mode == "RGB"
            for item in scene.objects:
                assert item.name in DETECTOR_CLASSES
                x0, y0, x1, y1 = item.xyxy
                assert 0 <= x0 < x1 <= size
                assert 0 <= y0 < y1 <= size
            assert set(scene.labels) == set(DENSE_LABELS)
            for head, classes in DENSE_LABELS.items():
                label = scene.labels[head]
                assert label.shape == ((size // patch_size) ** 2,)
                assert label.dtype == np.int64
                assert 0 <= label.min() <= label.max() < classes
            assert scene.labels["anchor"].sum() == len(scene.objects)


@pytest.mark.parametrize(("size", "patch_size"), [(224, 14), (0, 14), (336, 21), (168, 13)])
def test_unfit_sizes_are_refused(size, patch_size):
    with pytest.raises(ValueError, match="size"):
        render_scene("phone", 0, 0, size, patch_size)


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family"):
        render_scene("kitchen", 0, 0)


def test_splits_share_no_background():
    splits = [set(background_seeds(split)) for split in ("train", "validation", "test")]
    assert all(splits)
    assert len(set.union(*splits)) == sum(map(len, splits))
    for split in ("train", "test"):
        assert all(s.background_seed in background_seeds(split) for s in sample_scenes(split, 5, seed=0))


def test_every_kind_of_question_is_asked_and_answered():
    asked = set()
    for scene in sample_scenes("train", 60, seed=1):
        for question in scene.questions:
            assert question.question.endswith("?")
            assert "{" not in question.question
            assert question.answer.strip() == question.answer != ""
            asked.add((scene.family, question.about))
    assert asked == {(f, about) for f in FAMILIES for about in ("object", "background", "both")}


def _glyphs_in_reading_order(labels, rows):
    """The glyph classes of one text row, each cell once per patch column."""
    side = int(len(labels) ** 0.5)
    grid = labels.reshape(side, side)
    return ["".join(GLYPHS[g - 1] for g in grid[row] if g) for row in rows]


def test_answers_can_be_read_off_the_labels():
    for scene in sample_scenes("train", 60, seed=2):
        answers = _answers(scene)
        things = {THINGS[t - 1] for t in scene.labels["thing"] if t}
        colours = {list(COLOURS)[c - 1] for c in scene.labels["colour"] if c}
        rows = _glyphs_in_reading_order(scene.labels["glyph"], range(12))
        if scene.family == "phone":
            assert answers["label"] in rows
            if answers["time"] != "none":
                assert "".join(2 * d for d in answers["time"].replace(":", "")) in rows
                assert f"toggle {answers['toggle']}" in things
            assert {answers["wallpaper"], answers["card"]} <= colours
        elif scene.family == "street":
            kinds = ("car", "bus", "truck", "bike")
            assert answers["count"] == str(sum(item.name in kinds for item in scene.objects))
            assert answers["sign"] in rows
            assert answers["building"] in colours
            assert {item.name for item in scene.objects} == things & set(kinds)
            if "plate" in answers:
                assert any(answers["plate"] in row for row in rows)
        else:
            assert answers["name"].replace(" ", "") in rows
            assert any(answers["unit"] in row for row in rows)
            assert ("lamp" in things) == (answers["lamp"] != "none")
            if answers["readout"] != "none":
                assert "".join(2 * d for d in answers["readout"]) in rows
                assert f"needle {answers['needle']}" in things
                assert answers["zone"] in colours


def test_some_frames_have_no_objects():
    for family in FAMILIES:
        empty = [s for s in (render_scene(family, 1, f) for f in range(80)) if not s.objects]
        assert empty
        answers = _answers(empty[0])
        topic, nothing = {"phone": ("time", "none"), "street": ("count", "0"), "panel": ("readout", "none")}[
            family
        ]
        assert answers[topic] == nothing


def test_box_patches_are_those_a_box_touches():
    touched = box_patches([(14, 0, 28, 15)], size=56)
    assert np.flatnonzero(touched).tolist() == [1, 5]
    assert np.flatnonzero(box_patches([(14, 0, 28, 15)], size=56, grow=1)).tolist() == [
        *range(0, 3),
        *range(4, 7),
        *range(8, 11),
    ]
    assert not box_patches([], size=56).any()


def test_contact_sheet_has_a_row_for_each_background():
    sheet = contact_sheet(backgrounds=1, frames=2, zoom=1)
    assert sheet.size == (8 + 2 * 176, 8 + 3 * (168 + 34 + 8))


def test_places_name_the_column_of_a_thing():
    asked = 0
    for seed in range(30):
        scene = render_scene("street", seed, seed)
        boxes = {item.name: item.xyxy for item in scene.objects}
        for question in scene.places:
            kind = question.question.rstrip("?").split()[-3 if question.question.startswith("Which") else -1]
            if kind in boxes:
                x0, _, x1, _ = boxes[kind]
                asked += 1
                # A drawn vehicle may be a pixel narrower than its nominal box.
                assert int(question.answer) in {int((x0 + x1 + d) / 2) // 14 + 1 for d in (-2, 0, 2)}
    assert asked > 20
    for family in FAMILIES:
        assert all(1 <= int(q.answer) <= 12 for q in render_scene(family, 1, 1).places)


def test_half_of_the_backgrounds_have_words_nobody_can_know_by_heart():
    labels = [_answers(render_scene("phone", seed, 0))["label"] for seed in range(60)]
    unknown = [label for label in labels if label not in phone.WORDS]
    assert 15 < len(unknown) < 45 and len(set(unknown)) == len(unknown)


def test_disturbed_frames_stay_within_the_cameras_tolerance():
    from backdrop.processing.staleness_backdrop import patch_staleness
    from backdrop.scenes.rows import CAMERA_TOLERANCE

    image = render_scene("panel", 4, 0).image
    frames = [np.asarray(disturbed(image, seed)) for seed in (0, 1)]
    staleness = patch_staleness(*frames, 14)
    assert np.median(staleness) > 0.5 and staleness.max() < CAMERA_TOLERANCE
    assert not np.array_equal(*frames)
    assert np.array_equal(frames[0], np.asarray(disturbed(image, 0)))
