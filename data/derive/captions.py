"""Captions in two: rows for pre-alignment that say of each group what can be seen in it.

Made from captioned images with known boxes. Splits `background` and `objects`: one group each, and what the caption
says of it. The groups come from the annotated boxes or from the detector; what is said of which follows from where the
boxes lie in the groups, so a background is never described by what it does not show.
"""

import hashlib
import json
import random
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image as PILImage

from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import BACKGROUND, OBJECT, PatchGroup, pixel_mask

from .groups import IMAGE_ERRORS, LoadProcessor, about_processor, decoded, encoded, processor_identity
from .phrases import (
    NEITHER,
    Phrase,
    caption_of,
    load_pipeline,
    marked_phrases,
    marks_of_things,
    parsed_phrases,
    unmarked,
)
from .shards import Recipe, Shard
from .words import COCO_CATEGORIES, categories_named

SPLITS = ("background", "objects")  # by group kind
SPLIT_BY = ("annotations", "detector")
PROMPTS = (
    (
        "Describe the background.",
        "What does the background show?",
        "Briefly describe the scene behind the objects.",
        "What are the surroundings?",
        "Name what is in the background.",
    ),
    (
        "Describe the objects.",
        "What objects are there?",
        "Briefly describe what is in the foreground.",
        "Who or what is shown?",
        "Name the objects in front of the background.",
    ),
)
SEEN = 0.5  # share of its pixels in a group from which a thing counts as seen there
# Types of Flickr30k Entities that a detector of COCO's categories, or the box of a person, takes in.
OBJECT_TYPES = frozenset(("people", "clothing", "bodyparts", "animals", "vehicles", "instruments"))


@dataclass(frozen=True)
class Box:
    """A known box.

    Attributes:
        name: category, or the id of what phrases name.
        xyxy: left, top, right, bottom in pixels of the image file.
        is_object: it belongs to the object group, not to the background.
    """

    name: str
    xyxy: tuple[float, float, float, float]
    is_object: bool


@dataclass(frozen=True)
class Captioned:
    """An image's captions and boxes.

    Attributes:
        size: width, height of the annotated image, pixels.
        captions: as they were written.
        phrases: of every caption, given what lies where: name of a box -> group, None if there is no such box.
        boxes: what is known to lie where.
    """

    size: tuple[int, int]
    captions: list[str]
    phrases: Callable[[Callable[[frozenset[str]], int | None]], list[list[Phrase]]]
    boxes: list[Box]


class CaptionFormat(Protocol):
    """Reads the records of one dataset; made in each worker process."""

    def read(self, record: dict) -> Captioned:
        """An image's captions, phrases and boxes."""
        ...


# ---- COCO


class CocoRows:
    """Images of COCO's captions and instances JSON as a `Source`.

    Raises:
        ValueError: a category is none of COCO's 80: nothing is known of the words for it.
    """

    def __init__(self, captions: Path, instances: Path, images: Path):
        captioned, annotated = (json.loads(Path(path).read_text()) for path in (captions, instances))
        names = {category["id"]: category["name"] for category in annotated["categories"]}
        unknown = sorted(set(names.values()) - set(COCO_CATEGORIES))
        if unknown:
            raise ValueError(f"The instances have categories {unknown}; wanted COCO's 80.")
        self._images = Path(images)
        self._captions: dict[int, list[str]] = defaultdict(list)
        for annotation in captioned["annotations"]:
            self._captions[annotation["image_id"]].append(annotation["caption"])
        self._objects: dict[int, list[dict]] = defaultdict(list)
        for annotation in annotated["annotations"]:
            left, top, width, height = annotation["bbox"]
            self._objects[annotation["image_id"]].append(
                {
                    "name": names[annotation["category_id"]],
                    "xyxy": [left, top, left + width, top + height],
                }
            )
        self._entries = [entry for entry in captioned["images"] if entry["id"] in self._captions]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, rows: slice) -> list[dict]:
        return [
            {
                "id": str(entry["id"]),
                "images": [{"bytes": None, "path": str(self._images / entry["file_name"])}],
                "size": [entry["width"], entry["height"]],
                "captions": self._captions[entry["id"]],
                "objects": self._objects.get(entry["id"], []),
            }
            for entry in self._entries[rows]
        ]


class CocoFormat:
    """COCO: phrases are found by a spaCy pipeline, and name categories."""

    def __init__(self, pipeline: str):
        self._pipeline = load_pipeline(pipeline)

    def read(self, record: dict) -> Captioned:
        """An image's captions and boxes; the phrases come from the pipeline."""
        captions = [" ".join(caption.split()) for caption in record["captions"]]
        boxes = [Box(item["name"], tuple(item["xyxy"]), True) for item in record["objects"]]

        def phrases(place: Callable[[frozenset[str]], int | None]) -> list[list[Phrase]]:
            return [parsed_phrases(doc, place) for doc in self._pipeline.pipe(captions)]

        return Captioned(tuple(record["size"]), captions, phrases, boxes)


# ---- Flickr30k Entities


class EntitiesRows:
    """Images of Flickr30k Entities (folders `Sentences` and `Annotations`) as a `Source`.

    Args:
        folder: of the annotations.
        images: of the photos, `ID.jpg`.
        ids: file with one image id a line, such as the dataset's own `train.txt`; None: all.
    """

    def __init__(self, folder: Path, images: Path, ids: Path | None = None):
        self._folder, self._images = Path(folder), Path(images)
        if ids is None:
            self._ids = sorted(path.stem for path in (self._folder / "Sentences").glob("*.txt"))
        else:
            self._ids = Path(ids).read_text().split()
        if not self._ids:
            raise ValueError(f"{self._folder / 'Sentences'} has no .txt files; wanted one for each image.")

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, rows: slice) -> list[dict]:
        return [
            {
                "id": image_id,
                "images": [{"bytes": None, "path": str(self._images / f"{image_id}.jpg")}],
                "sentences": (self._folder / "Sentences" / f"{image_id}.txt").read_text().splitlines(),
                "annotations": (self._folder / "Annotations" / f"{image_id}.xml").read_text(),
            }
            for image_id in self._ids[rows]
        ]


class EntitiesFormat:
    """Flickr30k Entities: phrases are marked, and name boxes."""

    def read(self, record: dict) -> Captioned:
        """An image's captions and boxes; raises a `ValueError` for annotations that lack a number."""
        sentences = [line for line in record["sentences"] if line.strip()]
        root = ElementTree.fromstring(record["annotations"])
        marks = marks_of_things(sentences)
        boxes: list[Box] = []
        scenes: set[str] = set()
        for item in root.iter("object"):
            names = [name.text or "" for name in item.iter("name")]
            if (item.findtext("scene") or "0").strip() == "1":
                scenes.update(names)
            box = item.find("bndbox")
            if box is not None:
                left, top, right, bottom = (_number(box, side) for side in ("xmin", "ymin", "xmax", "ymax"))
                xyxy = (left, top, right, bottom)
                boxes += [Box(name, xyxy, _is_object(marks.get(name, []))) for name in names]
        size = (int(_number(root, "size/width")), int(_number(root, "size/height")))

        def phrases(place: Callable[[frozenset[str]], int | None]) -> list[list[Phrase]]:
            def place_mark(chain: str, types: list[str]) -> int:
                placed = place(frozenset([chain]))
                if placed is not None:
                    return placed
                return BACKGROUND if chain in scenes or "scene" in types else NEITHER

            return [marked_phrases(sentence, place_mark) for sentence in sentences]

        return Captioned(size, [unmarked(sentence) for sentence in sentences], phrases, boxes)


def _number(element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"the annotations have no <{path}> in <{element.tag}>")
    return float(text)


def _is_object(marks: list[tuple[list[str], list[str]]]) -> bool:
    """Whether the marks (types, words) of one thing name an object."""
    return any(
        OBJECT_TYPES.intersection(types) or ("other" in types and categories_named(words))
        for types, words in marks
    )


# ---- rows


class CaptionWork:
    """Rows of one group and what a caption says of it."""

    def __init__(
        self,
        load_processor: LoadProcessor,
        make_format: Callable[[], CaptionFormat],
        split_by: str,
        seed: int,
    ):
        self.processor = load_processor()
        self.format = make_format()
        self.split_by = split_by
        self.seed = seed

    def __call__(self, first: int, records: list[dict]) -> Shard:
        """The rows of a run of records; those whose image cannot be read are named in the shard."""
        shard = Shard({split: [] for split in SPLITS}, [], dict.fromkeys(("captions", *SPLITS), 0))
        for record in records:
            try:
                rows = self._rows(record)
            except IMAGE_ERRORS as error:
                shard.bad.append((record["id"], str(error)))
                continue
            for split, made in zip(SPLITS, rows, strict=True):
                shard.rows[split].extend(made)
                shard.counts[split] += len(made)
            shard.counts["captions"] += len(record.get("captions", record.get("sentences", [])))
        return shard

    def _rows(self, record: dict) -> tuple[list[dict], list[dict]]:
        """Rows of the background and of the objects of one image."""
        captioned = self.format.read(record)
        picture = decoded(record["images"][0])
        if picture.size != tuple(captioned.size):
            raise ValueError(
                f"the image is {picture.width} x {picture.height} pixels, but its boxes are for "
                f"{captioned.size[0]} x {captioned.size[1]}"
            )
        pixels, placement = self.processor.placed_images([picture])[0]
        masks = box_masks(captioned, self.processor)
        if self.split_by == "detector":
            objects = self.processor.detections([pixels], [placement])[0].combined_mask(pixels.shape[0])
        else:
            owned = [masks[box.name] for box in captioned.boxes if box.is_object]
            objects = np.any([np.zeros(pixels.shape[:2], dtype=bool), *owned], axis=0)
        groups = {group.kind: group for group in self.processor.split_groups(pixels, objects, placement)}
        cropped = any(not mask.any() for mask in masks.values())
        if len(groups) == 1 and not cropped:  # all that is said is said of it
            said: dict[int, list[str | None]] = {kind: [*captioned.captions] for kind in groups}
        else:
            phrases = captioned.phrases(partial(place_of, masks, groups, self.processor.patch_size))
            said = {kind: [caption_of(found, kind) for found in phrases] for kind in groups}
        made: tuple[list[dict], list[dict]] = ([], [])
        for kind, group in groups.items():
            image = encoded(group, self.processor)
            for number, caption in enumerate(said[kind]):
                if caption is not None:
                    made[kind].append(self._row(f"{record['id']}#{number}", kind, image, caption))
        return made

    def _row(self, row_id: str, kind: int, image: dict, caption: str) -> dict:
        prompt = random.Random(f"captions/{self.seed}/{row_id}").choice(PROMPTS[kind])
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": caption}]
        return {"id": row_id, "images": [image], "messages": messages}


def box_masks(captioned: Captioned, processor: BackdropImageProcessor) -> dict[str, np.ndarray]:
    """Pixels of all boxes of each name, bool `[S, S]` at the model's geometry; none where they were cropped away.

    The boxes go through the image's own steps as a picture, whatever the steps are; padding counts as no box.
    """
    width, height = captioned.size
    pictures: dict[str, np.ndarray] = {}
    for box in captioned.boxes:
        picture = pictures.setdefault(box.name, np.zeros((height, width, 3), dtype=np.uint8))
        left, top, right, bottom = box.xyxy
        rows = slice(max(0, int(np.floor(top))), max(0, int(np.ceil(bottom))))
        picture[rows, max(0, int(np.floor(left))) : max(0, int(np.ceil(right)))] = 255
    images = processor.model_images(
        [PILImage.fromarray(picture) for picture in pictures.values()], image_mean=[0.0, 0.0, 0.0]
    )
    return {name: image[..., 0] > 0 for name, image in zip(pictures, images, strict=True)}


def place_of(
    masks: dict[str, np.ndarray], groups: dict[int, PatchGroup], patch_size: int, names: frozenset[str]
) -> int | None:
    """The group in which most pixels of the named boxes lie; NEITHER if none has most; None: no such box.

    Args:
        masks: bool `[S, S]` by name.
        groups: by kind.
    """
    known = [masks[name] for name in names if name in masks]
    if not known:
        return None
    mask = np.any(known, axis=0)
    if not mask.any():
        return NEITHER  # outside the crop
    for kind in (OBJECT, BACKGROUND):
        if kind in groups:
            owned = pixel_mask(groups[kind].patch_mask, mask.shape[0], patch_size)
            if (mask & owned).sum() >= SEEN * mask.sum():
                return kind
    return NEITHER


def captions_recipe(
    load_processor: LoadProcessor,
    make_format: Callable[[], CaptionFormat],
    source_digest: str,
    *,
    pipeline: str = "",
    split_by: str = "annotations",
    seed: int = 0,
    shard_rows: int = 64,
) -> Recipe:
    """Captioned images with boxes -> splits `background` and `objects` for pre-alignment.

    Args:
        make_format: gives the reader of the records.
        pipeline: name and version of the spaCy pipeline that it uses, part of the identity.
        split_by: "annotations": the boxes make the groups; "detector": the processor's detector does.
        seed: of the choice of prompts.

    Raises:
        ValueError: the processor splits by chosen classes only, which the annotated boxes do not follow.
    """
    if split_by not in SPLIT_BY:
        raise ValueError(f"split_by is {split_by!r}; wanted one of {list(SPLIT_BY)}.")
    processor = load_processor()
    if split_by == "annotations" and processor.classes is not None:
        raise ValueError(
            f"The processor takes only {processor.classes} for objects, the annotations all they know; "
            "wanted split_by='detector'."
        )
    identity = processor_identity(processor) if split_by == "detector" else {"processor": processor.to_dict()}
    return Recipe(
        make_work=partial(CaptionWork, load_processor, make_format, split_by, seed),
        identity={
            "kind": "captions",
            **identity,
            "source": source_digest,
            "options": {"pipeline": pipeline, "split_by": split_by, "seed": seed},
            "words": _words_digest(),
        },
        about=about_processor(processor),
        splits=SPLITS,
        shard_rows=shard_rows,
    )


def _words_digest() -> str:
    """Of the table of words: another table splits captions otherwise."""
    return hashlib.sha256(Path(__file__).with_name("words.py").read_bytes()).hexdigest()
