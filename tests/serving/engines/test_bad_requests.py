"""Ten thousand requests that cannot be served: a 4xx that says why, and memory that stays flat."""

import asyncio
import base64
import itertools
import json
import struct
import threading
import time
import zlib
from http.client import HTTPConnection
from io import BytesIO

import httpx
import numpy as np
import psutil
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from running import KEYS

from backdrop.processing.patch_groups_backdrop import METADATA_KEY
from backdrop.scenes.world import render_scene
from backdrop.serving import BackdropClient

REQUESTS = 10_000
AT_ONCE = 16
GROWTH = 32 * 2**20  # bytes
PEAK = 128 * 2**20  # with 16 at a time, a megabyte each


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a few hundred bytes that says it has `side` x `side` pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def mpo_of(jpeg: bytes) -> bytes:
    """A JPEG behind the mark of a file of several pictures."""
    buffer = BytesIO()
    picture = Image.new("RGB", (8, 8))
    picture.save(buffer, "MPO", save_all=True, append_images=[picture])
    found = buffer.getvalue()
    segment = found[found.index(b"\xff\xe2") :]
    return jpeg[:2] + segment[: 2 + int.from_bytes(segment[2:4], "big")] + jpeg[2:]


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def message(*parts) -> dict:
    return {"model": "backdrop", "messages": [{"role": "user", "content": list(parts)}], "max_tokens": 4}


def image(url: str, **more) -> dict:
    return {"type": "image_url", "image_url": {"url": url}, **more}


def bad_requests() -> list[tuple[str, bytes, int, str, dict]]:
    """(name, body, status, word of the message, headers)"""
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    buffer = BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", progressive=True)
    scans = buffer.getvalue()
    last = scans.rindex(b"\xff\xda")
    scans = scans[:last] + 1000 * scans[last:-2] + scans[-2:]
    text = {"type": "text", "text": "What is shown?"}
    good = image(data_url(jpeg, "jpeg"))
    mixed = Image.new("RGBA", (168, 168), (1, 2, 3, 253))
    mixed.putpixel((0, 0), (1, 2, 3, 254))
    buffer = BytesIO()
    mark = PngInfo()
    mark.add_text(METADATA_KEY, json.dumps({"image_size": 168, "patch_size": 14, "geometry": "resize+crop"}))
    mixed.save(buffer, "PNG", pnginfo=mark)
    hidden = mpo_of(scans)
    cases = [
        ("not an image", message(image(data_url(b"hello" * 50)), text), 400, "image"),
        ("truncated", message(image(data_url(jpeg[: 3 * len(jpeg) // 4], "jpeg")), text), 400, "damaged"),
        ("bomb", message(image(data_url(bomb())), text), 413, "pixels"),
        ("scans", message(image(data_url(scans, "jpeg")), text), 413, "scans"),
        ("hidden scans", message(image(data_url(hidden, "jpeg")), text), 413, "scans"),
        ("placeholders", message({"type": "text", "text": "<image>" * 10_000}), 400, "context, 512"),
        ("a long text", message({"type": "text", "text": "a" * 20_000}), 400, "context, 512"),
        ("misspelt", message(text) | {"temprature": 0}, 400, "temperature"),
        ("lost", message(text | {"caption": "a bus"}), 400, "caption"),
        ("uuid", message(image(good["image_url"]["url"], uuid="0" * 40), text), 400, "uuid"),
        ("private address", message(image("http://169.254.169.254/latest"), text), 400, "169.254"),
        ("loopback", message(image("http://127.0.0.1:8000/x.png"), text), 400, "127.0.0.1"),
        ("file", message(image("file:///etc/passwd"), text), 400, "scheme"),
        ("many images", message(*[good] * 17, text), 400, "17 image(s)"),
        ("far too many", message(*[good] * 257, text), 413, "257 images"),
        ("salt", message(good, text) | {"cache_salt": "north"}, 400, "cache_salt"),
        ("groups mixed", message(image(data_url(buffer.getvalue())), text), 400, "group"),
        ("list", [], 400, "object"),
        ("model", message(text) | {"model": "gpt"}, 404, "gpt"),
        ("role", {"messages": [{"role": "root", "content": "x"}]}, 400, "role"),
    ]
    key = {"Authorization": f"Bearer {KEYS['north']}"}
    made = [(name, json.dumps(body).encode(), status, word, key) for name, body, status, word in cases]
    made.append(("no json", b'{"messages": [', 400, "JSON", key))
    made.append(("deep", b'{"messages": ' + b"[" * 100_000, 400, "JSON", key))
    values = (
        b'{"messages": [{"role": "user", "content": "x"}], "metadata": {"a": [' + b"{}," * 300_000 + b"{}]}}"
    )
    made.append(("values", values, 413, "values", key))
    made.append(("no key", json.dumps(message(text)).encode(), 401, "key", {}))
    made.append(("wrong key", json.dumps(message(text)).encode(), 401, "key", {"Authorization": "Bearer x"}))
    return made


async def send(url: str, case, client: httpx.AsyncClient) -> None:
    name, body, status, word, headers = case
    answer = await client.post(f"{url}/v1/chat/completions", content=body, headers=headers)
    said = answer.json()["error"]["message"]
    assert answer.status_code == status and word in said, (name, answer.status_code, said)
    assert len(said) < 500 and "\n" not in said, (name, said)


def test_ten_thousand_bad_requests(stack):
    cases = bad_requests()
    gateway = psutil.Process(stack.process.pid)

    async def run(count: int) -> None:
        turns = itertools.islice(itertools.cycle(cases), count)
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:

            async def one() -> None:
                for case in turns:
                    await send(stack.url, case, client)

            await asyncio.gather(*(one() for _ in range(AT_ONCE)))

    asyncio.run(run(len(cases) * 20))  # pools and caches fill up
    before = gateway.memory_info().rss
    peak, ended = [before], threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            peak.append(gateway.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        asyncio.run(run(REQUESTS))
    finally:
        ended.set()
        watching.join()
    grown, risen = gateway.memory_info().rss - before, max(peak) - before
    print(
        f"{REQUESTS:,} bad requests: memory {grown / 2**20:+.1f} MiB, at most {risen / 2**20:+.1f} MiB between"
    )
    assert grown < GROWTH, f"{grown / 2**20:.1f} MiB"
    assert risen < PEAK, f"{risen / 2**20:.1f} MiB"
    assert stack.metric("backdrop_requests_in_flight") == 0
    scene = render_scene("phone", 115_900, 1)
    client = BackdropClient(f"{stack.url}/v1", api_key=KEYS["south"])
    assert client.ask(scene.image, "What colour is the wallpaper?").text == next(
        q.answer for q in scene.questions if q.topic == "wallpaper"
    )


def test_an_idle_connection_outlives_the_clients_own_limit(stack):
    """httpx closes idle connections after 5 s; a gateway that did so at the same moment would reset a request."""
    host, port = stack.url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=30)
    connection.connect()
    kept = connection.sock
    for seconds in (6, 0):
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        assert connection.sock is kept  # http.client opens another where the server has closed it
        time.sleep(seconds)


def test_a_body_that_is_too_large_is_not_read(stack):
    key = {"Authorization": f"Bearer {KEYS['north']}"}

    def endless():
        for _ in range(64):
            yield b"x" * 2**20

    for content in (b"x" * (33 * 2**20), endless()):
        try:
            answer = httpx.post(f"{stack.url}/v1/chat/completions", content=content, headers=key, timeout=30)
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            continue  # the gateway closed the connection before all was sent, which is as good
        assert answer.status_code == 413 and "body" in answer.json()["error"]["message"]
