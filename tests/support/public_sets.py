"""Tiny files of public data sets, in their authors' layout or as a mirror has them, and rows of patch groups."""

import io
import json

import tiny
from datasets import Dataset, Features
from PIL import Image as PILImage
from red_square import groups_of, scene

from backdrop.data.load import examples
from backdrop.data.rows import TRAINING_FEATURES, BadRows
from backdrop.processing.patch_groups_backdrop import save_group

SHORT = "\nAnswer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."


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


def make_coco(folder):
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 18, "width": 24} for i in (9, 25, 30)]
    notes = [{"image_id": i, "id": n, "caption": f"caption {n} of {i}. "} for n in range(2) for i in (25, 9)]
    put_json(folder / "annotations/captions_val2017.json", {"images": images, "annotations": notes})
    for image in images:
        put_image(folder / "val2017" / image["file_name"])


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
