"""The gateway as a whole: an ordinary request, its routes, metrics, starting and stopping."""

import asyncio
import functools

import httpx
import numpy as np
import pytest
from fake_engine import group_of, image_parts, red_scene, wait_until
from paths import EXAMPLE
from running_gateway import (
    HASHED_KEYS,
    KEEPER,
    KEYS,
    asked,
    question,
    refused,
    streamed_text,
)

from backdrop.processing.patch_groups_backdrop import BACKGROUND, group_to_image
from backdrop.serving import BackdropClient
from backdrop.serving import gateway as gateway_module
from backdrop.serving.client import GATEWAY_MARK
from backdrop.serving.gateway import Gateway
from backdrop.serving.settings import make_settings
from backdrop.serving.tenants import Tenants


def test_an_ordinary_request_becomes_groups(serve, engines, processor):
    engines[1].stop()
    gateway = serve(secret="secret")
    answer = gateway.ask(
        red_scene(14, 28), text="what is shown?", model="backdrop", max_tokens=9, temperature=0.5, seed=3
    )
    (body,) = engines[0].requests
    mark = Tenants(gateway.gateway.settings).cache_salt("default")
    background, objects = (group_of(part, processor) for part in engines[0].parts())
    assert np.flatnonzero(objects.patch_mask).tolist() == [9]
    assert np.array_equal(background.pixels + objects.pixels, np.asarray(red_scene(14, 28)))
    assert body["cache_salt"] == mark and len(mark) == 32
    assert all(part["uuid"].startswith(f"{mark}-") and len(part["uuid"]) == 73 for part in engines[0].parts())
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("backdrop", 9, 0.5, 3)
    assert answer.status_code == 200 and len(answer.headers["x-request-id"]) == 32
    assert (
        answer.json()["choices"][0]["message"]["content"]
        == f"{engines[0].parts()[0]['uuid']} | what is shown?"
    )
    # The processor itself counts as many tokens.
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is shown?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=text, images=[red_scene(14, 28)], add_special_tokens=False)
    assert answer.json()["usage"]["prompt_tokens"] == len(inputs["input_ids"][0])


def test_a_known_background_is_sent_as_the_reference(gateway, engines, processor):
    for x, shade in ((0, 90), (28, 92)):
        gateway.text(red_scene(x, 0, shade))
    first, second = asked(*engines)
    parts = image_parts(first["messages"])[0], image_parts(second["messages"])[0]
    assert parts[0] == parts[1] and group_of(parts[1], processor).pixels[-1, -1, 0] == 90


def test_split_off_sends_whole_images(serve, engines, processor):
    engines[1].stop()
    gateway = serve(split=False)
    for shade in (90, 92):
        gateway.text(red_scene(14, 14, shade))
    for body, shade in zip(engines[0].requests, (90, 92), strict=True):
        (part,) = image_parts(body["messages"])
        group = group_of(part, processor)
        assert group.kind == BACKGROUND and group.patch_mask.all()
        assert np.array_equal(group.pixels, np.asarray(red_scene(14, 14, shade)))


def test_the_model_is_marked_and_the_client_leaves_the_splitting(gateway, engines):
    (model,) = gateway.client.get(f"{gateway.url}/v1/models").json()["data"]
    assert model["id"] == "backdrop" and model[GATEWAY_MARK] is True
    with BackdropClient(f"{gateway.url}/v1") as client:
        answer = client.ask(red_scene(14, 14), "what?")
        streamed = "".join(client.stream(red_scene(28, 28), "what?"))
    first, second = asked(*engines)
    uuids = [image_parts(body["messages"])[0]["uuid"] for body in (first, second)]
    assert answer.text == streamed == f"{uuids[0]} | what?" and uuids[0] == uuids[1]


def test_our_own_client_names_its_cameras_and_learns_what_was_reused(gateway, engines, processor):
    with (
        BackdropClient(f"{gateway.url}/v1") as client,
        client.camera("gate") as gate,
        client.camera("yard") as yard,
    ):
        assert gate.ask(red_scene(14, 14), "q").patches_reused == 0
        known = gate.ask(red_scene(28, 28), "q")
        assert (known.patches, known.patches_reused) == (16, 14)
        assert yard.ask(red_scene(28, 28), "q").patches_reused == 0, "another camera's reference"
        assert gate.ask(red_scene(28, 28), "q", match=False).patches_reused == 0
        # A patch group stays one on its way through the gateway.
        images = processor.image_processor
        group = images.image_groups([red_scene(14, 14)])[0][1]
        client.ask(group_to_image(group, 14, images.geometry()), "q")
    sent = [image_parts(body["messages"]) for body in asked(*engines)]
    (part,) = next(parts for parts in sent if len(parts) == 1)
    assert np.array_equal(group_of(part, processor).pixels, group.pixels)


def test_other_paths_and_methods(gateway):
    for method, path, status in (
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/admin/references/a", 405),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
    ):
        answer = gateway.client.request(method, gateway.url + path)
        assert refused(answer, status, f"{method} {path} is not served")["code"] == "not_found"


def test_the_model_is_told_by_its_name_with_its_context(serve, engines):
    engines[0].context, engines[1].context = 4096, 2048
    gateway = serve(keys=HASHED_KEYS)
    get = functools.partial(gateway.client.get, headers={"Authorization": f"Bearer {KEYS['north']}"})
    (card,) = get(f"{gateway.url}/v1/models").json()["data"]
    assert card["id"] == "backdrop" and card["max_model_len"] == 2048, "what every replica takes"
    assert get(f"{gateway.url}/v1/models/backdrop").json() == card
    refused(get(f"{gateway.url}/v1/models/org/other"), 404, "'org/other' is not served; wanted 'backdrop'")
    refused(gateway.client.get(f"{gateway.url}/v1/models/backdrop"), 401, "no known key")


def test_pages_of_other_origins_are_let_in_only_where_configured(serve):
    page = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    asked = page | {"Access-Control-Request-Headers": "authorization,x-backdrop-camera"}
    for origins, allowed in (
        ([], None),
        (["https://page.example"], "https://page.example"),
        (["https://a.b"], None),
    ):
        gateway = serve(cors_origins=origins)
        before = gateway.client.options(f"{gateway.url}/v1/chat/completions", headers=asked)
        answer = gateway.client.get(f"{gateway.url}/v1/models", headers=page)
        for response in (before, answer):
            assert response.headers.get("access-control-allow-origin") == allowed
        if allowed:
            assert before.status_code == 200
            assert "x-backdrop-camera" in before.headers["access-control-allow-headers"]
            assert "x-backdrop-reference" in answer.headers["access-control-expose-headers"].lower()


def test_completions_without_a_chat_are_a_400(gateway):
    """A proxy takes a 404 for a server that has lost its model, and sends it nothing more."""
    for path in ("/v1/completions", "/completions"):
        answer = gateway.client.post(gateway.url + path, json={"prompt": "a"})
        assert refused(answer, 400, "wanted POST /v1/chat/completions")["code"] == "not_served"


def test_metrics_count_what_happened(gateway, engines):
    gateway.text(red_scene(0, 0))
    gateway.text(red_scene(14, 14))
    gateway.ask(model="gpt")
    metric = gateway.metric
    assert (metric("requests_total", status="200"), metric("requests_total", status="404")) == (2, 1)
    assert (metric("images_total", background="new"), metric("images_total", background="known")) == (1, 1)
    assert (metric("patches_total", kind="reused"), metric("patches_total", kind="fresh")) == (14, 18)
    assert (
        metric("prompt_tokens_total", kind="cached") == 15
        and metric("prompt_tokens_total", kind="computed") > 15
    )
    assert metric("first_token_seconds_count") == metric("split_seconds_count") == 2
    assert metric("requests_in_flight") == 0 and metric("retries_total") == 0
    shown = gateway.client.get(f"{gateway.url}/metrics", headers=KEEPER)
    assert shown.headers["content-type"].startswith("text/plain")
    for engine in engines:
        assert f'backdrop_replica_up{{replica="{engine.url}"}} 1.0' in shown.text


def test_a_failure_of_the_gateways_own_is_logged_and_releases_the_slot(serve, caplog, monkeypatch):
    gateway = serve(limits={"concurrent": 1})

    def broken(*arguments):
        raise KeyError("secret detail")

    monkeypatch.setattr(gateway_module, "engine_request", broken)
    for _ in range(2):
        answer = gateway.ask(red_scene())
        error = refused(answer, 500, f"its log names request {answer.headers['x-request-id']}")
        assert "secret" not in error["message"]
        assert f"request {answer.headers['x-request-id']}" in caplog.text
    monkeypatch.undo()
    assert gateway.ask(red_scene()).status_code == 200


def test_stopping_finishes_a_running_stream(serve, engines):
    for engine in engines:
        engine.mode = "slow"
        engine.step()
    gateway = serve()
    body = question(red_scene(), stream=True)
    with gateway.client.stream("POST", f"{gateway.url}/v1/chat/completions", json=body) as answer:
        pieces = answer.iter_raw()
        data = next(pieces)
        gateway.end()
        wait_until(lambda: not gateway.server.servers[0].is_serving())
        with pytest.raises(httpx.ConnectError), httpx.Client(trust_env=False, verify=False) as late:
            late.get(f"{gateway.url}/health")
        for engine in engines:
            engine.step(100)
        data += b"".join(pieces)
    assert streamed_text(data).endswith("| q")
    gateway.stop()
    assert gateway.gateway.client.is_closed
    with pytest.raises(RuntimeError, match="after shutdown"):
        gateway.gateway.workers.submit(int)


def test_the_processor_comes_from_where_the_engine_says(engines, processor):
    engines[0].processor = processor
    engines[0].root = str(EXAMPLE)
    try:
        gateway = Gateway(make_settings(replicas=["http://127.0.0.1:9", engines[0].url]))

        async def main():
            async with gateway.lifespan():
                return gateway.processor.image_processor.crop_size[
                    "height"
                ], gateway.splitter.processor.loaded_detector

        side, detector = asyncio.run(main())
        assert side == 168 and detector is not None
    finally:
        engines[0].root = "nowhere"


def test_without_a_processor_the_gateway_does_not_start():
    gateway = Gateway(make_settings(replicas=["http://127.0.0.1:9"]))

    async def main():
        with pytest.raises(ValueError, match="no replica says where its model is; set `processor`"):
            async with gateway.lifespan():
                pytest.fail("started")
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(main()) == 0 and gateway.client.is_closed
