"""Ordinary images of training rows to patch groups, once and for all: training then needs no detector."""

import hashlib
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from backdrop.processing.image_loading_backdrop import is_group
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import (
    PatchGroup,
    group_to_image,
    save_group,
)

from .shards import Recipe, Shard

LoadProcessor = Callable[[], BackdropImageProcessor]
# What reading or splitting an image that cannot be used raises.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, PILImage.DecompressionBombError)
# Their versions may move a pixel; recorded beside the data.
PACKAGES = ("pillow", "torch", "transformers", "ultralytics")


class DatasetRows:
    """A dataset as a `Source`: rows with their images as stored, `{"path", "bytes"}`.

    Args:
        rows: with `images` and `messages`, and `id` if there is one: else a row's number is its id.
        columns: further columns to keep.
    """

    def __init__(self, rows: Dataset, columns: tuple[str, ...] = ()):
        missing = {"images", "messages", *columns} - set(rows.column_names)
        if missing:
            raise ValueError(f"The rows have columns {rows.column_names}; wanted {sorted(missing)} too.")
        keep = [name for name in ("id", "images", "messages", *columns) if name in rows.column_names]
        # As Arrow an image is as it is stored; casting it to that would write the whole dataset again.
        self._rows = rows.select_columns(keep).with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> list[dict]:
        numbers = range(*rows.indices(len(self)))
        found = self._rows[rows].to_pylist()
        return [{**row, "id": _row_id(row, number)} for row, number in zip(found, numbers, strict=True)]

    def column(self, name: str) -> list:
        """All values of a column, in order."""
        return self._rows.with_format(None)[name][:]


def _row_id(row: dict, number: int) -> str:
    found = row.get("id")
    return str(number if found is None else found)


def decoded(image: dict) -> PILImage.Image:
    """The picture of `{"path", "bytes"}`, alpha and a PNG's text kept.

    Raises:
        ValueError: it is no image.
    """
    try:
        return Image().decode_example(image)
    except UnidentifiedImageError:  # its own message has an address in it
        raise ValueError(f"{image['path'] or 'an image'} is in no format that can be read") from None


def stored_bytes(image: dict) -> bytes:
    """The file as it is."""
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def encoded(group: PatchGroup, processor: BackdropImageProcessor) -> dict:
    """A group as an undecoded PNG, as `datasets.Image` stores it."""
    buffer = BytesIO()
    save_group(group_to_image(group, processor.patch_size, processor.geometry()), buffer)
    return {"bytes": buffer.getvalue(), "path": None}


class GroupWork:
    """Rows with every ordinary image replaced by its groups. An image that several rows of a shard share is split once."""

    def __init__(self, load_processor: LoadProcessor):
        self.processor = load_processor()
        self.processor.disable_background_matching()

    def __call__(self, first: int, rows: list[dict]) -> Shard:
        """The rows with their groups; those whose image cannot be read are named in the shard."""
        made, bad = [], []
        known: dict[tuple, list[dict]] = {}
        for row in rows:
            try:
                images = [group for image in row["images"] for group in self._groups(image, known)]
            except IMAGE_ERRORS as error:
                bad.append((row["id"], str(error)))
                continue
            made.append({"id": row["id"], "images": images, "messages": row["messages"]})
        return Shard({"": made}, bad, {"groups": sum(len(row["images"]) for row in made)})

    def _groups(self, image: dict, known: dict[tuple, list[dict]]) -> list[dict]:
        content = image["bytes"]
        key = (image["path"],) if content is None else (None, hashlib.sha256(content).digest())
        if key not in known:
            picture = decoded(image)
            groups = self.processor.image_groups([picture])[0]  # a group is checked by it, too
            if is_group(picture):
                known[key] = [{"bytes": stored_bytes(image), "path": None}]
            else:
                known[key] = [encoded(group, self.processor) for group in groups]
        return known[key]


def about_processor(processor: BackdropImageProcessor) -> dict[str, Any]:
    """What a dataset of groups is made for; the geometry that a model needs to read it."""
    side = processor.model_images([PILImage.new("RGB", (8, 8))])[0].shape[0]
    return {
        "image_size": side,
        "patch_size": processor.patch_size,
        "geometry": processor.geometry(),
        "processor": processor.to_dict(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def processor_identity(processor: BackdropImageProcessor) -> dict[str, Any]:
    """Options of a processor and a digest of its detector's weights. Runs the detector once: it may be missing.

    Raises:
        ValueError: images must be split and there is no detector.
    """
    if processor.split:
        blank = processor.model_images([PILImage.new("RGB", (8, 8))])
        processor.detections(blank)  # fails here and not in every row; downloads what only has a name
    with tempfile.TemporaryDirectory() as folder:
        names = processor.save_detector(folder) if processor.split else []
        detector = {name: hashlib.sha256(Path(folder, name).read_bytes()).hexdigest() for name in names}
    # As JSON: it is compared with what was read from a file.
    return {"processor": processor.to_dict(), "detector": detector}


def groups_recipe(load_processor: LoadProcessor, source_digest: str, shard_rows: int = 64) -> Recipe:
    """Rows -> the same rows with patch groups."""
    processor = load_processor()
    return Recipe(
        make_work=partial(GroupWork, load_processor),
        identity={"kind": "groups", **processor_identity(processor), "source": source_digest},
        about=about_processor(processor),
        shard_rows=shard_rows,
    )
