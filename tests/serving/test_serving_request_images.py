"""The images of a request: fetched together, decoded one at a time, refused where they are none."""

import asyncio
import base64
import json
import weakref
from io import BytesIO

import httpx
import pytest
from fake_engine import data_url, group_of, image_parts, red_scene, wait_until
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from running_gateway import (
    asked,
    connection,
    question,
    refused,
)

from backdrop.processing.patch_groups_backdrop import METADATA_KEY
from backdrop.serving import request_images
from backdrop.serving.image_fetching import ImageFetcher

MARK = '{"geometry": "resize+crop", "image_size": 56, "patch_size": 14}'


def group_with(metadata: str, side: int = 56, mixed: bool = False) -> str:
    buffer, text = BytesIO(), PngInfo()
    text.add_text(METADATA_KEY, metadata)
    image = Image.new("RGBA", (side, side), (1, 2, 3, 253))
    if mixed:
        image.putpixel((0, 0), (1, 2, 3, 254))
    image.save(buffer, "PNG", pnginfo=text)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("image", "status", "message"),
    [
        ("data:image/png;base64,aGVsbG8=", 400, "an image of 5 bytes is none of PNG"),
        ("data:image/png,hello", 400, "wanted data:image/"),
        (data_url(Image.new("L", (300, 301))), 413, "an image has 300 x 301 pixels; wanted at most 90,000"),
        ("data:image/png;base64," + "A" * 40_000, 413, "an image has 30,000 bytes; wanted at most 20,000"),
        ("http://127.0.0.1/a.png", 400, "images are not fetched from host '127.0.0.1'; allowed: none"),
        ("file:///etc/passwd", 400, "scheme 'file'"),
        ("/etc/passwd", 400, "an image of 8 bytes is none of PNG"),  # it is base64
        ("c3/etc.png", 400, "an image is no base64"),
        (group_with("{}"), 400, "A patch group was made with image_size None; wanted 56"),
        (group_with("[1]"), 400, "an image cannot be split"),
        (group_with("not JSON"), 400, "an image cannot be split"),
        (group_with("[" * 10_000), 400, "an image cannot be split"),
        (group_with(MARK, side=28), 400, "A patch group is 28 x 28 pixels; wanted 56 x 56"),
        (group_with(MARK, mixed=True), 400, "A patch group's alpha mixes [253, 254]"),
    ],
    ids=range(14),
)
def test_a_bad_image_is_refused(refusing, image, status, message):
    refused(refusing.ask(red_scene(), image), status, message)


class SlowWeb:
    """Hosts that answer with an image, an error, or never; counts those who left."""

    def __init__(self):
        self.asked, self.left = 0, 0

    async def resolve(self, host, port):
        return ["93.184.216.34"]

    async def answer(self, request):
        self.asked += 1
        if request.url.path == "/slow":
            try:
                await asyncio.sleep(9)
            finally:
                self.left += 1
        if request.url.path == "/missing":
            return httpx.Response(404)
        data = base64.b64decode(data_url(red_scene(14, 14)).split(",")[1])

        async def parts():
            yield data

        return httpx.Response(200, content=parts())

    def parts(self) -> dict:
        fetcher = ImageFetcher(["example.org"], 5.0, 10_000, self.resolve, httpx.MockTransport(self.answer))
        return {"fetcher": fetcher}


def test_images_are_fetched_and_split(serve, engines, processor):
    gateway = serve(SlowWeb().parts())
    gateway.text("http://example.org/a.png", red_scene(0, 0))
    kinds = [group_of(part, processor).kind for part in image_parts(asked(*engines)[0]["messages"])]
    assert kinds == [0, 1, 0, 1]


def test_one_image_that_fails_ends_the_fetching_of_the_others(serve, engines):
    web = SlowWeb()
    gateway = serve(web.parts())
    answer = gateway.ask("http://example.org/slow", "http://example.org/missing", "http://example.org/slow")
    refused(answer, 400, "host 'example.org' answered 404 for an image")
    wait_until(lambda: web.left == web.asked - 1, 1)
    assert asked(*engines) == []


def test_fetched_images_are_bounded_together(serve, engines):
    size = len(base64.b64decode(data_url(red_scene(14, 14)).split(",")[1]))
    gateway = serve(SlowWeb().parts(), limits={"body_bytes": 3 * size})
    assert gateway.ask(*["http://example.org/a.png"] * 3).status_code == 200
    refused(gateway.ask(*["http://example.org/a.png"] * 4), 413, "images are too large together")


def test_a_client_that_leaves_ends_the_fetching(serve, engines):
    web = SlowWeb()
    gateway = serve(web.parts())
    body = json.dumps(question("http://example.org/slow")).encode()
    with connection(gateway, f"Content-Length: {len(body)}") as sending:
        sending.sendall(body)
        wait_until(lambda: web.asked)
    wait_until(lambda: web.left == 1, 1)
    wait_until(gateway.is_idle)
    assert asked(*engines) == []


def test_images_are_decoded_one_at_a_time(serve, engines, monkeypatch):
    """A request of a few kilobytes may hold gigabytes of pixels."""
    kept, opened = [], []
    original = request_images.open_image

    def counting(data, *bounds):
        image = original(data, *bounds)
        opened.append(sum(earlier() is not None for earlier in kept))
        kept.append(weakref.ref(image))
        return image

    monkeypatch.setattr(request_images, "open_image", counting)
    gateway = serve(workers=1)
    gateway.text(*[red_scene(14, 14).resize((211, 123)) for _ in range(4)])
    assert opened == [0] * 4
