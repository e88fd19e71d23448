"""Images of every kind, from everywhere, and those that are named and refused."""

import base64
import http.server
import io
import threading

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from red_square import groups_of, scene

from backdrop.processing.patch_groups_backdrop import save_group

MODES = ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBA", "I;16", "I", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(image_processor, mode):
    grey = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1)))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(
            np.asarray(grey).astype("int32" if mode == "I" else "float32") * (257 if mode == "I" else 1)
        )
    else:
        image = (
            grey.convert("RGB").convert({"LA": "L", "PA": "P", "LAB": "RGB"}.get(mode, mode))
            if mode != "LAB"
            else grey.convert("RGB")
        )
        if mode in ("LA", "PA"):
            image = image.convert("RGBA").convert(mode) if mode == "LA" else image.convert("PA")
    pixels = image_processor.model_images([image])[0]
    assert pixels.shape == (56, 56, 3) and pixels.dtype == np.uint8
    if mode not in ("1", "P", "PA", "F"):
        assert abs(int(pixels[28, 40, 0]) - int(np.asarray(grey.resize((56, 56), 3))[28, 40])) < 12


def test_transparency_is_laid_on_white(image_processor):
    clear = Image.new("RGBA", (56, 56), (255, 0, 0, 0))
    assert (image_processor.model_images([clear])[0] == 255).all()
    palette = Image.new("P", (56, 56), 0)
    palette.info["transparency"] = 0
    assert (image_processor.model_images([palette])[0] == 255).all()


def test_exif_rotation_is_applied(image_processor, tmp_path):
    image = tiny.photo(80, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "r.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    expected = image_processor.model_images([upright])[0]
    assert np.array_equal(image_processor.model_images([str(tmp_path / "r.png")])[0], expected)
    assert np.array_equal(image_processor.model_images([Image.open(tmp_path / "r.png")])[0], expected)


def test_arrays_and_tensors_equal_the_pil_image(image_processor):
    image = tiny.photo()
    expected = image_processor(image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    for same in (
        array,
        array.transpose(2, 0, 1).copy(),
        array.astype(np.float32) / 255,
        array.astype(np.int64),
        torch.from_numpy(array.transpose(2, 0, 1).copy()),
        torch.from_numpy(array.transpose(2, 0, 1).copy()).float() / 255,
    ):
        assert torch.equal(image_processor(same, return_tensors="pt")["pixel_values"], expected)
    grey = image_processor(Image.fromarray(array[..., 0]), return_tensors="pt")["pixel_values"]
    assert torch.equal(image_processor(array[..., :1], return_tensors="pt")["pixel_values"], grey)


def test_paths_urls_and_base64_keep_a_groups_alpha(image_processor, tmp_path):
    group = groups_of(image_processor, scene(14, 14))[0]
    save_group(group, tmp_path / "g.png")
    data = (tmp_path / "g.png").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/g.png" else 404)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    expected = image_processor(group, return_tensors="pt")
    coded = base64.b64encode(data).decode()
    for source in (str(tmp_path / "g.png"), url + "/g.png", coded, "data:image/png;base64," + coded):
        found = image_processor(source, return_tensors="pt")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="cannot be fetched"):
        image_processor(url + "/missing.png")
    server.shutdown()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("no/such/file.png", "Incorrect image source 'no/such/file.png'"),
        (np.zeros((10, 10, 2), dtype=np.uint8), r"shape \(10, 10, 2\); wanted 1, 3 or 4 channels"),
        (np.full((10, 10, 3), 300, dtype=np.int32), "values from 300 to 300; wanted"),
        (np.full((10, 10, 3), np.nan), "not finite"),
        (np.full((10, 10, 3), -1.0), "values from -1 to -1"),
    ],
    ids=range(5),
)
def test_bad_images_are_named(image_processor, image, message):
    with pytest.raises(ValueError, match=message):
        image_processor(image)


def test_a_truncated_file_is_named(image_processor, tmp_path):
    buffer = io.BytesIO()
    tiny.photo(300, 300).save(buffer, format="JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:500])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(ValueError, match=f"{name}' cannot be read"):
            image_processor(str(tmp_path / name))
