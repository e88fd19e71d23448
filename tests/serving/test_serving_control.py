"""Cameras, strictness and bypass by request, and what a response tells about its background."""

import numpy as np
import pytest
from fake_engine import image_parts, red_scene
from PIL import Image
from running_gateway import HASHED_KEYS, KEYS, asked, events_of, question, refused


def said(answer) -> dict:
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["backdrop"]


def shaded(difference: int = 0, x: int = 0) -> Image.Image:
    """A scene, all of it brighter by so many grey levels but for the object."""
    pixels = np.asarray(red_scene(x)).astype(int)
    pixels[..., :2] += difference
    pixels[:14, x : x + 14] = (255, 0, 0)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def ways(**control) -> list[tuple[dict, dict]]:
    """The same control as headers, and as a field of the body: further fields, and headers."""
    headers = {f"X-Backdrop-{name.capitalize()}": str(value) for name, value in control.items()}
    return [({}, headers), ({"backdrop": control}, {}), ({"extra_body": {"backdrop": control}}, {})]


WAYS = pytest.mark.parametrize("way", range(3), ids=["headers", "body", "extra_body"])


def ask(gateway, picture, way: int = 0, key=None, stream: bool = False, **control):
    fields, headers = ways(**control)[way]
    return gateway.post(question(picture, stream=stream, **fields), key, **headers)


@WAYS
def test_cameras_of_one_key_match_their_own_references_only(gateway, engines, way):
    assert said(ask(gateway, shaded(), way, camera="gate"))["references"] == [None]
    known = said(ask(gateway, shaded(3, 28), way, camera="gate"))
    assert known["patches"] == {"reused": 14, "fresh": 2, "stale": 1} and known["references"][0]
    other = said(ask(gateway, shaded(3, 28), way, camera="yard"))
    assert other["references"] == [None] and other["patches"]["reused"] == 0
    assert said(ask(gateway, shaded(3, 28), way))["references"] == [None], (
        "without a camera it is another namespace"
    )
    yard, gate = (image_parts(asked(*engines)[n]["messages"])[0]["uuid"] for n in (2, 1))
    assert yard != gate, "the other camera's pixels were sent"


@WAYS
def test_strict_reuses_equal_pixels_only(gateway, way):
    ask(gateway, shaded())
    assert said(ask(gateway, shaded(1, 28), way, match="strict"))["patches"]["reused"] == 0
    assert said(ask(gateway, shaded(1, 28), way, match="on"))["patches"]["reused"] >= 14


@WAYS
def test_off_neither_uses_references_nor_leaves_any(gateway, way):
    ask(gateway, shaded(), way, match="off")
    assert gateway.gateway.splitter.matcher.stats()["references"] == 0
    ask(gateway, shaded())
    found = said(ask(gateway, shaded(0, 28), way, match="off"))
    assert found["references"] == [None] and found["patches"] == {"reused": 0, "fresh": 16, "stale": 0}


@WAYS
def test_the_tolerance_of_one_request(gateway, way):
    ask(gateway, shaded())
    assert said(ask(gateway, shaded(6, 28), way, tolerance=2))["patches"]["reused"] == 0
    assert said(ask(gateway, shaded(6, 28), way, tolerance=8.5))["patches"]["reused"] >= 14
    assert gateway.gateway.splitter.matcher.tolerance == 10, "the gateway's own stays"


def test_a_header_wins(gateway):
    ask(gateway, shaded())
    body = question(shaded(0, 28), backdrop={"match": "off", "camera": None})
    assert said(gateway.post(body, **{"X-Backdrop-Match": "ON"}))["patches"]["reused"] == 14
    assert said(gateway.post(body))["patches"]["reused"] == 0


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"match": "maybe"}, "wanted on, strict, off"),
        ({"tolerance": 256}, "wanted 0 to 255"),
        ({"tolerance": -1}, "wanted 0 to 255"),
        ({"tolerance": "nan"}, "wanted 0 to 255"),
        ({"camera": "c" * 129}, "wanted 1 to 128 printable characters"),
    ],
)
@pytest.mark.parametrize("way", [0, 1])
def test_wrong_control_is_named(refusing, control, words, way):
    refused(ask(refusing, red_scene(), way, **control), 400, words)


def test_other_wrong_control(refusing):
    refused(refusing.ask(backdrop=[1]), 400, "backdrop is a list; wanted an object")
    refused(
        refusing.ask(backdrop={"cam": "a"}),
        400,
        "unknown field backdrop.cam; wanted camera, match, tolerance",
    )
    refused(refusing.ask(backdrop={"camera": 5}), 400, "backdrop.camera is 5")
    refused(refusing.ask(backdrop={"tolerance": True}), 400, "backdrop.tolerance is True")


def test_the_user_may_be_the_camera(serve):
    gateway = serve(camera_from_user=True)
    assert said(gateway.ask(shaded(), user="gate"))["patches"]["reused"] == 0
    assert said(gateway.ask(shaded(0, 28), user="gate"))["patches"]["reused"] == 14
    assert said(gateway.ask(shaded(0, 28), user="yard"))["patches"]["reused"] == 0
    assert (
        said(gateway.ask(shaded(0, 14), user="yard", backdrop={"camera": "gate"}))["patches"]["reused"] == 14
    )
    assert gateway.ask(shaded(), user="").status_code == 200
    plain = serve()
    plain.ask(shaded(), user="gate")
    assert said(plain.ask(shaded(0, 28), user="yard"))["patches"]["reused"] == 14, (
        "only where it is configured"
    )


def test_no_camera_reaches_another_tenants_references(serve):
    gateway = serve(keys=HASHED_KEYS)
    north, south = (gateway.gateway.tenants.cache_salt(name) for name in KEYS)
    ask(gateway, shaded(), key=KEYS["north"])
    ask(gateway, shaded(), key=KEYS["north"], camera="gate")
    for camera in ("gate", f"../{north}", f"{north}/gate", north, "/", "."):
        found = said(ask(gateway, shaded(0, 28), key=KEYS["south"], camera=camera))
        assert found["references"] == [None]
    assert {known.namespace.split("/")[0] for known in gateway.gateway.splitter.matcher.known()} == {
        north,
        south,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_headers_tell_what_the_usage_tells(gateway, stream):
    first = ask(gateway, shaded(), stream=stream)
    answer = ask(gateway, shaded(0, 28), stream=stream)
    assert first.headers["x-backdrop-reference"] == "-"
    assert (answer.headers["x-backdrop-patches-reused"], answer.headers["x-backdrop-patches-fresh"]) == (
        "14",
        "2",
    )
    assert (
        answer.headers["x-backdrop-patches-stale"] == "1"
        and len(answer.headers["x-backdrop-reference"]) == 12
    )
    assert {"wait", "images"} <= {part.split(";")[0] for part in answer.headers["server-timing"].split(", ")}
    if not stream:
        told = said(answer)
        assert told["references"] == [answer.headers["x-backdrop-reference"]]
        assert 0 <= told["seconds"]["images"] <= told["seconds"]["first_token"]


def test_a_streams_last_event_has_the_figures(gateway):
    ask(gateway, shaded())
    body = question(shaded(0, 28), stream=True, stream_options={"include_usage": True})
    usage = events_of(gateway.post(body).content)[-2]["usage"]
    assert usage["backdrop"]["patches"] == {"reused": 14, "fresh": 2, "stale": 1}
    assert usage["prompt_tokens"] and set(usage["backdrop"]["seconds"]) >= {
        "wait",
        "images",
        "first_token",
        "answer",
    }
    silent = events_of(ask(gateway, shaded(), stream=True).content)
    assert not any(event != "[DONE]" and event.get("usage") for event in silent)


def test_names_of_references_tell_nothing_of_other_tenants(serve):
    gateway = serve(keys=HASHED_KEYS)
    names = []
    for key in KEYS.values():
        ask(gateway, shaded(), key=key)
        names += said(ask(gateway, shaded(0, 28), key=key))["references"]
    assert len(set(names)) == 2 and not any(name.isdecimal() and int(name) < 10 for name in names)
