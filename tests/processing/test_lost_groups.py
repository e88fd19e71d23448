"""Patch groups that stopped being groups are named; ordinary pictures, whatever is black in them, are not."""

import io

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from backdrop.processing.image_loading_backdrop import is_group
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.lost_groups_backdrop import lost_group
from backdrop.processing.patch_groups_backdrop import (
    BACKGROUND,
    METADATA_KEY,
    OBJECT,
    group_to_image,
    make_group,
    save_group,
)

SIDE, PATCH, GRID = 112, 14, 8


@pytest.fixture(scope="module")
def images():
    return BackdropImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, patch_size=PATCH, split=False
    )


def photo(seed: int = 0, low: int = 60) -> np.ndarray:
    """A textured picture, uint8 `[S, S, 3]`, nowhere darker than `low`."""
    smooth = np.asarray(tiny.photo(SIDE, SIDE, seed)).astype(float)
    noise = np.random.default_rng(seed).normal(0, 6, smooth.shape)
    return np.clip(low + smooth * (255 - low) / 255 + noise, low, 255).astype(np.uint8)


def holes() -> np.ndarray:
    """Where a background has two objects, bool `[P]`."""
    mask = np.zeros((GRID, GRID), dtype=bool)
    mask[1:3, 2:5] = mask[5:7, 0:3] = True
    return mask.reshape(-1)


def group(kind: int = BACKGROUND, geometry: str = "resize+crop") -> Image.Image:
    mask = ~holes() if kind == BACKGROUND else holes()
    return group_to_image(make_group(photo(), mask, kind, PATCH), PATCH, geometry)


def through_file(image: Image.Image, suffix: str, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def marked(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    save_group(image, file)
    return Image.open(io.BytesIO(file.getvalue()))


def scaled(image: Image.Image, top: float) -> np.ndarray:
    return np.asarray(image).astype(np.float32) / (255 / top)


LOST = {
    "RGB, its text left": lambda image: marked(image).convert("RGB"),
    "a palette, its text left": lambda image: marked(image).convert("P"),
    "resized, its text left": lambda image: marked(image).resize((80, 80)),
    "grey, its text left": lambda image: marked(image).convert("L"),
    "opaque, its text left": lambda image: opaque(marked(image)),
    "RGB": lambda image: unmarked(image),
    "PNG": lambda image: through_file(unmarked(image), "PNG"),
    "a palette in a PNG": lambda image: through_file(
        unmarked(image).convert("P", palette=1, colors=256), "GIF"
    ),
    "JPEG": lambda image: through_file(unmarked(image), "JPEG"),
    "good JPEG": lambda image: through_file(unmarked(image), "JPEG", quality=95),
    "lossy WebP": lambda image: through_file(unmarked(image), "WEBP", quality=80),
    "an array": lambda image: np.asarray(image)[..., :3],
    "a tensor": lambda image: torch.from_numpy(np.asarray(image)[..., :3].copy()).permute(2, 0, 1),
    "floats 0-255": lambda image: scaled(image, 255),
    "floats 0-1": lambda image: scaled(image, 1),
    "a float tensor": lambda image: torch.from_numpy(scaled(image, 1)).permute(2, 0, 1),
}


def unmarked(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image)[..., :3])


def opaque(image: Image.Image) -> Image.Image:
    image.putalpha(255)
    return image


@pytest.mark.parametrize("kind", [BACKGROUND, OBJECT], ids=["background", "object"])
@pytest.mark.parametrize("lose", LOST.values(), ids=LOST)
def test_what_was_a_group_is_named(images, lose, kind):
    lost = lose(group(kind))
    with pytest.raises(ValueError, match="was a patch group|patch group is 80 x 80") as error:
        images([lost], return_tensors="pt")
    assert "\n" not in str(error.value)


def test_groups_themselves_go_through_every_door(images, tmp_path):
    made = group()
    expected = images([made], return_tensors="pt")
    assert expected["patch_mask"][0].tolist() == (~holes()).tolist()
    save_group(made, tmp_path / "g.png")
    made.save(tmp_path / "plain.png")  # without its text: PIL writes none by itself
    made.save(tmp_path / "g.webp", lossless=True, exact=True)
    doors = [
        *(images.fetch_images(str(tmp_path / name)) for name in ("g.png", "plain.png", "g.webp")),
        np.asarray(made),
        torch.from_numpy(np.asarray(made).copy()).permute(2, 0, 1),
        made.copy(),
        through_file(made, "TIFF"),
    ]
    for image in doors:
        found = images([image], return_tensors="pt")
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
        assert torch.equal(found["patch_mask"], expected["patch_mask"])


def test_a_column_of_groups_keeps_them(images):
    datasets = pytest.importorskip("datasets")
    file = io.BytesIO()
    save_group(group(OBJECT), file)
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": file.getvalue(), "path": None}]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    assert images([rows[0]["image"]])["group_kind"] == [OBJECT]


@pytest.mark.parametrize("alpha", [253, 254])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (90, 70)])
def test_one_alpha_all_over_is_an_ordinary_picture_unless_its_text_says_otherwise(
    images, alpha, size, tmp_path
):
    picture = Image.fromarray(photo()).resize(size).convert("RGBA")
    picture.putalpha(alpha)
    for suffix in ("PNG", "WEBP", "TIFF"):
        file = through_file(picture, suffix, **({"lossless": True} if suffix == "WEBP" else {}))
        assert not is_group(file, SIDE)
        assert images([file])["group_kind"] == [BACKGROUND]
    if size != (SIDE, SIDE):
        assert images([picture])["group_kind"] == [BACKGROUND]  # in memory too: no group has this size


@pytest.mark.parametrize("kind", [BACKGROUND, OBJECT])
def test_a_group_of_all_patches_is_known_by_its_text_or_in_memory(images, kind):
    whole = group_to_image(
        make_group(photo(), np.ones(GRID**2, dtype=bool), kind, PATCH), PATCH, "resize+crop"
    )
    for image in (marked(whole), whole, np.asarray(whole), Image.fromarray(np.asarray(whole))):
        assert images([image])["group_kind"] == [kind]


@pytest.mark.parametrize("text", ["{", "[]", "3", "", '{"image_size": "a"}', "\x00", '{"image_size": 112'])
def test_a_damaged_text_is_named(images, text):
    image = group()
    image.info[METADATA_KEY] = text
    with pytest.raises(ValueError, match="patch group"):
        images([image])


# ---- ordinary pictures


def black(shape, fill=0):
    return np.full((*shape, 3), fill, dtype=np.uint8)


def barred(top=0, bottom=0, left=0, right=0, low=0):
    pixels = photo(3, low).copy()
    pixels[: top * PATCH] = pixels[SIDE - bottom * PATCH :] = 0
    pixels[:, : left * PATCH] = pixels[:, SIDE - right * PATCH :] = 0
    return pixels


def checkered(cell: int, light=255):
    board = (np.indices((SIDE, SIDE)) // cell).sum(axis=0) % 2
    return np.repeat((board * light).astype(np.uint8)[..., None], 3, axis=2)


def night(seed: int):
    """A picture of which much is exactly black, with soft borders."""
    return np.clip(photo(seed, 0).astype(int) * 2 - 255, 0, 255).astype(np.uint8)


def boxed(top: int, left: int, height: int, width: int):
    """A photograph with a black bar, as over a face."""
    pixels = photo(5).copy()
    pixels[top : top + height, left : left + width] = 0
    return pixels


ORDINARY = {
    "black": black((SIDE, SIDE)),
    "nearly black": black((SIDE, SIDE), 3),
    "white": black((SIDE, SIDE), 255),
    "photograph": photo(),
    "letterboxed": barred(top=2, bottom=2),
    "letterboxed, bright": barred(top=1, bottom=3, low=60),
    "pillarboxed": barred(left=2, right=2, low=60),
    "framed in black": barred(1, 1, 1, 1, low=60),
    "half black": barred(top=4, low=60),
    "half black, upright": barred(left=4, low=60),
    "a quarter of it shown": barred(top=4, left=4, low=60),
    **{f"night {seed}": night(seed) for seed in range(4)},
    **{f"checkerboard of {cell}": checkered(cell) for cell in (7, 14, 28, 56, 10)},
    "dark checkerboard": checkered(14, 40),
    "a bar over a face": boxed(31, 20, 15, 60),
    "a bar between lines of the grid in one direction": boxed(28, 20, 28, 60),
    "a drawing": np.kron(np.eye(GRID, dtype=np.uint8)[..., None], black((PATCH, PATCH), 200)),
}


@pytest.mark.parametrize("pixels", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_pictures_are_taken_as_they_are(images, pixels):
    picture = Image.fromarray(pixels)
    forms = [picture, pixels, pixels.astype(np.float32) / 255, torch.from_numpy(pixels.copy())]
    forms += [
        through_file(picture, "PNG"),
        picture.convert("RGBA"),
        picture.convert("P"),
        picture.convert("L"),
    ]
    forms += [through_file(picture, "JPEG", quality=quality) for quality in (60, 90)]
    for form in forms:
        assert images([form])["group_kind"] == [BACKGROUND]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(
        st.tuples(st.integers(0, SIDE), st.integers(0, SIDE), st.integers(1, 60), st.integers(1, 60)),
        min_size=1,
        max_size=3,
    ),
)
def test_black_boxes_off_the_grid_never_alarm(seed, boxes):
    pixels = photo(seed % 50).copy()
    for top, left, height, width in boxes:
        # One pixel off the grid on one side is enough.
        top += top % PATCH == 0
        pixels[top : top + height, left : left + width] = 0
    assert lost_group(Image.fromarray(pixels), SIDE, PATCH) is None


def test_bundled_photographs_are_ordinary_and_their_groups_are_known():
    """Two photographs that ship with ultralytics, as they are and with two objects cut out of them."""
    assets = pytest.importorskip("ultralytics.utils").ASSETS
    side, grid = 336, 24
    mask = np.zeros((grid, grid), dtype=bool)
    mask[6:12, 3:9] = mask[14:20, 12:20] = True
    for name in ("bus.jpg", "zidane.jpg"):
        if not (assets / name).is_file():
            pytest.skip("the photographs are not there")
        pixels = np.asarray(Image.open(assets / name).convert("RGB").resize((side, side)))
        for picture in (pixels, pixels[:, ::-1], np.where(pixels < 90, 0, pixels)):
            assert lost_group(Image.fromarray(picture), side, 14) is None
            assert lost_group(through_file(Image.fromarray(picture), "JPEG"), side, 14) is None
    cut = make_group(np.maximum(pixels, 40), ~mask.reshape(-1), BACKGROUND, 14).pixels
    assert lost_group(Image.fromarray(cut), side, 14) is not None
