"""Public data sets: tiny files in each one's real layout, in its authors' form and its Hub mirror's; bad rows; a step
of training on what was loaded."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import tiny
import torch
from command import run
from datasets import ClassLabel, Dataset, Features, Image, load_from_disk
from PIL import Image as PILImage
from red_square import groups_of, scene
from trl import ModelConfig, SFTConfig

from backdrop.data.load import NAMES, examples, load_rows, save_rows
from backdrop.data.rows import TRAINING_FEATURES, BadRowError, BadRows
from backdrop.data.stored import STRUCTURED_FEATURES
from backdrop.hub_export.convert import chat_template
from backdrop.processing.patch_groups_backdrop import GROUP_ALPHA, METADATA_KEY, save_group
from backdrop.train.sft import BackdropArguments, build_trainer

SHORT = "\nAnswer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def encoded(format="JPEG", size=(24, 18), seed=0) -> bytes:
    file = io.BytesIO()
    tiny.photo(*size, seed=seed).save(file, format)
    return file.getvalue()


def put_image(path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(**options))


def put_json(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def put_rows(path, rows: list[dict], **columns) -> None:
    """A parquet file of a mirror; `columns` are the features that cannot be inferred."""
    inferred = Dataset.from_list(rows).features
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features({**inferred, **columns})).to_parquet(path)


def picture(seed=0) -> dict:
    return {"bytes": encoded(seed=seed), "path": "some.jpg"}


def talk(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def read(name, source, **options):
    """Examples, and the reasons of bad rows by id."""
    bad = BadRows()
    found = list(examples(name, str(source), bad_rows=bad, **options))
    return found, dict(bad)


# ---- each set in its authors' form, and as its mirror has it


def make_llava(folder):
    put_image(folder / "coco/train2017/1.jpg")
    rows = [
        {
            "id": "1",
            "image": "coco/train2017/1.jpg",
            "conversations": talk("<image>\nWhat is it?", "A bus.", "Red?", "Yes."),
        },
        {
            "id": "2",
            "image": "coco/train2017/1.jpg",
            "conversations": talk("Describe it.\n<image>", "A red bus."),
        },
        {"id": "3", "model": "", "conversations": talk("What is 1 + 1?", "2")},
    ]
    put_json(folder / "llava_v1_5_mix665k.json", rows)


def test_llava_instruct(tmp_path):
    make_llava(tmp_path)
    found, bad = read("llava_instruct", tmp_path)
    assert not bad
    turns, alone, text = found
    assert turns.turns == [("What is it?", "A bus."), ("Red?", "Yes.")] and turns.image_at == "start"
    assert turns.answers == [] and turns.image_id == "coco/train2017/1.jpg"
    assert alone.turns == [("Describe it.", "A red bus.")] and alone.image_at == "end"
    assert alone.answers == ["A red bus."]
    assert alone.images == [{"path": str(tmp_path / "coco/train2017/1.jpg"), "bytes": None}]
    assert text.images == [] and text.turns == [("What is 1 + 1?", "2")]


def test_llava_pretrain(tmp_path):
    put_image(tmp_path / "images/00453/004.jpg")
    row = {
        "id": "004",
        "image": "00453/004.jpg",
        "conversations": talk("Render a clear summary of the photo.\n<image>", "select luxury furniture"),
    }
    put_json(tmp_path / "blip_laion_cc_sbu_558k.json", [row])
    ((example,), bad) = read("llava_pretrain", tmp_path)
    assert not bad and example.image_at == "end"
    assert example.turns == [("Render a clear summary of the photo.", "select luxury furniture")]
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        read("llava_pretrain", tmp_path, split="test")


def test_llava_rows_of_a_mirror(tmp_path):
    rows = [{"id": "1", "image": picture(), "conversations": talk("<image>\nWhat?", "A bus.")}]
    put_rows(tmp_path / "data/train-00000-of-00001.parquet", rows, image=Image())
    ((example,), _) = read("llava_instruct", tmp_path)
    assert example.turns == [("What?", "A bus.")] and example.images[0]["bytes"] == encoded()
    with pytest.raises(ValueError, match="holds no images as files"):
        read("llava_instruct", "liuhaotian/LLaVA-Instruct-150K")


TEN = ["nokia"] * 4 + ["Nokia phone"] * 5 + ["phone"]


def make_textvqa(folder):
    row = {
        "question": "what brand is this?",
        "image_id": "0054c91397f2fe05",
        "image_classes": ["Phone"],
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": 24,
        "image_height": 18,
        "answers": TEN,
        "question_tokens": ["what", "brand"],
        "question_id": 0,
        "set_name": "train",
    }
    put_json(folder / "TextVQA_0.5.1_train.json", {"dataset_type": "train", "data": [row]})
    ocr = {"image_id": row["image_id"], "ocr_tokens": ["NOKIA", "3310"], "ocr_info": []}
    put_json(folder / "TextVQA_Rosetta_OCR_v0.2_train.json", {"data": [ocr]})
    put_image(folder / "train_images/0054c91397f2fe05.jpg")
    return row


def test_textvqa(tmp_path):
    row = make_textvqa(tmp_path / "files")
    ((example,), bad) = read("textvqa", tmp_path / "files")
    assert not bad and example.turns == [("what brand is this?" + SHORT, "Nokia phone")]
    assert example.answers == TEN and example.id == "0" and example.image_id == "0054c91397f2fe05"
    prompt = "what brand is this?\nReference OCR token: NOKIA, 3310" + SHORT
    assert read("textvqa", tmp_path / "files", ocr_tokens=True)[0][0].turns[0][0] == prompt
    put_rows(
        tmp_path / "hub/data/validation-00000-of-00001.parquet",
        [{**row, "image": picture(), "ocr_tokens": ["NOKIA", "3310"]}],
        image=Image(),
    )
    for split in ("val", "validation"):
        ((mirrored,), _) = read("textvqa", tmp_path / "hub", split=split, ocr_tokens=True)
        assert mirrored.turns[0] == (prompt, "Nokia phone") and mirrored.answers == TEN
    with pytest.raises(ValueError, match="has no split 'train'; it has validation"):
        read("textvqa", tmp_path / "hub")
    with pytest.raises(ValueError, match="ocr_tokens is for textvqa, not gqa"):
        read("gqa", tmp_path, ocr_tokens=True)


def make_ocrvqa(folder):
    def book(split, url):
        return {
            "imageURL": url,
            "questions": ["Who wrote this book?", "What is the genre?"],
            "answers": ["Sandra Boynton", "Calendars"],
            "title": "Mom's",
            "authorName": "Sandra Boynton",
            "genre": "Calendars",
            "split": split,
        }

    url = "http://example.com/images/61CvV."
    put_json(
        folder / "dataset.json",
        {"761183272": book(1, url + "jpg"), "B": book(3, url + "gif"), "C": book(4, url)},
    )
    put_image(folder / "images/761183272.jpg")
    put_image(folder / "images/B.gif", format="GIF")


def test_ocrvqa(tmp_path):
    make_ocrvqa(tmp_path / "files")
    found, bad = read("ocrvqa", tmp_path / "files")
    assert [example.id for example in found] == ["761183272_0", "761183272_1"]
    assert (
        found[1].turns == [("What is the genre?" + SHORT, "Calendars")] and found[1].image_id == "761183272"
    )
    assert bad == {"C": "has no split 1, 2 or 3"}
    assert [example.image_id for example in read("ocrvqa", tmp_path / "files", split="test")[0]] == ["B", "B"]
    row = {
        "image": picture(),
        "image_id": "761183272",
        "questions": ["Who wrote this book?"],
        "answers": ["Sandra Boynton"],
        "ocr_tokens": ["MOM"],
        "title": "Mom's",
        "authorName": "S",
        "genre": "C",
        "set_name": "train",
    }
    put_rows(tmp_path / "hub/data/train-00000-of-00001.parquet", [row], image=Image())
    assert read("ocrvqa", tmp_path / "hub")[0][0].turns == found[0].turns


def make_vqav2(folder):
    answers = ["yes"] * 3 + ["no"] * 7
    question = {"image_id": 458752, "question": "Is it red?", "question_id": 458752000}
    annotation = {
        "question_type": "is it",
        "multiple_choice_answer": "no",
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i}
            for i, answer in enumerate(answers, 1)
        ],
        "image_id": 458752,
        "answer_type": "yes/no",
        "question_id": 458752000,
    }
    lost = {"image_id": 458752, "question": "Where?", "question_id": 458752001}
    put_json(folder / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": [question, lost]})
    put_json(folder / "v2_mscoco_train2014_annotations.json", {"annotations": [annotation]})
    return question | annotation


def test_vqav2(tmp_path):
    row = make_vqav2(tmp_path / "files")
    put_image(tmp_path / "coco/train2014/COCO_train2014_000000458752.jpg")
    put_image(tmp_path / "later/train2017/000000458752.jpg")
    for images in ("coco", "later"):
        ((example,), bad) = read("vqav2", tmp_path / "files", images=tmp_path / images)
        assert example.turns == [("Is it red?" + SHORT, "no")] and len(example.answers) == 10
        assert example.question_type == "yes/no" and example.image_id == "458752"
        assert bad == {"458752001": "has no annotation in v2_mscoco_train2014_annotations.json"}
    put_rows(
        tmp_path / "hub/data/validation-00000-of-00001.parquet", [{**row, "image": picture()}], image=Image()
    )
    ((mirrored,), _) = read("vqav2", tmp_path / "hub", split="validation")
    assert (mirrored.turns, mirrored.answers) == (example.turns, example.answers)
    assert (mirrored.question_type, mirrored.image_id) == ("yes/no", "458752")


GQA_ROW = {
    "semantic": [{"operation": "select", "dependencies": [], "argument": "bus (12)"}],
    "entailed": [],
    "equivalent": ["02930152"],
    "question": "Is the bus red?",
    "imageId": "2354786",
    "isBalanced": True,
    "groups": {"global": None, "local": "06-bus"},
    "answer": "yes",
    "semanticStr": "select: bus (12)",
    "annotations": {"answer": {}, "question": {"4": "2354786"}, "fullAnswer": {}},
    "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
    "fullAnswer": "Yes, the bus is red.",
}


# Without what parquet cannot hold of a single row (structures with no field).
GQA_HUB_ROW = {key: GQA_ROW[key] for key in ("question", "imageId", "answer", "fullAnswer", "types")}


def test_gqa(tmp_path):
    put_json(tmp_path / "files/testdev_balanced_questions.json", {"02930152": GQA_ROW})
    put_image(tmp_path / "files/images/2354786.jpg")
    ((example,), bad) = read("gqa", tmp_path / "files", split="testdev")
    assert not bad and example.turns == [("Is the bus red?" + SHORT, "yes")]
    assert example.question_type == "verify/attr" and example.image_id == "2354786"
    rows = [{**GQA_HUB_ROW, "id": "02930152"}, {**GQA_HUB_ROW, "id": "02930153", "imageId": "n1"}]
    hub = tmp_path / "hub"
    put_rows(hub / "val_balanced_instructions/val-00000-of-00001.parquet", rows)
    images = [{"id": str(i), "image": picture(i)} for i in range(3)] + [
        {"id": "2354786", "image": picture(7)}
    ]
    put_rows(hub / "val_balanced_images/val-00000-of-00001.parquet", images, image=Image())
    for streaming in (False, True):
        (mirrored,), bad = read("gqa", hub, split="validation", streaming=streaming)
        assert mirrored.turns == example.turns and mirrored.images[0]["bytes"] == encoded(seed=7)
        assert bad == {"02930153": "image 'n1' is not among the images"}
    (mirrored,), _ = read("gqa", hub, split="val", images=tmp_path / "files/images", limit=1)
    assert mirrored.images[0]["path"].endswith("2354786.jpg")


def test_pope(tmp_path):
    name = "COCO_val2014_000000310196.jpg"
    put_image(tmp_path / "val2014" / name)
    for kind in ("random", "adversarial"):
        rows = [
            {"question_id": 1, "image": name, "text": "Is there a bus in the image?", "label": "yes"},
            {"question_id": 2, "image": name, "text": "Is there a cup in the image?", "label": "maybe"},
        ]
        path = tmp_path / f"files/coco_pope_{kind}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    found, bad = read("pope", tmp_path / "files", split="test", images=tmp_path)
    assert [example.id for example in found] == ["random/1", "adversarial/1"]
    assert found[0].turns == [("Is there a bus in the image?" + SHORT, "yes")]
    assert found[1].question_type == "adversarial" and found[1].image_id == name
    assert bad["random/2"] == "label is 'maybe'; wanted yes or no" and bad["#2"] == "is str; wanted an object"
    with pytest.raises(ValueError, match="has no split 'train'; it has test"):
        read("pope", tmp_path / "files", images=tmp_path)
    row = {
        "id": "0",
        "question_id": "1",
        "question": "Is there a bus in the image?",
        "answer": "yes",
        "image_source": "COCO_val2014_000000310196",
        "image": picture(),
        "category": "adversarial",
    }
    put_rows(tmp_path / "hub/data/test-00000-of-00001.parquet", [row], image=Image())
    ((mirrored,), _) = read("pope", tmp_path / "hub", split="test")
    assert (mirrored.id, mirrored.turns, mirrored.question_type) == (
        "adversarial/1",
        found[0].turns,
        "adversarial",
    )


def make_coco(folder):
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 18, "width": 24} for i in (9, 25, 30)]
    notes = [{"image_id": i, "id": n, "caption": f"caption {n} of {i}. "} for n in range(2) for i in (25, 9)]
    put_json(folder / "annotations/captions_val2017.json", {"images": images, "annotations": notes})
    for image in images:
        put_image(folder / "val2017" / image["file_name"])


def test_coco_captions(tmp_path):
    make_coco(tmp_path / "files")
    found, bad = read("coco_captions", tmp_path / "files", split="validation")
    assert [example.id for example in found] == ["9", "25"] and bad == {"30": "has no caption"}
    assert found[0].turns == [(CAPTION, "caption 0 of 9.")]
    assert found[0].answers == ["caption 0 of 9.", "caption 1 of 9."]
    rows = [
        {"image": picture(i), "filename": "x.jpg", "cocoid": i, "caption": f"caption {n} of {i}."}
        for i in (9, 25)
        for n in range(2)
    ]
    put_rows(tmp_path / "hub/data/train-00000-of-00001.parquet", [*rows, rows[0]], image=Image())
    mirrored, bad = read("coco_captions", tmp_path / "hub")
    assert [(one.id, one.answers) for one in mirrored] == [(one.id, one.answers) for one in found]
    assert bad == {"9": "the captions of the image do not stand together"}
    rows = [
        {
            "question_id": "9.jpg",
            "image": picture(),
            "question": "?",
            "answer": ["a", "b"],
            "file_name": "9.jpg",
        }
    ]
    put_rows(tmp_path / "lmms/data/val-00000-of-00001.parquet", rows, image=Image())
    assert read("coco_captions", tmp_path / "lmms", split="val")[0][0].answers == ["a", "b"]


def test_flickr30k(tmp_path):
    folder = tmp_path / "files"
    put_image(folder / "flickr30k-images/1000092795.jpg")
    put_image(folder / "flickr30k-images/10002456.jpg")
    captions = ["Two young guys.", 'Two "friends", outside.']
    tokens = [f"1000092795.jpg#{i}\t{caption}" for i, caption in enumerate(captions)]
    (folder / "results_20130124.token").write_text("\n".join([*tokens, "10002456.jpg#0\tSome men ."]) + "\n")
    found, bad = read("flickr30k", folder, split="all")
    assert not bad and [(one.id, one.answers) for one in found] == [
        ("1000092795", captions),
        ("10002456", ["Some men ."]),
    ]
    with pytest.raises(ValueError, match="has no splits; wanted split 'all'"):
        read("flickr30k", folder)
    quoted = json.dumps(captions).replace('"', '""')
    lines = ["raw,sentids,split,filename,img_id", f'"{quoted}","[0, 1]",train,1000092795.jpg,0']
    (folder / "flickr_annotations_30k.csv").write_text("\n".join(lines) + "\n")
    assert read("flickr30k", folder)[0] == found[:1]
    image = {
        "sentids": [0, 1],
        "imgid": 0,
        "sentences": [
            {"tokens": ["two"], "raw": raw, "imgid": 0, "sentid": i} for i, raw in enumerate(captions)
        ],
        "split": "val",
        "filename": "1000092795.jpg",
    }
    put_json(folder / "dataset_flickr30k.json", {"images": [image], "dataset": "flickr30k"})
    assert read("flickr30k", folder, split="validation")[0] == found[:1]
    with pytest.raises(ValueError, match="has no split 'train'; it has val"):
        read("flickr30k", folder)
    rows = [
        {
            "image": picture(),
            "caption": captions,
            "sentids": ["0"],
            "split": split,
            "img_id": "0",
            "filename": name,
        }
        for split, name in (("train", "1.jpg"), ("test", "2.jpg"))
    ]
    put_rows(tmp_path / "hub/data/test-00000-of-00001.parquet", rows, image=Image())
    for split, name in (("train", "1"), ("test", "2")):
        assert [one.id for one in read("flickr30k", tmp_path / "hub", split=split)[0]] == [name]


def make_ade(folder):
    scenes = ["ADE_train_00000001 airport_terminal", "ADE_train_00000002 misc", "ADE_val_00000001 street"]
    folder.mkdir()
    (folder / "sceneCategories.txt").write_text("\n".join(scenes) + "\n")
    info = [
        "Idx\tRatio\tTrain\tVal\tStuff\tName",
        "1\t0.16\t11664\t1172\t1\twall",
        "9\t0.02\t1\t1\t0\twindowpane, window",
    ]
    (folder / "objectInfo150.txt").write_text("\n".join(info) + "\n")
    (folder / "annotations/training").mkdir(parents=True)
    for stem, colour in (("ADE_train_00000001", 9), ("ADE_train_00000002", 0)):
        put_image(folder / f"images/training/{stem}.jpg")
        mask = PILImage.new("L", (24, 18), colour)
        if colour:
            mask.paste(1, (0, 0, 10, 10))
            mask.paste(0, (0, 0, 3, 3))
        mask.save(folder / f"annotations/training/{stem}.png")


def test_ade20k(tmp_path):
    make_ade(tmp_path / "files")
    (scene_, objects), bad = read("ade20k", tmp_path / "files")
    assert scene_.turns == [("What scene is shown in the image?" + SHORT, "airport terminal")]
    assert scene_.question_type == "scene" and scene_.image_id == objects.image_id == "ADE_train_00000001"
    assert objects.turns[0][1] == "windowpane, wall" and objects.question_type == "objects"
    assert bad == {
        "ADE_train_00000002/scene": "scene is 'misc'",
        "ADE_train_00000002/objects": "has no named object",
    }
    things = [
        {"id": 0, "name": "car, auto", "parts": {"part_level": 0}},
        {"id": 1, "name": "wheel", "parts": {"part_level": 1}},
        {"id": 2, "name": "sky", "parts": {"part_level": 0}},
        {"id": 3, "name": "car, auto", "parts": {"part_level": 0}},
    ]
    rows = [
        {
            "image": picture(),
            "filename": "ADE_1.jpg",
            "folder": "f",
            "scene": ["urban", "street"],
            "objects": things,
        }
    ]
    put_rows(tmp_path / "full/data/train-00000-of-00001.parquet", rows, image=Image())
    found, _ = read("ade20k", tmp_path / "full")
    assert [one.turns[0][1] for one in found] == ["street", "car, sky"]
    rows = [{"image": picture(), "annotation": picture(), "scene_category": 1}]
    put_rows(
        tmp_path / "parse/data/validation-00000-of-00001.parquet",
        rows,
        image=Image(),
        annotation=Image(),
        scene_category=ClassLabel(names=["airport_terminal", "art_gallery"]),
    )
    ((one,), _) = read("ade20k", tmp_path / "parse", split="validation")
    assert one.turns[0][1] == "art gallery"


def test_hub_ids(tmp_path, monkeypatch):
    """What is asked of `datasets` and of the Hub; the rows come from local files."""
    asked = []
    row = make_textvqa(tmp_path)
    put_rows(tmp_path / "text.parquet", [{**row, "image": picture()}], image=Image())
    put_rows(tmp_path / "gqa.parquet", [{**GQA_HUB_ROW, "id": "02930152"}])
    put_rows(tmp_path / "images.parquet", [{"id": "2354786", "image": picture()}], image=Image())
    make_llava(tmp_path)

    def load(path, config=None, *, split, streaming):
        asked.append((path, config, split, streaming))
        file = {"lmms-lab/textvqa": "text"}.get(path) or ("gqa" if "instructions" in config else "images")
        return Dataset.from_parquet(str(tmp_path / f"{file}.parquet"))

    def download(repo, name, repo_type):
        assert (repo, repo_type) == ("liuhaotian/LLaVA-Instruct-150K", "dataset")
        return str(tmp_path / name)

    monkeypatch.setattr("backdrop.data.files.load_dataset", load)
    monkeypatch.setattr("backdrop.data.files.hf_hub_download", download)
    monkeypatch.setattr(
        "backdrop.data.files.get_dataset_split_names",
        lambda path, config: ["testdev"] if config else ["train", "validation"],
    )
    assert len(read("textvqa", "lmms-lab/textvqa", split="val", streaming=True)[0]) == 1
    assert len(read("gqa", "lmms-lab/GQA", split="testdev", streaming=True)[0]) == 1
    assert len(read("llava_instruct", "liuhaotian/LLaVA-Instruct-150K", images=tmp_path)[0]) == 3
    with pytest.raises(ValueError, match="lmms-lab/textvqa has no split 'test'; it has train, validation"):
        read("textvqa", "lmms-lab/textvqa", split="test")
    assert asked == [
        ("lmms-lab/textvqa", None, "validation", True),
        ("lmms-lab/GQA", "testdev_balanced_instructions", "testdev", True),
        ("lmms-lab/GQA", "testdev_balanced_images", "testdev", False),
    ]


# ---- rows for training


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_those_of_the_examples(tmp_path, streaming):
    make_llava(tmp_path)
    rows, bad = load_rows("llava_instruct", str(tmp_path), streaming=streaming)
    assert rows.features == TRAINING_FEATURES
    expected = [example.row() for example in read("llava_instruct", tmp_path)[0]]
    found = list(rows)
    assert [row["messages"] for row in found] == [row["messages"] for row in expected] and not bad
    assert [len(row["images"]) for row in found] == [1, 1, 0] and found[0]["images"][0].size == (24, 18)
    if not streaming:
        stored = rows.with_format("arrow")[0].to_pylist()[0]["images"]
        assert stored == expected[0]["images"], "by path, without bytes"


@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_the_prompts_own_place(tmp_path, streaming):
    make_llava(tmp_path)
    rows, _ = load_rows("llava_instruct", str(tmp_path), streaming=streaming, image_position="in_place")
    assert rows.features == STRUCTURED_FEATURES
    first, last, none = (row["messages"] for row in rows)
    assert [part["type"] for part in first[0]["content"]] == ["image", "text"]
    assert last[0]["content"] == [{"type": "text", "text": "Describe it."}, {"type": "image", "text": None}]
    assert first[2]["content"] == [{"type": "text", "text": "Red?"}]
    assert [part["type"] for part in none[0]["content"]] == ["text"]


def test_every_caption_is_a_row(tmp_path):
    make_coco(tmp_path)
    rows, bad = load_rows("coco_captions", str(tmp_path), split="val", limit=3)
    assert rows["id"] == ["9#0", "9#1", "25#0"] and not bad
    assert rows[1]["messages"][1]["content"] == "caption 1 of 9."


def test_a_stream_is_lazy_and_counts_each_pass_anew(tmp_path):
    make_llava(tmp_path)
    path = tmp_path / "llava_v1_5_mix665k.json"
    rows = json.loads(path.read_text())
    rows = [{**rows[0], "image": "lost.jpg"}, *rows[1:], *[rows[2]] * 8]
    path.write_text(json.dumps(rows)[:-1] + ", {cut")  # an error, but only for who reads so far
    assert (
        len(list(examples("llava_instruct", str(tmp_path), bad_rows=BadRows(), limit=2, check_images=False)))
        == 2
    )
    stream, bad = load_rows("llava_instruct", str(tmp_path), streaming=True, check_images=False)
    for _ in range(2):
        assert [row["id"] for row in stream.take(2)] == ["2", "3"]
        assert [row_id for row_id, _ in bad] == ["1"]
    with pytest.raises(ValueError, match="is not valid JSON"):
        list(stream)


def test_rows_are_read_anew(tmp_path):
    """Not from a cache of the same arguments: the files have changed, and the account of bad rows is needed."""
    make_llava(tmp_path)
    assert len(load_rows("llava_instruct", str(tmp_path))[0]) == 3
    (tmp_path / "coco/train2017/1.jpg").write_bytes(b"")
    rows, bad = load_rows("llava_instruct", str(tmp_path))
    assert rows["id"] == ["3"] and len(bad) == 2


# ---- bad rows


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
    with pytest.raises(ValueError, match="has columns image, question; it lacks messages, images"):
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


# ---- rows that have messages and images


def png(group) -> dict:
    file = io.BytesIO()
    save_group(group, file)
    return {"bytes": file.getvalue(), "path": None}


def group_rows(image_processor, count=4) -> list[dict]:
    return [
        {
            "images": [png(group) for group in groups_of(image_processor, scene(14 * (i % 4), 14))],
            "messages": [
                {"role": "user", "content": "what is shown?"},
                {"role": "assistant", "content": ["a red bus", "a bus"][i % 2]},
            ],
        }
        for i in range(count)
    ]


FEATURES = Features({name: TRAINING_FEATURES[name] for name in ("images", "messages")})


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


# ---- the command, and training


def test_saved_rows_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    make_llava(tmp_path / "mix")
    rows, bad = load_rows("llava_instruct", str(tmp_path / "mix"))

    def fail(self, folder):
        (folder / "data-00000-of-00001.arrow").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "save_to_disk", fail)
        with pytest.raises(KeyboardInterrupt):
            save_rows(rows, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out-*"))
    save_rows(rows, bad, tmp_path / "out")
    assert load_from_disk(tmp_path / "out")["id"] == ["1", "2", "3"]
    assert [row["id"] for row in load_rows("rows", str(tmp_path / "out"))[0]] == ["1", "2", "3"]
    with pytest.raises(ValueError, match="out exists"):
        save_rows(rows, bad, tmp_path / "out")


def test_the_command(tmp_path, monkeypatch, capsys):
    make_llava(tmp_path / "mix")
    path = tmp_path / "mix/llava_v1_5_mix665k.json"
    rows = json.loads(path.read_text())
    rows[0]["conversations"][1]["value"] = ""
    put_json(path, rows)
    command = ["llava_instruct", "mix", "--out", "kept", "--show", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "backdrop", "data", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 rows, 1 without an image; 1 bad rows skipped (1: answer is empty)" in done.stdout
    assert "2: 24 x 18 RGB\n  user: Describe it.\n  assistant: A red bus." in done.stdout
    assert json.loads((tmp_path / "kept/bad_rows.json").read_text()) == [["1", "answer is empty"]]
    assert not list((tmp_path / "cache").glob("backdrop-rows-*")), "scratch folders go with the process"
    put_json(path, [])
    monkeypatch.chdir(tmp_path)
    for arguments, status, message in (
        (command[:2], 1, "backdrop: mix has no good row"),
        (command, 2, "exists; wanted a new folder"),
    ):
        code, _, err = run(monkeypatch, capsys, "data", *arguments)
        assert code == status and message in err


def trainer_for(folder, dataset):
    values = BackdropArguments(
        model=str(folder / "model"), dataset=str(folder / "rows"), trainable=["projector"]
    )
    options = SFTConfig(
        output_dir=str(folder / "out"),
        max_length=None,
        max_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        # Else accelerate cuts every tensor of a stream's batch to as many rows as the batch has: groups are lost.
        accelerator_config={"dispatch_batches": False},
    )
    trainer = build_trainer(values, options, ModelConfig())
    trainer.train_dataset = dataset
    return trainer


@pytest.mark.parametrize("position, streaming", [("first", False), ("in_place", False), ("in_place", True)])
def test_loaded_rows_train(tmp_path, processor, detector, position, streaming):
    """A step of TRL's trainer on a batch with an image before the question, one after it, and none."""
    processor.chat_template = chat_template(system_prompt="", images_first=position == "first")
    model = tiny.backdrop_model(
        text_config=tiny.text_config(vocab_size=len(processor.tokenizer)),
        image_token_id=processor.image_token_id,
        separator_token_ids=processor.separator_token_ids,
    )
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Dataset.from_list(group_rows(processor.image_processor, 1), features=FEATURES).save_to_disk(
        tmp_path / "rows"
    )
    make_llava(tmp_path / "mix")
    dataset, _ = load_rows(
        "llava_instruct", str(tmp_path / "mix"), image_position=position, streaming=streaming
    )
    trainer = trainer_for(tmp_path, dataset)
    trainer.processing_class.image_processor.set_detector(detector)
    batch = trainer.data_collator(list(dataset))
    texts = [processor.tokenizer.decode(row).replace("<pad>", "") for row in batch["input_ids"]]
    separators = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("[BG_START]")
    assert separators.sum(1).tolist() == [1, 1, 0]
    before = "Describe it." in texts[1].split("[BG_START]")[0]
    assert before == (position == "in_place") and "What is it?" in texts[0].split("[BG_END]")[-1]
    weight = trainer.model.model.multi_modal_projector.linear_1.weight
    start = weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 1 and not torch.equal(weight, start)
    assert all(
        torch.isfinite(torch.tensor(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry
    )
