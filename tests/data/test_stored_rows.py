"""Rows that have messages and images already pass through as they are."""

import io
import json

import pytest
from datasets import Dataset
from PIL import Image as PILImage
from public_sets import (
    FEATURES,
    encoded,
    group_rows,
    picture,
    put_image,
    read,
)

from backdrop.data import files
from backdrop.data.load import load_rows
from backdrop.data.rows import TRAINING_FEATURES, BadRowError
from backdrop.data.stored import STRUCTURED_FEATURES
from backdrop.processing.patch_groups_backdrop import GROUP_ALPHA, METADATA_KEY


@pytest.mark.parametrize("form", ["saved", "parquet", "stream", "in_place"])
def test_stored_rows_pass_through_with_their_alpha(tmp_path, image_processor, form):
    rows = group_rows(image_processor)
    rows[1]["messages"][1]["content"] = " "
    dataset = Dataset.from_list(rows, features=FEATURES)
    if form == "parquet":
        dataset.to_parquet(tmp_path / "train.parquet")
        source = tmp_path / "train.parquet"
    else:
        source = tmp_path / "rows"
        dataset.save_to_disk(source)
    position = "in_place" if form == "in_place" else "first"
    loaded, bad = load_rows("rows", str(source), streaming=form == "stream", image_position=position)
    found = list(loaded)
    assert dict(bad) == {"1": "content of assistant is empty"}
    assert [row["id"] for row in found] == ["0", "2", "3"]
    for row, expected in zip(found, [rows[0], *rows[2:]], strict=True):
        if position == "first":
            assert row["messages"] == expected["messages"]
        assert [image.mode for image in row["images"]] == ["RGBA"] * len(expected["images"])
        for image, stored in zip(row["images"], expected["images"], strict=True):
            group = PILImage.open(io.BytesIO(stored["bytes"]))
            assert image.tobytes() == group.tobytes() and set(image.getchannel("A").getdata()) & set(
                GROUP_ALPHA
            )
            assert image.info[METADATA_KEY] == group.info[METADATA_KEY]
    if position == "in_place":
        kinds = [part["type"] for part in found[0]["messages"][0]["content"]]
        assert kinds == ["image"] * len(rows[0]["images"]) + ["text"]
    assert loaded.features == (STRUCTURED_FEATURES if position == "in_place" else TRAINING_FEATURES)


def test_json_rows_with_paths_and_parts(tmp_path):
    put_image(tmp_path / "pictures/1.jpg")
    row = {
        "id": 17,
        "images": ["pictures/1.jpg"],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a bus"}]},
        ],
    }
    short = {**row, "id": 18, "images": []}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(short) + "\n")
    for streaming in (False, True):
        for source in (tmp_path, tmp_path / "train.jsonl"):
            rows, bad = load_rows("rows", str(source), streaming=streaming)
            (found,) = list(rows)
            assert found["id"] == "17" and found["images"][0].size == (24, 18)
            assert [part["type"] for part in found["messages"][0]["content"]] == ["text", "image"]
            assert dict(bad) == {"18": "1 image parts for 0 images"}
    (example,), _ = read("rows", tmp_path)
    assert example.turns == [("what?", "a bus")] and example.image_at == "end"


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([{"role": "assistant", "content": "a"}], "roles are assistant; wanted user, assistant in turn"),
        ([{"role": "user", "content": "a"}], "roles are user; wanted"),
        ([], "messages is empty"),
        (
            [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}],
            "content of user holds",
        ),
    ],
)
def test_a_bad_stored_row(tmp_path, messages, reason):
    rows = [{"images": [], "messages": messages}, {"images": [], "messages": group_talk()}]
    Dataset.from_list(rows, features=FEATURES).save_to_disk(tmp_path / "rows")
    rows, bad = load_rows("rows", str(tmp_path / "rows"))
    assert len(rows) == 1 and dict(bad)["0"].startswith(reason)


def group_talk() -> list[dict]:
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_a_broken_image_in_a_stored_row(tmp_path):
    bad_image = {"bytes": encoded(size=(200, 200))[:-1500], "path": None}
    rows = [{"images": [image], "messages": group_talk()} for image in (picture(), bad_image)]
    Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "train.parquet")
    rows, bad = load_rows("rows", str(tmp_path))
    assert rows["id"] == ["0"] and "truncated" in dict(bad)["1"]
    with pytest.raises(BadRowError, match="row 1: image cannot be decoded"):
        load_rows("rows", str(tmp_path), on_bad_row="raise")


FORMS = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "texts": {"prompt": "<image>\nq", "completion": "a"},
    "texts without a placeholder": {"prompt": "q", "completion": "a"},
    "conversations": {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    },
}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    "images", [{"image": "pictures/a.png"}, {"images": ["pictures/a.png"]}], ids=["image", "images"]
)
@pytest.mark.parametrize("form", FORMS)
def test_rows_in_every_form_that_trl_takes(tmp_path, form, images, streaming):
    """A folder with one JSON file serves every split; paths are relative to it."""
    put_image(tmp_path / "pictures" / "a.png")
    (tmp_path / "mine.json").write_text(json.dumps([FORMS[form] | images]))
    (tmp_path / "bad_rows.json").write_text("[]")
    for split in ("train", "validation"):
        rows, bad = load_rows("rows", str(tmp_path), split=split, streaming=streaming)
        (row,) = rows
        assert [(m["role"], m["content"]) for m in row["messages"]] == [("user", "q"), ("assistant", "a")]
        assert len(row["images"]) == 1 and not len(bad)


def test_a_placeholder_without_its_image_is_a_bad_row(tmp_path):
    rows = [
        {"prompt": "<image><image>\nq", "completion": "a", "image": "a.png"},
        {**FORMS["texts"], "image": "a.png"},
    ]
    put_image(tmp_path / "a.png")
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    _, bad = load_rows("rows", str(tmp_path))
    assert dict(bad) == {"0": "2 <image> in the first question for 1 images"}


def test_rows_without_messages_in_any_form_are_refused(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps([{"prompt": "q", "image": "a.png"}]))
    with pytest.raises(
        ValueError, match="has columns prompt, image; it lacks messages or prompt and completion"
    ):
        load_rows("rows", str(tmp_path))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "holds a loading script"),
        (ConnectionError("no\nroute"), "own/set cannot be loaded: no route"),
        (KeyError("feature"), "own/set cannot be loaded: 'feature'"),
    ],
)
def test_every_error_of_datasets_is_one_line(monkeypatch, error, message):
    def fail(*args):
        raise error

    monkeypatch.setattr(files, "get_dataset_split_names", fail)
    with pytest.raises(ValueError, match=message) as raised:
        load_rows("rows", "own/set")
    assert "\n" not in str(raised.value)


def test_a_repository_of_scripts_names_a_mirror_in_parquet(monkeypatch):
    def fail(*args):
        raise RuntimeError("Dataset scripts are no longer supported, but found VQAv2.py")

    monkeypatch.setattr(files, "get_dataset_split_names", fail)
    with pytest.raises(
        ValueError, match=r"loading script, .* wanted lmms-lab/VQAv2 \(validation, no train\), or"
    ):
        load_rows("vqav2", "HuggingFaceM4/VQAv2", streaming=True)
