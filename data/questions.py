"""Short questions about images: TextVQA, OCR-VQA, VQAv2, GQA and POPE.

Each set has two readers. The one of files reads what the set's authors publish (the layout is in its docstring), the one
of rows reads a Hub id or local files with the columns of the mirror named there.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .files import (
    choose_split,
    json_entries,
    json_items,
    json_lines,
    matching,
    one_file,
    open_rows,
    require_columns,
    stored_rows,
)
from .images import stored_image
from .prompts import checked_list, checked_text
from .request import Parsed, Request, parsed, question_example
from .rows import BadRowError, Example


def textvqa_files(request: Request) -> Parsed:
    """TextVQA_0.5.1_{train,val,test}.json, images in train_images/ (of val too) and test_images/; for OCR tokens
    TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json beside it."""
    path = request.file("TextVQA_[0-9]*_{split}.json")
    tokens: dict[str, list[str]] = {}
    if request.ocr_tokens:
        split = path.stem.rsplit("_", 1)[-1]
        ocr = one_file(path.parent, [f"TextVQA_Rosetta_OCR_*_{split}.json"])
        tokens = {row["image_id"]: row["ocr_tokens"] for row in json_items(ocr, "data.item")}

    def parse(row: dict) -> Example:
        row_id, image_id = str(row["question_id"]), row["image_id"]
        name = f"{image_id}.jpg"
        image = request.image(row_id, f"train_images/{name}", f"test_images/{name}", name)
        return question_example(
            row_id,
            image,
            row["question"],
            row["answers"],
            image_id=image_id,
            ocr_tokens=tokens.get(image_id, ()),
        )

    return parsed(json_items(path, "data.item"), parse)


def textvqa_rows(request: Request) -> Parsed:
    """lmms-lab/textvqa."""
    wanted = ["image", "image_id", "question_id", "question", "answers"]
    wanted += ["ocr_tokens"] if request.ocr_tokens else []

    def parse(row: dict) -> Example:
        row_id = str(row["question_id"])
        image = stored_image(row_id, row["image"], request.images)
        return question_example(
            row_id,
            image,
            row["question"],
            row["answers"],
            image_id=str(row["image_id"]),
            ocr_tokens=row.get("ocr_tokens") or (),
        )

    return parsed(stored_rows(request.open(wanted), wanted), parse)


_OCRVQA_SPLITS = {1: "train", 2: "validation", 3: "test"}


def _ocrvqa_questions(row: dict, row_id: str, image: Callable[[], dict]) -> Parsed:
    """One example for each of an image's questions."""
    try:
        questions = checked_list(row_id, "questions", row.get("questions"))
        answers = checked_list(row_id, "answers", row.get("answers"))
        if len(questions) != len(answers):
            raise BadRowError(row_id, f"{len(questions)} questions and {len(answers)} answers")
        found = image()
    except BadRowError as error:
        yield error
        return
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        try:
            yield question_example(f"{row_id}_{number}", found, question, [answer], image_id=row_id)
        except BadRowError as error:
            yield error


def ocrvqa_files(request: Request) -> Parsed:
    """dataset.json: `{id: {"imageURL", "questions", "answers", "title", "authorName", "genre", "split": 1 | 2 | 3}}`;
    images are `<id>` with the URL's suffix, as the authors' loadDataset.py names them, or `.jpg`, as LLaVA does."""
    path = request.file("dataset.json")
    wanted = choose_split(request.split, _OCRVQA_SPLITS.values(), str(path))

    def read() -> Parsed:
        for row_id, row in json_entries(path):
            if not isinstance(row, dict) or row.get("split") not in _OCRVQA_SPLITS:
                yield BadRowError(row_id, "has no split 1, 2 or 3")
            elif _OCRVQA_SPLITS[row["split"]] == wanted:
                suffix = Path(str(row.get("imageURL"))).suffix
                names = dict.fromkeys((f"{row_id}{suffix}", f"{row_id}.jpg"))
                yield from _ocrvqa_questions(row, row_id, partial(request.image, row_id, *names))

    return read()


def ocrvqa_rows(request: Request) -> Parsed:
    """howard-hou/OCR-VQA."""
    wanted = ["image", "image_id", "questions", "answers"]
    rows = request.open(wanted)

    def read() -> Parsed:
        for row in stored_rows(rows, wanted):
            row_id = str(row["image_id"])
            read_image = partial(stored_image, row_id, row["image"], request.images)
            yield from _ocrvqa_questions(row, row_id, read_image)

    return read()


def _answer_texts(answers: object) -> object:
    """The texts alone where they have the form that they should: a tenth of the memory."""
    if isinstance(answers, list):
        return [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    return answers


_VQAV2_YEARS = {"train": ("train2014", "train2017"), "validation": ("val2014", "val2017", "train2017")}


def vqav2_files(request: Request) -> Parsed:
    """v2_OpenEnded_mscoco_{train,val}2014_questions.json and v2_mscoco_{train,val}2014_annotations.json; COCO's images
    under their names of 2014 or of 2017, in a folder of that year or not."""
    split = choose_split(request.split, _VQAV2_YEARS, request.source)
    year = _VQAV2_YEARS[split][0]
    questions = request.file(f"v2_OpenEnded_mscoco_{year}_questions.json")
    annotations = one_file(questions.parent, [f"v2_mscoco_{year}_annotations.json"])
    folders = ["", *(f"{name}/" for name in _VQAV2_YEARS[split])]

    def read() -> Parsed:
        answered = {
            row.get("question_id"): (_answer_texts(row.get("answers")), row.get("answer_type") or "")
            for row in json_items(annotations, "annotations.item")
        }

        def parse(row: dict) -> Example:
            row_id, number = str(row["question_id"]), int(row["image_id"])
            if row["question_id"] not in answered:
                raise BadRowError(row_id, f"has no annotation in {annotations.name}")
            answers, kind = answered[row["question_id"]]
            names = (f"COCO_{year}_{number:012d}.jpg", f"{number:012d}.jpg")
            image = request.image(row_id, *(folder + name for folder in folders for name in names))
            return question_example(
                row_id, image, row["question"], answers, question_type=kind, image_id=str(number)
            )

        yield from parsed(json_items(questions, "questions.item"), parse)

    return read()


def vqav2_rows(request: Request) -> Parsed:
    """lmms-lab/VQAv2 (validation and the tests; the train split in its original files)."""
    wanted = ["image", "image_id", "question_id", "question", "answers", "answer_type"]

    def parse(row: dict) -> Example:
        row_id = str(row["question_id"])
        return question_example(
            row_id,
            stored_image(row_id, row["image"], request.images),
            row["question"],
            row["answers"],
            question_type=row["answer_type"] or "",
            image_id=str(row["image_id"]),
        )

    return parsed(stored_rows(request.open(wanted), wanted), parse)


def _gqa_example(row_id: str, row: dict, image: dict) -> Example:
    kinds = row.get("types") or {}
    return question_example(
        row_id,
        image,
        row["question"],
        [row["answer"]],
        question_type=f"{kinds.get('structural', '')}/{kinds.get('semantic', '')}",
        image_id=row["imageId"],
    )


def gqa_files(request: Request) -> Parsed:
    """{train,val,testdev}_balanced_questions.json: `{id: {"imageId", "question", "answer", "fullAnswer", "types"}}`;
    images/<imageId>.jpg."""
    path = request.file("{split}_balanced_questions.json")

    def parse(entry: dict) -> Example:
        row_id, row = entry["id"], entry["row"]
        if not isinstance(row, dict):
            raise BadRowError(row_id, f"is {type(row).__name__}; wanted an object")
        name = f"{row['imageId']}.jpg"
        return _gqa_example(row_id, row, request.image(row_id, name, f"images/{name}"))

    return parsed(({"id": key, "row": row} for key, row in json_entries(path)), parse)


def gqa_rows(request: Request) -> Parsed:
    """lmms-lab/GQA: a configuration with the questions of a split and one with its images; locally two sub-folders.

    The images are looked up by id, so that they are never streamed: they are downloaded, or lie in a folder as files.
    """
    wanted = ["id", "imageId", "question", "answer", "types"]
    name = _gqa_name(request)
    instructions = request.open(wanted, config=f"{name}_balanced_instructions")
    if request.images:

        def image(row_id: str, image_id: str) -> dict:
            return request.image(row_id, f"{image_id}.jpg")
    else:
        pictures = open_rows(request.source, request.split, config=f"{name}_balanced_images", streaming=False)
        require_columns(pictures, ["id", "image"], f"{request.source} ({name}_balanced_images)")
        place = {key: number for number, key in enumerate(pictures["id"])}
        pictures = pictures.select_columns(["image"]).with_format("arrow")

        def image(row_id: str, image_id: str) -> dict:
            if image_id not in place:
                raise BadRowError(row_id, f"image {image_id!r} is not among the images")
            return stored_image(row_id, pictures[place[image_id]].to_pylist()[0]["image"])

    def parse(row: dict) -> Example:
        return _gqa_example(str(row["id"]), row, image(str(row["id"]), row["imageId"]))

    return parsed(stored_rows(instructions, wanted), parse)


def _gqa_name(request: Request) -> str:
    return {"validation": "val", "dev": "val"}.get(request.split, request.split)


POPE_KINDS = ("random", "popular", "adversarial")


def _pope_example(row_id: str, row: dict, image: dict, label: object, image_id: str, kind: str) -> Example:
    answer = checked_text(row_id, "label", label).lower()
    if answer not in ("yes", "no"):
        raise BadRowError(row_id, f"label is {answer!r}; wanted yes or no")
    return question_example(row_id, image, row["text"], [answer], question_type=kind, image_id=image_id)


def pope_files(request: Request) -> Parsed:
    """coco_pope_{random,popular,adversarial}.json: a line `{"question_id", "image", "text", "label"}` each; images
    of COCO's val2014."""
    choose_split(request.split, ["test"], request.source)
    found = [request.path]
    if request.path.is_dir():
        found = [
            path for kind in POPE_KINDS for path in sorted(matching(request.path, f"*pope_{kind}.json*"))
        ]

    def read() -> Parsed:
        for path in found:
            named = path.stem.rsplit("_", 1)[-1]

            def parse(row: dict, named: str = named) -> Example:
                kind = row.get("category") or (named if named in POPE_KINDS else "")
                row_id = f"{kind}/{row['question_id']}" if kind else str(row["question_id"])
                name = checked_text(row_id, "image", row["image"])
                image = request.image(row_id, name, f"val2014/{name}")
                return _pope_example(row_id, row, image, row["label"], name, kind)

            yield from parsed(json_lines(path), parse)

    return read()


def pope_rows(request: Request) -> Parsed:
    """lmms-lab/POPE."""
    wanted = ["image", "image_source", "question_id", "question", "answer", "category"]

    def parse(row: dict) -> Example:
        row_id = f"{row['category']}/{row['question_id']}"
        image = stored_image(row_id, row["image"], request.images)
        row = {**row, "text": row["question"]}
        return _pope_example(row_id, row, image, row["answer"], str(row["image_source"]), row["category"])

    return parsed(stored_rows(request.open(wanted), wanted), parse)
