"""Each public data set read in its authors' form and in its Hub mirror's."""

import json

import pytest
from datasets import ClassLabel, Dataset, Image
from public_sets import (
    CAPTION,
    GQA_HUB_ROW,
    GQA_ROW,
    SHORT,
    TEN,
    encoded,
    make_ade,
    make_coco,
    make_llava,
    make_ocrvqa,
    make_textvqa,
    make_vqav2,
    picture,
    put_image,
    put_json,
    put_rows,
    read,
    talk,
)


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
