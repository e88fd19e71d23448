"""Rows that cannot be used are named, and left out or refused as asked."""

import json
import re

import pytest
from datasets import Image
from public_sets import (
    encoded,
    make_llava,
    make_textvqa,
    make_vqav2,
    picture,
    put_image,
    put_json,
    put_rows,
    read,
    talk,
)

from backdrop.data.load import NAMES, examples, load_rows
from backdrop.data.rows import BadRowError


def cut_png(width: int, height: int) -> bytes:
    """A PNG whose header promises another size than its data has."""
    import struct
    import zlib

    content = encoded("PNG", (4, 4))
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


IMAGES = {
    "missing": (None, "lost.jpg does not exist"),
    "truncated": (lambda: encoded(size=(200, 200))[:-1500], "truncated"),
    "empty": (lambda: b"", "cannot identify image file"),
    "text": (lambda: b"<html>404</html>", "cannot identify image file"),
    "cut png": (lambda: encoded("PNG", (64, 64))[:-600], "cannot be decoded"),
    "no pixels": (lambda: cut_png(0, 4), "cannot be decoded|has 0 x 4 pixels"),
    "bomb": (lambda: cut_png(60_000, 60_000), "decompression bomb"),
    "large": (lambda: cut_png(10_000, 10_000), "has 10000 x 10000 pixels; wanted at most 89,478,485"),
    "thin": (lambda: encoded("PNG", (1, 101)), "has 1 x 101 pixels; wanted sides within 1:100"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_bad_image_is_found_before_training(tmp_path, kind):
    make_llava(tmp_path)
    content, reason = IMAGES[kind]
    path = tmp_path / "llava_v1_5_mix665k.json"
    rows = json.loads(path.read_text())
    rows[0]["image"] = "lost.jpg"
    path.write_text(json.dumps(rows))
    if content:
        (tmp_path / "lost.jpg").write_bytes(content())
    dataset, bad = load_rows("llava_instruct", str(tmp_path))
    assert dataset["id"] == ["2", "3"]
    ((row_id, said),) = bad
    assert row_id == "1" and re.search(reason, said)
    with pytest.raises(BadRowError, match="row 1: "):
        load_rows("llava_instruct", str(tmp_path), on_bad_row="raise")
    with pytest.raises(BadRowError, match="row 1: "):
        list(examples("llava_instruct", str(tmp_path)))
    if content:
        assert len(load_rows("llava_instruct", str(tmp_path), check_images=False)[0]) == 3


def test_truncation_is_found_whatever_the_process_asked_of_pil(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    make_llava(tmp_path)
    (tmp_path / "coco/train2017/1.jpg").write_bytes(encoded(size=(200, 200))[:-1500])
    assert len(read("llava_instruct", tmp_path)[1]) == 2


TALKS = {
    "roles": (
        talk("<image>\na?", "b") + [{"from": "gpt", "value": "c"}],
        "roles are human, gpt, gpt; wanted",
    ),
    "unknown role": (
        [{"from": "user", "value": "<image>"}, {"from": "gpt", "value": "b"}],
        "roles are user, gpt",
    ),
    "unanswered": (talk("<image>\na?", "b", "c?"), "roles are human, gpt, human"),
    "none": ([], "conversations is empty"),
    "no list": ("hello", "conversations is str; wanted a list"),
    "no object": (["hello"], "a message is str"),
    "empty answer": (talk("<image>\na?", " "), "answer is empty"),
    "only an image": (talk("<image>\n", "b"), "question is empty"),
    "number": (
        [{"from": "human", "value": 3}, {"from": "gpt", "value": "b"}],
        "question is int; wanted text",
    ),
    "answer number": ([{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": 3}], "answer is int"),
    "no image token": (talk("a?", "b"), "0 <image> in the first question for 1 images"),
    "two tokens": (talk("<image><image>a?", "b"), "2 <image> in the first question for 1 images"),
    "late token": (talk("<image>a?", "b", "<image>c?", "d"), "question holds <image>"),
    "token in answer": (talk("<image>a?", "<image>"), "answer holds <image>"),
}


@pytest.mark.parametrize("kind", TALKS)
def test_a_bad_conversation(tmp_path, kind):
    conversations, reason = TALKS[kind]
    put_image(tmp_path / "1.jpg")
    good = {"id": "2", "image": "1.jpg", "conversations": talk("Before <image> after", "b")}
    rows = [
        {"id": "1", "image": "1.jpg", "conversations": conversations},
        good,
        {"id": "4", "image": "1.jpg"},
        7,
    ]
    put_json(tmp_path / "llava_v1_5_mix665k.json", rows)
    (found,), bad = read("llava_instruct", tmp_path)
    assert found.turns == [("Before after", "b")] and found.image_at == "start"
    assert bad["1"].startswith(reason)
    assert bad["#2"] == "has no field 'conversations'" and bad["#3"] == "is int; wanted an object"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"question": ""}, "question is empty"),
        ({"question": None}, "question is missing; wanted text"),
        ({"answers": []}, "answers is empty"),
        ({"answers": ["", " "]}, "answer is empty"),
        ({"answers": ["a", 1]}, "answer is int; wanted text"),
        ({"question": "a <image>?"}, "question holds <image>"),
        ({"answers": "a"}, "answers is str; wanted a list"),
        ({"image_id": "gone"}, "image file .*train_images/gone.jpg does not exist"),
    ],
)
def test_a_bad_question(tmp_path, change, reason):
    row = make_textvqa(tmp_path)
    rows = [{**row, "question_id": 1, **change}, row]
    put_json(tmp_path / "TextVQA_0.5.1_train.json", {"data": rows})
    found, bad = read("textvqa", tmp_path)
    assert len(found) == 1 and found[0].id == "0"
    with pytest.raises(ValueError, match=reason):
        raise ValueError(bad["1"])


@pytest.mark.parametrize("streaming", [False, True])
def test_not_one_good_row_is_an_error(tmp_path, streaming):
    make_llava(tmp_path)
    path = tmp_path / "llava_v1_5_mix665k.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))
    (tmp_path / "coco/train2017/1.jpg").unlink()
    with pytest.raises(ValueError, match="has no good row of llava_instruct for 'train': 2 bad rows skipped"):
        list(load_rows("llava_instruct", str(tmp_path), streaming=streaming)[0])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"data set is 'coco'; wanted one of {', '.join(NAMES)}"):
        load_rows("coco", str(tmp_path))
    with pytest.raises(ValueError, match="lost does not exist"):
        load_rows("vqav2", str(tmp_path / "lost"))
    with pytest.raises(ValueError, match=r"holds no vqav2: wanted v2_OpenEnded_\*\.json, or parquet files"):
        load_rows("vqav2", str(tmp_path))
    with pytest.raises(ValueError, match="images: .*lost is no folder"):
        load_rows("vqav2", str(tmp_path), images=tmp_path / "lost")
    make_vqav2(tmp_path)
    with pytest.raises(ValueError, match="has no file v2_OpenEnded_mscoco_val2014_questions.json"):
        load_rows("vqav2", str(tmp_path), split="validation")
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        load_rows("vqav2", str(tmp_path), split="test")
    (tmp_path / "v2_mscoco_train2014_annotations.json").unlink()
    with pytest.raises(ValueError, match="has no file v2_mscoco_train2014_annotations.json"):
        load_rows("vqav2", str(tmp_path), streaming=True)
    put_rows(tmp_path / "hub/train.parquet", [{"image": picture(), "question": "a?"}], image=Image())
    with pytest.raises(
        ValueError, match="has columns image, question; it lacks image_id, question_id, answers"
    ):
        load_rows("textvqa", str(tmp_path / "hub"), streaming=True)
    with pytest.raises(
        ValueError, match="has columns image, question; it lacks messages or prompt and completion"
    ):
        load_rows("rows", str(tmp_path / "hub"))
    for year in (2014, 2017):
        put_json(tmp_path / f"coco/captions_train{year}.json", {})
    with pytest.raises(
        ValueError, match="several such files .*captions_train2014.json, captions_train2017.json"
    ):
        load_rows("coco_captions", str(tmp_path / "coco"))
    with pytest.raises(ValueError, match="image_position is 'middle'"):
        load_rows("vqav2", str(tmp_path), image_position="middle")
    with pytest.raises(ValueError, match="on_bad_row is 'ignore'"):
        load_rows("vqav2", str(tmp_path), on_bad_row="ignore")
