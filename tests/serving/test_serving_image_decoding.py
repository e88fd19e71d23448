"""Encoded images from strangers: nothing is decoded that is too large, and damage is named."""

import base64
import random
import struct
import tracemalloc
import zlib
from io import BytesIO

import numpy as np
import pytest
import tiny
from PIL import Image, ImageOps

from backdrop.serving.image_decoding import FORMATS, decode_data_url, open_image
from backdrop.serving.problems import ApiError

PIXELS = 10_000


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, rows: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever follows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(more)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def refused(status: int, message: str, function, *arguments) -> ApiError:
    with pytest.raises(ApiError, match=message) as caught:
        function(*arguments)
    assert caught.value.status == status and "\n" not in caught.value.message
    return caught.value


def test_a_data_url_is_decoded():
    data = bytes(range(256))
    for size in (0, 1, 2, 3, 4, 255, 256):
        url = "data:image/png;base64," + base64.b64encode(data[:size]).decode()
        assert decode_data_url(url, 256) == data[:size]
        assert decode_data_url(url, max(size, 1)) == data[:size]


@pytest.mark.parametrize("size", range(8, 14))
def test_a_byte_too_many_is_refused_before_it_is_decoded(size):
    url = "data:image/png;base64," + base64.b64encode(bytes(size)).decode()
    assert len(decode_data_url(url, size)) == size
    refused(413, f"an image has {size} bytes; wanted at most {size - 1}", decode_data_url, url, size - 1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64", "wanted data:image/"),
        ("data:image/png,AAAA", "wanted data:image/"),
        ("data:" + "x" * 1000, "begins 'data:x{35}'"),
        ("data:image/png;base64,AAAAA", "no base64"),
        ("data:image/png;base64,AA=A", "no base64"),
        ("data:image/png;base64,AA===", "no base64"),
        ("data:image/png;base64,AAAA!", "no base64"),
        ("data:image/png;base64,\u00e4\u00e4\u00e4\u00e4", "no base64"),
        ("data:image/png;base64,\ud800AAA", "no base64"),
    ],
)
def test_what_is_no_data_url_is_named(url, message):
    refused(400, message, decode_data_url, url, 100)


@pytest.mark.parametrize(
    "write",
    [
        lambda text: "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76)) + "\r\n",
        lambda text: f" {text}\n",
        lambda text: text.rstrip("="),
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.replace("+", "-").replace("/", "_").rstrip("="),
        lambda text: text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
    ],
    ids=["line breaks", "spaces", "no padding", "URL-safe", "URL-safe without padding", "percent"],
)
@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:image/PNG;BASE64,", " data:;base64,", ""])
def test_base64_is_read_as_clients_write_it(write, head):
    for size in (1, 2, 3, 200, 201, 202):
        data = random.Random(size).randbytes(size)
        url = head + write(base64.b64encode(data).decode())
        assert decode_data_url(url, size) == data
        if size > 1:
            refused(413, f"an image has {size} bytes", decode_data_url, url, size - 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_decoded(kind):
    image = open_image(encoded(tiny.photo(20, 10), kind), PIXELS)
    assert (image.format, image.size) == (kind, (20, 10))
    image.getpixel((3, 3))


def test_alpha_is_kept():
    group = Image.new("RGBA", (4, 4), (1, 2, 3, 253))
    assert open_image(encoded(group), PIXELS).getpixel((0, 0)) == (1, 2, 3, 253)


def test_an_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = tiny.photo(20, 10)
    upright = open_image(encoded(image, exif=exif), PIXELS)
    assert upright.size == (10, 20)
    assert upright.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert ImageOps.exif_transpose(upright).size == (10, 20)  # not turned a second time


def test_broken_exif_is_named():
    broken = encoded(tiny.photo(20, 10), exif=b"Exif\0\0XX\0*\0\0\0\x08")
    refused(400, "a PNG image of [0-9,]+ bytes is damaged: not a TIFF file", open_image, broken, PIXELS)


def test_one_pixel_too_many_is_refused():
    assert open_image(encoded(Image.new("L", (100, 100))), PIXELS).size == (100, 100)
    refused(
        413,
        "an image has 100 x 101 pixels; wanted at most 10,000",
        open_image,
        encoded(Image.new("L", (100, 101))),
        PIXELS,
    )


@pytest.mark.parametrize("side", [60_000, 20_000, 9_000])
def test_a_bomb_is_refused_by_its_header(side, monkeypatch):
    bomb = png(side, side, rows=bytes(100_000))
    assert len(bomb) < 1000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("was decoded"))
    tracemalloc.start()
    try:
        refused(413, "pixels; wanted at most 40,000,000", open_image, bomb, 40_000_000)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_jpeg_of_many_scans_is_refused():
    """Twelve bytes a scan, and each is a pass over the whole image."""
    buffer = BytesIO()
    Image.radial_gradient("L").convert("RGB").save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert 1 < data.count(b"\xff\xda") < 20
    assert open_image(data, 10**6).size == (256, 256)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(ApiError, match="scans; wanted at most 64") as caught:
        open_image(data[:last] + 100 * data[last:-2] + data[-2:], 10**6)
    assert caught.value.status == 413


def many_scans() -> bytes:
    data = encoded(Image.radial_gradient("L").convert("RGB"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + 100 * data[last:-2] + data[-2:]


def test_a_jpeg_of_several_pictures_hides_no_scans():
    """PIL calls it an MPO, and its first picture is decoded as any other."""
    buffer = BytesIO()
    photo = tiny.photo(40, 30)
    photo.save(buffer, "MPO", save_all=True, append_images=[photo])
    data = buffer.getvalue()
    assert Image.open(BytesIO(data)).format == "MPO"
    assert open_image(data, PIXELS).size == (40, 30)
    app2 = data[data.index(b"\xff\xe2") :]
    segment = app2[: 2 + int.from_bytes(app2[2:4], "big")]
    hidden = many_scans()
    hidden = hidden[:2] + segment + hidden[2:]
    refused(413, "scans; wanted at most 64", open_image, hidden, 10**6)


def test_a_phones_picture_is_decoded_at_reduced_size():
    photo = tiny.photo(800, 600, seed=3)
    data = encoded(photo, "JPEG", quality=95)
    for pixels, size in (
        (480_000, (800, 600)),
        (479_999, (400, 300)),
        (30_001, (200, 150)),
        (8_000, (100, 75)),
    ):
        small = open_image(data, pixels, 480_000)
        assert small.size == size
        close = np.asarray(photo.resize(size, Image.Resampling.BOX), float) - np.asarray(small, float)
        assert np.abs(close).mean() < 6
    refused(413, "800 x 600 pixels; wanted at most 1,000", open_image, data, 1_000, 480_000)
    refused(413, "800 x 600 pixels", open_image, data, 100_000, 479_999)
    refused(413, "800 x 600 pixels", open_image, encoded(photo), 100_000, 480_000)


def test_memory_of_a_large_picture_is_bounded():
    """A JPEG of several scans, progressive or not, is kept as coefficients: its memory does not shrink with its size."""
    photo = tiny.photo(800, 600)
    refused(413, "800 x 600", open_image, encoded(photo, "JPEG", progressive=True), 100_000, 10**6)
    baseline = encoded(photo, "JPEG")
    scan = baseline.index(b"\xff\xda")
    one_component = baseline[: scan + 4] + b"\x01" + baseline[scan + 5 :]  # claims that others follow
    refused(413, "800 x 600", open_image, one_component, 100_000, 10**6)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = open_image(encoded(photo, "JPEG", exif=exif), 120_000, 10**6)
    assert upright.size == (300, 400)


def test_a_webp_bomb_is_refused():
    refused(413, "200 x 200 pixels", open_image, encoded(Image.new("RGB", (200, 200)), "WEBP"), PIXELS)
    size = struct.pack("<I", 16_382)[:3]
    data = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + size
    data += b"VP8L" + struct.pack("<I", 8) + bytes([0x2F]) + bytes(7)
    bomb = b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data
    with pytest.raises(
        ApiError, match="pixels|is none of"
    ):  # depends on whether this Pillow decodes WebP on opening
        open_image(bomb, 40_000_000)


def test_a_text_that_unpacks_to_megabytes_is_refused():
    text = zlib.compress(bytes(4 * 2**20))
    bomb = png(8, 8, chunk(b"zTXt", b"k\0\0" + text), rows=bytes(8 * 25))
    refused(400, "none of|damaged", open_image, bomb, PIXELS)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://169.254.169.254/"/></svg>'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an image has 0 bytes"),
        (b"hello", "an image of 5 bytes is none of PNG, JPEG, WEBP, GIF, BMP"),
        (SVG, "is none of"),
        (b"%PDF-1.7\n", "is none of"),
        (b"\x89PNG\r\n\x1a\n", "is none of"),
        (encoded(Image.new("L", (4, 4)), "TIFF", compression="jpeg"), "a TIFF image is compressed by 'jpeg'"),
        (encoded(Image.new("L", (4, 4)), "ICO"), "is none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is none of"),
        (
            encoded(tiny.photo(90, 90), "JPEG")[:1200],
            "a JPEG image of 1,200 bytes is damaged: image file is truncated",
        ),
        (encoded(tiny.photo(90, 90), "JPEG")[:300], "an image of 300 bytes is none of"),
        (encoded(tiny.photo(60, 60), "PNG")[:2000], "a PNG image of 2,000 bytes is damaged"),
        (png(8, 8, rows=bytes(3)), "is damaged"),
        (png(0, 8), "is none of|damaged"),
    ],
    ids=[
        "empty",
        "text",
        "svg",
        "pdf",
        "signature",
        "tiff",
        "ico",
        "eps",
        "cut jpeg",
        "cut head",
        "cut png",
        "short png",
        "no width",
    ],
)
def test_what_is_no_image_is_named(data, message):
    refused(400, message, open_image, data, PIXELS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_damage_is_a_400_or_an_image(kind):
    options = {"exif": Image.Exif()} if kind in ("PNG", "JPEG", "WEBP") else {}
    if options:
        options["exif"][0x0112] = 6
    whole = encoded(tiny.photo(24, 24), kind, **options)
    chance = random.Random(0)
    seen = set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(min(len(data), chance.choice([64, 200, 10**6])))] = chance.randrange(256)
        if chance.random() < 0.3:
            data = data[: chance.randrange(len(data))]
        try:
            ImageOps.exif_transpose(open_image(bytes(data), PIXELS)).convert("RGB")  # as the processor does
            seen.add(200)
        except ApiError as problem:
            seen.add(problem.status)
    assert {200, 400} <= seen <= {200, 400, 413}
