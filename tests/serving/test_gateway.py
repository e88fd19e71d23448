"""The gateway under a real server, with fake engines behind it: who gets what, what is refused, what survives."""

import asyncio
import base64
import contextlib
import json
import socket
import threading
import time
import weakref
from io import BytesIO

import httpx
import numpy as np
import pytest
import yaml
from fake_engine import (
    PIECE,
    AppThread,
    FakeEngine,
    data_url,
    group_of,
    image_parts,
    red_processor,
    red_scene,
    wait_until,
)
from paths import EXAMPLE
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from backdrop.processing.patch_groups_backdrop import BACKGROUND, METADATA_KEY, group_to_image
from backdrop.serving import BackdropClient
from backdrop.serving.chat import MAX_MESSAGES, PASSED_ON
from backdrop.serving.client import GATEWAY_MARK
from backdrop.serving.gateway import Gateway
from backdrop.serving.images import ImageFetcher
from backdrop.serving.replicas import Replicas
from backdrop.serving.settings import load_settings, make_settings
from backdrop.serving.tenants import Tenants, hash_key

MODEL = EXAMPLE
KEYS = {"north": "key-of-north", "south": "key-of-south"}
HASHED = {hash_key(key): tenant for tenant, key in KEYS.items()}


@pytest.fixture(scope="module")
def processor():
    return red_processor()


@pytest.fixture(scope="module")
def running_engines(processor):
    found = [FakeEngine(processor), FakeEngine(processor)]
    for engine in found:
        engine.start()
    yield found
    for engine in found:
        engine.stop()


@pytest.fixture
def engines(running_engines):
    for engine in running_engines:
        engine.reset()
        if engine._thread is None:
            engine.start()
    yield running_engines
    for engine in running_engines:
        assert not engine.mixed_up, "one uuid for two groups"
        engine.mode, engine.modes = "answer", []
        engine.step(1000)


class Running(AppThread):
    """A gateway that is served: what it is asked, and what it must not keep."""

    def __init__(self, gateway: Gateway):
        super().__init__(gateway.app())
        self.gateway = gateway
        self.client = httpx.Client(trust_env=False, timeout=10, verify=False)

    def post(self, body, key: str | None = None, **headers) -> httpx.Response:
        """`body`: a dictionary, or bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return self.client.post(f"{self.url}/v1/chat/completions", content=content, headers=headers)

    def ask(self, *images, text: str = "q", key: str | None = None, **fields) -> httpx.Response:
        """A question about images."""
        return self.post(question(*images, text=text, **fields), key)

    def text(self, *images, **options) -> str:
        """The answer to it."""
        answer = self.ask(*images, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def health(self) -> dict[str, str]:
        return self.client.get(f"{self.url}/health").json()["replicas"]

    def metric(self, name: str, **labels) -> float:
        return self.gateway.metrics.registry.get_sample_value(f"backdrop_{name}", labels) or 0.0

    def wait_for(self, engine: FakeEngine, up: bool = True) -> None:
        """Until an engine is seen to be up, or down."""
        (replica,) = [r for r in self.gateway.replicas.replicas if r.url == engine.url]
        wait_until(lambda: replica.up == up)

    def is_idle(self) -> bool:
        """Whether every place is free, and nothing is in work."""
        gateway = self.gateway
        return (
            gateway._admission._places._value == gateway.settings.limits.concurrent
            and gateway._admission._waiting == 0
            and self.metric("requests_in_flight") == self.metric("requests_waiting") == 0
            and all(replica.in_flight == 0 for replica in gateway.replicas.replicas)
            and set(self.tasks()) <= {"AppThread._serve", "LifespanOn.main", "Replicas._watch"}
        )


@pytest.fixture
def serve(engines, processor):
    """Starts gateways; at the end none may hold a place, a task or a request."""
    with contextlib.ExitStack() as stack:

        def start(parts: dict | None = None, **values) -> Running:
            values = {"replicas": [engine.url for engine in engines], "health_seconds": 0.05, **values}
            gateway = Gateway(make_settings("test", **values), **{"processor": processor, **(parts or {})})
            running = Running(gateway)
            stack.callback(running.client.close)
            stack.enter_context(running)
            stack.callback(lambda: running._thread and wait_until(running.is_idle))
            return running

        yield start


@pytest.fixture
def gateway(serve):
    return serve()


@pytest.fixture(scope="module")
def one_gateway(running_engines, processor):
    """For requests that never get as far as an engine."""
    for engine in running_engines:
        engine.reset()
        if engine._thread is None:
            engine.start()
    gateway = Gateway(
        make_settings(
            replicas=[engine.url for engine in running_engines],
            health_seconds=60,
            limits={"image_pixels": 90_000, "image_bytes": 20_000},
        ),
        processor,
    )
    with Running(gateway) as running:
        yield running
        running.client.close()


@pytest.fixture
def refusing(one_gateway, engines):
    """The same; no engine may have been asked at the end, and nothing be kept."""
    yield one_gateway
    assert asked(*engines) == []
    wait_until(one_gateway.is_idle)


def question(*images, text: str = "q", **fields) -> dict:
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}], **fields}


def refused(answer: httpx.Response, status: int, *words: str) -> dict:
    """The error of a refusal, whose one line has all these words."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert all(word in error["message"] for word in words), error["message"]
    assert "\n" not in error["message"] and error["code"] and error["type"] and error["param"] is None
    return error


def events_of(data: bytes) -> list:
    """The events of a stream: decoded, the last one "[DONE]"."""
    pieces = data.decode().split("\n\n")
    assert pieces.pop() == ""
    assert all(piece.startswith("data: ") for piece in pieces)
    return [
        piece[6:] if piece == "data: [DONE]" else json.loads(piece.removeprefix("data: ")) for piece in pieces
    ]


def streamed_text(data: bytes) -> str:
    """The text of a whole stream."""
    *events, last = events_of(data)
    assert last == "[DONE]"
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


def salt(engine: FakeEngine, number: int = -1) -> str:
    return engine.requests[number]["cache_salt"]


def asked(*engines: FakeEngine) -> list[dict]:
    return [body for engine in engines for body in engine.requests]


# ---- ordinary requests


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
    # As the processor counts them.
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


def test_images_stay_where_they_are_in_the_conversation(gateway, engines):
    messages = [
        {"role": "system", "content": "be brief"},
        question(red_scene(0, 0), red_scene(14, 14), text="first")["messages"][0],
        {"role": "assistant", "content": "yes"},
        question(text="no image")["messages"][0],
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "before"},
                *question(red_scene(width=0, shade=9), text="last")["messages"][0]["content"],
            ],
        },
    ]
    assert gateway.post({"messages": messages}).status_code == 200
    (body,) = asked(*engines)
    kinds = [
        [part["type"] for part in message["content"]]
        if isinstance(message["content"], list)
        else message["content"]
        for message in body["messages"]
    ]
    assert kinds == [
        "be brief",
        ["image_url"] * 4 + ["text"],
        "yes",
        ["text"],
        ["text", "image_url", "text"],
    ]
    assert [message["role"] for message in body["messages"]] == [message["role"] for message in messages]


def test_an_image_url_may_be_a_string(gateway, engines):
    body = question(red_scene())
    body["messages"][0]["content"][0]["image_url"] = data_url(red_scene())
    assert gateway.post(body).status_code == 200 and len(image_parts(asked(*engines)[0]["messages"])) == 2


def test_text_alone_goes_to_the_least_busy(gateway, engines):
    for engine in engines:
        engine.mode = "slow"
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(gateway.text())) for _ in range(4)]
    for started, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda started=started: len(asked(*engines)) == started)
    assert [len(engine.requests) for engine in engines] == [2, 2]
    for engine in engines:
        engine.step(2)
    for thread in threads:
        thread.join()
    assert answers == ["None | q"] * 4


def test_every_field_that_may_be_set_is_passed_on(gateway, engines):
    values = {
        "max_tokens": 5,
        "max_completion_tokens": 6,
        "n": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["x"],
        "stream": False,
        "seed": 1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "text"},
        "user": "me",
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "metadata": {"a": "b"},
    }
    assert gateway.ask(red_scene(), **values).status_code == 200
    body = asked(*engines)[0]
    assert {name: body[name] for name in values} == values
    assert set(values) | {"model", "messages", "logit_bias", "stream_options"} == PASSED_ON


def test_the_gateways_own_logit_bias_wins(gateway, engines, processor):
    token = str(processor.image_token_id)
    assert gateway.ask(logit_bias={token: 100, "7": 5}).status_code == 200
    bias = asked(*engines)[0]["logit_bias"]
    assert bias[token] == -100 and bias["7"] == 5
    assert {bias[str(token)] for token in processor.separator_token_ids} == {-100}


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


def test_replicas_may_call_the_model_by_other_names(serve, engines):
    engines[1].name = "backdrop-2"
    try:
        gateway = serve()
        names = {gateway.client.get(f"{gateway.url}/v1/models").json()["data"][0]["id"]}
        for shade in range(0, 250, 20):
            gateway.text(red_scene(width=0, shade=shade), model=next(iter(names)))
        assert all(engine.requests for engine in engines)
        assert {body["model"] for body in engines[1].requests} == {"backdrop-2"}
    finally:
        engines[1].name = "backdrop"


def test_the_model_is_marked_and_the_client_leaves_the_splitting(gateway, engines):
    (model,) = gateway.client.get(f"{gateway.url}/v1/models").json()["data"]
    assert model["id"] == "backdrop" and model[GATEWAY_MARK] is True
    with BackdropClient(f"{gateway.url}/v1") as client:
        answer = client.ask(red_scene(14, 14), "what?")
        streamed = "".join(client.stream(red_scene(28, 28), "what?"))
    first, second = asked(*engines)
    uuids = [image_parts(body["messages"])[0]["uuid"] for body in (first, second)]
    assert answer.text == streamed == f"{uuids[0]} | what?" and uuids[0] == uuids[1]


# ---- tenants


def test_tenants_share_nothing(serve, engines, processor):
    engines[1].stop()
    gateway = serve(keys=HASHED)
    for tenant, shade in (("north", 90), ("south", 92), ("north", 93), ("south", 88)):
        text = gateway.text(red_scene(shade=shade), key=KEYS[tenant])
        assert text.startswith(salt(engines[0]))
    north, south = salt(engines[0], 0), salt(engines[0], 1)
    assert north != south and [salt(engines[0], n) for n in (2, 3)] == [north, south]
    shades = [int(group_of(engines[0].parts(n)[0], processor).pixels[-1, -1, 0]) for n in range(4)]
    assert shades == [90, 92, 90, 92]  # each its own reference, never the other's
    for number, mark in enumerate((north, south, north, south)):
        assert all(part["uuid"].startswith(f"{mark}-") for part in engines[0].parts(number))


def test_equal_frames_of_two_tenants_have_nothing_in_common_at_the_engine(serve, engines):
    engines[1].stop()
    gateway = serve(keys=HASHED)
    for key in KEYS.values():
        gateway.text(red_scene(), key=key)
    uuids = [{part["uuid"] for part in engines[0].parts(number)} for number in (0, 1)]
    assert not uuids[0] & uuids[1] and salt(engines[0], 0) != salt(engines[0], 1)
    cached = gateway.ask(red_scene(), key=KEYS["north"]).json()["usage"]["prompt_tokens_details"]
    assert cached == {"cached_tokens": 15}


def test_marks_come_from_the_secret():
    settings = [
        make_settings(replicas=["http://a"], secret=secret) for secret in ("one", "one", "two", None, None)
    ]
    marks = [Tenants(each).cache_salt("north") for each in settings]
    assert marks[0] == marks[1] and len(set(marks)) == 4
    assert Tenants(settings[0]).cache_salt("south") != marks[0]
    assert all(len(mark) == 32 and not set(mark) - set("0123456789abcdef") for mark in marks)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Basic key-of-north",
        "key-of-north",
        "Bearer key-of-north x",
        "Bearer \xe4",
    ],
)
def test_without_a_key_nothing_is_answered(serve, engines, header):
    gateway = serve(keys=HASHED)
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    body = json.dumps(question(red_scene())).encode()
    for answer in (
        gateway.client.post(f"{gateway.url}/v1/chat/completions", content=body, headers=headers),
        gateway.client.get(f"{gateway.url}/v1/models", headers=headers),
    ):
        refused(answer, 401, "no known key; wanted Bearer KEY")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert asked(*engines) == []


def test_keys_are_asked_for_in_any_case_of_the_scheme(serve):
    gateway = serve(keys=HASHED)
    headers = {"Authorization": f"bearer  {KEYS['south']}"}
    assert gateway.client.get(f"{gateway.url}/v1/models", headers=headers).status_code == 200
    assert gateway.client.get(f"{gateway.url}/health").status_code == 200


# ---- what is refused


@pytest.mark.parametrize(
    "name",
    [
        "cache_salt",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "chat_template",
        "chat_template_kwargs",
        "add_generation_prompt",
        "add_special_tokens",
        "continue_final_message",
        "documents",
        "echo",
        "kv_transfer_params",
        "priority",
        "prompt_logprobs",
        "request_id",
        "skip_special_tokens",
        "stop_token_ids",
        "structured_outputs",
        "truncate_prompt_tokens",
        "vllm_xargs",
        "Model",
        "anything",
    ],
)
def test_fields_that_clients_may_not_set_are_named(refusing, name):
    refused(refusing.ask(red_scene(), **{name: None}), 400, name)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": data_url(red_scene())}, "uuid": "mine"},
        # vLLM would fetch this URL and trust this uuid.
        {"type": "text", "text": "hi", "uuid": "mine", "image_url": "http://169.254.169.254/"},
    ],
    ids=["image", "text"],
)
def test_a_uuid_cannot_be_set(refusing, part):
    body = {"messages": [{"role": "user", "content": [part]}]}
    refused(refusing.post(body), 400, "messages[0].content[0].uuid cannot be set")
    part = {**part, "uuid": None}
    answer = refusing.post({"messages": [{"role": "user", "content": [part]}]})
    refused(answer, 400, "unknown field messages[0].content[0].")


@pytest.mark.parametrize("name", ["image_url", "image_embeds", "audio_url", "image_pil", "cache_control"])
def test_a_text_is_nothing_but_a_text(refusing, name):
    part = {"type": "text", "text": "hi", name: "http://169.254.169.254/"}
    answer = refusing.post({"messages": [{"role": "user", "content": [part]}]})
    refused(answer, 400, f"unknown field messages[0].content[0].{name}")


def test_another_model_is_not_there(gateway, engines):
    error = refused(gateway.ask(model="gpt"), 404, "'gpt' is not served; wanted 'backdrop'")
    assert error["code"] == "model_not_found"
    refused(gateway.ask(model=["backdrop"]), 404, "is not served")
    assert gateway.ask(model=None).status_code == 200 and len(asked(*engines)) == 1


def user(*parts) -> dict:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


PLAIN = b'{"messages":[{"role":"user","content":"hi"}],'
BAD_BODIES = {
    "empty": (b"", "no JSON"),
    "text": (b"hello", "no JSON"),
    "cut": (b'{"messages": [', "no JSON"),
    "no UTF-8": (b'{"messages": "\xff"}', "no JSON"),
    "a huge number": (PLAIN + b'"seed":' + b"9" * 5000 + b"}", "no JSON"),
    "nested": (nested(100_000), "no JSON"),
    "nested in a field": (PLAIN + b'"metadata":' + nested(100_000) + b"}", "no JSON"),
    "list": (b"[]", "the body is a list; wanted a JSON object"),
    "null": (b"null", "the body is a NoneType"),
    "string": (b'"hi"', "the body is a str"),
    "no messages": ({}, "messages is missing"),
    "messages an object": ({"messages": {}}, "messages is missing"),
    "no message": ({"messages": []}, "messages is missing or empty"),
    "message a text": ({"messages": ["hi"]}, "messages[0] has no role"),
    "no role": ({"messages": [{"content": "hi"}]}, "messages[0] has no role"),
    "another role": ({"messages": [{"role": "root", "content": "hi"}]}, "messages[0] has no role"),
    "role a list": ({"messages": [{"role": [], "content": "hi"}]}, "messages[0] has no role"),
    "content a number": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content is a int"),
    "part a text": (user("hi"), "messages[0].content[0] has the type None"),
    "no type": (user({"image_url": "http://a/"}), "has the type None"),
    "type a list": (user({"type": []}), "has the type []"),
    "video": (user({"type": "video_url", "video_url": {"url": "http://a/"}}), "has the type 'video_url'"),
    "audio": (user({"type": "input_audio"}), "has the type 'input_audio'"),
    "embeddings": (user({"type": "image_embeds", "image_embeds": "x"}), "has the type 'image_embeds'"),
    "no text": (user({"type": "text"}), "messages[0].content[0].text is missing"),
    "text a number": (user({"type": "text", "text": 5}), "messages[0].content[0].text is missing"),
    "no image": (user({"type": "image_url"}), "image_url has no url"),
    "url a number": (user({"type": "image_url", "image_url": {"url": 5}}), "image_url has no url"),
    "empty url": (user({"type": "image_url", "image_url": {"url": ""}}), "image_url has no url"),
    "an assistant's image": (
        {"messages": [{"role": "assistant", "content": question(red_scene())["messages"][0]["content"]}]},
        "is an image of the assistant; wanted the user's",
    ),
    "many messages": (
        {"messages": [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)},
        "1,025 messages",
    ),
    "n": (question(n=5), "n is 5; wanted 1 to 4"),
    "n zero": (question(n=0), "n is 0"),
    "n true": (question(n=True), "n is True"),
    "max_tokens": (question(max_tokens=4097), "max_tokens is 4097; wanted 1 to 4,096"),
    "max_tokens text": (question(max_tokens="5"), "max_tokens is '5'"),
    "max_completion_tokens": (question(max_completion_tokens=10**9), "max_completion_tokens is 1000000000"),
    "stream text": (question(stream="no"), "stream is 'no'; wanted true or false"),
    "stream number": (question(stream=1), "stream is 1"),
    "stream_options list": (question(stream=True, stream_options=[]), "stream_options is a list"),
    "stream_options text": (question(stream=True, stream_options="x"), "stream_options is a str"),
    "usage with each event": (
        question(stream=True, stream_options={"continuous_usage_stats": True}),
        "unknown field stream_options.continuous_usage_stats",
    ),
    "logit_bias list": (question(logit_bias=[]), "logit_bias is a list"),
    "logit_bias words": (question(logit_bias={"a": 1}), "logit_bias has the token 'a'"),
    "logit_bias space": (question(logit_bias={" 5": 1}), "logit_bias has the token ' 5'"),
    "logit_bias zero": (question(logit_bias={"05": 1}), "logit_bias has the token '05'"),
    "logit_bias digits": (question(logit_bias={"\u0665": 1}), "logit_bias has the token"),
    "logit_bias long": (question(logit_bias={"9" * 5000: 1}), "logit_bias has the token"),
    "not a number": (PLAIN + b'"temperature":NaN}', "the body holds what JSON does not"),
    "infinite": (PLAIN + b'"temperature":1e999}', "the body holds what JSON does not"),
    "half a character": (
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        "the body holds what JSON does not",
    ),
    "half a key": (PLAIN + b'"metadata":{"\\ud800":1}}', "the body holds what JSON does not"),
}


@pytest.mark.parametrize(("body", "message"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_a_400_that_says_why(refusing, body, message):
    refused(refusing.post(body), 400, message)


def test_a_body_of_a_million_nothings_is_not_parsed(refusing):
    refused(refusing.post(PLAIN + b'"metadata":{"a":[' + b"{}," * 999_999 + b"{}]}}"), 413, "JSON values")


def test_fields_of_a_message_are_named(gateway, engines):
    def message(**fields):
        return {"messages": [{"role": "user", "content": "hi", **fields}]}

    refused(gateway.post(message(bogus=1)), 400, "unknown field messages[0].bogus")
    refused(gateway.post(message(name="<image>")), 400, "messages[0].name has 1 times '<image>'")
    tools = [{"type": "function", "function": {"name": "f", "description": "<image>"}}]
    refused(gateway.post(message() | {"tools": tools}), 400, "tools has 1 times '<image>'")
    # What clients send back of an answer is empty there, and not passed on.
    assert gateway.post(message(refusal=None, annotations=[], name="Ann")).status_code == 200
    assert asked(*engines)[0]["messages"] == [{"role": "user", "content": "hi", "name": "Ann"}]


@pytest.mark.parametrize("depth", range(100, 1100, 50))
def test_no_depth_of_nesting_is_a_failure(one_gateway, engines, depth):
    answer = one_gateway.post(PLAIN + b'"metadata":' + nested(depth) + b"}")
    assert answer.status_code in (200, 400), answer.text


def test_placeholders_and_separators_in_a_text_are_refused(refusing):
    answer = refusing.ask(red_scene(), text="<image>" * 10_000)
    refused(answer, 400, "messages[0] has 10,000 times '<image>', which only the chat template may write")
    for token in ("<image>", "[BG_START]", "[OBJ_END]", "<s>", "</s>", "<pad>"):
        refused(refusing.ask(text=f"a{token}b"), 400, f"1 times '{token}'")
        messages = [{"role": "system", "content": token}, {"role": "user", "content": "hi"}]
        refused(refusing.post({"messages": messages}), 400, "messages[0] has 1 times")


def test_a_placeholder_in_two_pieces_is_refused(refusing, processor):
    """The chat template joins the texts of a message."""
    pieces = [{"type": "text", "text": text} for text in ("<ima", "ge>")]
    text = processor.apply_chat_template([{"role": "user", "content": pieces}])
    assert "<image>" in text, "the template does not join: the check is for nothing"
    refused(refusing.post(user(*pieces)), 400, "messages[0] has 1 times '<image>'")
    image = question(red_scene())["messages"][0]["content"][0]
    refused(refusing.post(user(pieces[0], image, pieces[1])), 400, "messages[0] has 1 times '<image>'")


def test_too_many_images(serve, engines):
    gateway = serve(limits={"images": 2})
    assert gateway.ask(red_scene(), red_scene()).status_code == 200
    refused(
        gateway.ask(red_scene(), red_scene(), red_scene()), 413, "the request has 3 images; wanted at most 2"
    )
    earlier = [question(red_scene())["messages"][0]] * 3  # in other turns
    refused(gateway.post({"messages": earlier}), 413, "3 images")


def group_with(metadata: str, side: int = 56, alpha: int = 253) -> str:
    buffer, text = BytesIO(), PngInfo()
    text.add_text(METADATA_KEY, metadata)
    Image.new("RGBA", (side, side), (1, 2, 3, alpha)).save(buffer, "PNG", pnginfo=text)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def mixed_group() -> Image.Image:
    image = Image.new("RGBA", (56, 56), (1, 2, 3, 253))
    image.putpixel((0, 0), (1, 2, 3, 254))
    return image


@pytest.mark.parametrize(
    ("image", "status", "message"),
    [
        ("data:image/png;base64,aGVsbG8=", 400, "an image of 5 bytes is none of PNG"),
        ("data:image/png,hello", 400, "wanted data:image/"),
        (data_url(Image.new("L", (300, 301))), 413, "an image has 300 x 301 pixels; wanted at most 90,000"),
        ("data:image/png;base64," + "A" * 40_000, 413, "an image has 30,000 bytes; wanted at most 20,000"),
        ("http://127.0.0.1/a.png", 400, "images are not fetched from host '127.0.0.1'; allowed: none"),
        ("file:///etc/passwd", 400, "scheme 'file'"),
        ("/etc/passwd", 400, "scheme ''"),
        (group_with("{}"), 400, "A patch group was made with image_size None; wanted 56"),
        (group_with("[1]"), 400, "an image cannot be split"),
        (group_with("not JSON"), 400, "an image cannot be split"),
        (group_with("[" * 10_000), 400, "an image cannot be split"),
        (Image.new("RGBA", (28, 28), (1, 2, 3, 253)), 400, "A patch group is 28 x 28 pixels; wanted 56 x 56"),
        (mixed_group(), 400, "A patch group's alpha mixes [253, 254]"),
    ],
    ids=range(13),
)
def test_a_bad_image_is_refused(refusing, image, status, message):
    refused(refusing.ask(red_scene(), image), status, message)


def test_a_group_is_taken_as_it_stands(gateway, engines, processor):
    images = processor.image_processor
    group = images.image_groups([red_scene(14, 14)])[0][1]
    gateway.text(group_to_image(group, 14, images.geometry()))
    (part,) = image_parts(asked(*engines)[0]["messages"])
    assert np.array_equal(group_of(part, processor).pixels, group.pixels)


def test_other_paths_and_methods(gateway):
    for method, path, status in (
        ("GET", "/", 404),
        ("POST", "/v1/completions", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
    ):
        answer = gateway.client.request(method, gateway.url + path)
        assert refused(answer, status, f"{method} {path} is not served")["code"] == "not_found"


# ---- bodies


@contextlib.contextmanager
def connection(gateway: Running, *headers: str):
    """A connection of one's own, on which a POST has begun."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as found:
        head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", "Host: gateway", *headers, "", ""])
        found.sendall(head.encode())
        yield found


def status_of(connection: socket.socket) -> tuple[int, str]:
    """Status and body of an answer, whose connection may go on."""
    data = b""
    while b"\r\n\r\n" not in data or not data.endswith(b"}"):
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def test_a_body_that_declares_too_much_is_not_read(serve):
    gateway = serve(limits={"body_bytes": 10_000})
    with connection(gateway, "Content-Length: 10001") as sending:
        status, body = status_of(sending)
    assert status == 413 and "the body has more than 10,000 bytes" in body
    padded = json.dumps(question()).encode()
    assert gateway.post(padded + b" " * (10_000 - len(padded))).status_code == 200


def test_a_body_in_chunks_is_read_up_to_the_limit(serve):
    gateway = serve(limits={"body_bytes": 10_000})
    with connection(gateway, "Transfer-Encoding: chunked") as sending:
        for _ in range(11):
            sending.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        status, body = status_of(sending)  # the last chunk never comes
    assert status == 413 and "the body has more than 10,000 bytes" in body


def test_a_body_that_does_not_come_is_a_408(serve):
    gateway = serve(limits={"read_seconds": 0.2, "concurrent": 1})
    with connection(gateway, "Content-Length: 1000") as sending:
        sending.sendall(b"{")
        status, body = status_of(sending)
    assert status == 408 and "the body did not arrive within 0.2 s" in body
    assert gateway.ask().status_code == 200


def test_who_leaves_while_sending_frees_the_place(serve):
    gateway = serve(limits={"concurrent": 1})
    with connection(gateway, "Content-Length: 1000") as sending:
        sending.sendall(b"{")
        wait_until(lambda: gateway.metric("requests_in_flight") == 1)
    wait_until(gateway.is_idle)
    assert gateway.ask().status_code == 200 and gateway.metric("requests_total", status="499") == 1


# ---- places


def in_thread(function, *arguments, **options) -> tuple[threading.Thread, list]:
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments, **options)))
    thread.start()
    return thread, found


def test_a_busy_gateway_says_when_to_come_back(serve, engines):
    engines[1].stop()
    engines[0].mode = "slow"
    gateway = serve(limits={"concurrent": 1, "waiting": 1})
    first, first_answer = in_thread(gateway.ask, text="first")
    wait_until(lambda: engines[0].requests)
    second, second_answer = in_thread(gateway.ask, text="second")
    wait_until(lambda: gateway.metric("requests_waiting") == 1)
    answer = gateway.ask(text="third")
    refused(answer, 429, "1 requests are in work and 1 wait")
    assert answer.headers["retry-after"] == "1" and len(engines[0].requests) == 1
    engines[0].step(2)
    first.join()
    second.join()
    assert first_answer[0].json()["choices"][0]["message"]["content"].endswith("first")
    assert second_answer[0].json()["choices"][0]["message"]["content"].endswith("second")
    assert gateway.metric("requests_total", status="429") == 1


def test_nobody_waits_longer_than_allowed(serve, engines):
    engines[1].stop()
    engines[0].mode = "slow"
    gateway = serve(limits={"concurrent": 1, "wait_seconds": 0.05})
    first, _ = in_thread(gateway.ask)
    wait_until(lambda: engines[0].requests)
    answer = gateway.ask()
    refused(answer, 429, "no place within 0.05 s")
    assert answer.headers["retry-after"] == "1"
    engines[0].step()
    first.join()


def test_a_stream_holds_its_place_to_the_end(serve, engines):
    engines[1].stop()
    engines[0].mode = "slow"
    gateway = serve(limits={"concurrent": 1, "waiting": 0})
    engines[0].step()
    with gateway.client.stream(
        "POST", f"{gateway.url}/v1/chat/completions", json=question(stream=True, text="a" * 50)
    ) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        refused(gateway.ask(), 429, "1 requests are in work and 0 wait")
        engines[0].step(100)
        for _ in pieces:
            pass
    engines[0].mode = "answer"
    wait_until(gateway.is_idle)
    assert gateway.ask().status_code == 200


# ---- replicas that fail


@pytest.mark.parametrize(
    ("failure", "stream"),
    [
        *(
            (failure, stream)
            for failure in ("refuses", "500", "502", "503", "close")
            for stream in (False, True)
        ),
        ("early death", True),
    ],
)
def test_a_request_that_fails_goes_to_the_next_replica(serve, engines, failure, stream):
    gateway = serve(health_seconds=60)
    frame = red_scene(14, 14)
    own = next(engine for engine in engines if gateway.text(frame) and engine.requests)
    other = engines[1 - engines.index(own)]
    if failure == "refuses":
        own.stop()
    else:
        own.mode = failure
    answer = gateway.ask(frame, text="whole?", stream=stream)
    assert answer.status_code == 200
    text = streamed_text(answer.content) if stream else answer.json()["choices"][0]["message"]["content"]
    assert text == f"{other.parts()[0]['uuid']} | whole?" and len(text) > 3 * PIECE
    assert gateway.metric("retries_total") == 1
    assert gateway.metric("replica_errors_total", replica=own.url) == 1
    # A replica that is gone is not asked again, one that answers with an error is.
    assert gateway.metric("replica_up", replica=own.url) == failure.isdecimal()
    assert gateway.health()[other.url] == "up"


def test_a_replica_lost_within_an_answer_is_told(serve, engines):
    gateway = serve(health_seconds=60)
    for engine in engines:
        engine.mode = "late death"
    answer = gateway.ask(red_scene(), stream=True)
    first, last = events_of(answer.content)
    assert first["choices"][0]["delta"]["content"]
    assert last["error"]["message"] == "the engine was lost during the answer (RemoteProtocolError)"
    assert last["error"]["code"] == "engine_lost" and b"[DONE]" not in answer.content
    assert len(asked(*engines)) == 1 and gateway.metric("retries_total") == 0
    assert sorted(gateway.health().values()) == ["down: RemoteProtocolError", "up"]


def test_a_stream_without_its_end_mark_is_told(gateway, engines):
    for engine in engines:
        engine.mode = "cut"
    *events, last = events_of(gateway.ask(red_scene(), stream=True).content)
    assert events and last["error"]["message"] == "the engine was lost during the answer (it ended)"


def test_a_stream_that_is_empty_is_an_error(gateway, engines):
    for engine in engines:
        engine.mode = "empty"
    refused(gateway.ask(red_scene(), stream=True), 502, "the engine ended its answer before it began")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_what_an_engine_refuses_is_passed_on(gateway, engines, stream):
    for engine in engines:
        engine.mode = "400"
    answer = gateway.ask(red_scene(), stream=stream)
    assert answer.status_code == 400 and answer.json() == {"error": {"message": "refused with 400"}}
    assert len(asked(*engines)) == 1 and "up" in gateway.health().values()


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_request_that_no_engine_can_answer_takes_nobody_elses(serve, engines, stream):
    gateway = serve(health_seconds=60)
    for engine in engines:
        engine.modes = ["500"]
    error = refused(
        gateway.ask(red_scene(), stream=stream), 502, "no replica could answer: status 500; status 500"
    )
    assert error["type"] == "server_error" and len(asked(*engines)) == 2
    assert gateway.ask(red_scene()).status_code == 200
    assert set(gateway.health().values()) == {"up"}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_when_all_are_gone_there_is_an_end_to_it(gateway, engines, stream):
    for engine in engines:
        engine.mode = "early death" if stream else "close"
    answer = gateway.ask(red_scene(), stream=stream)
    refused(answer, 502, "no replica could answer: none is left" if stream else "RemoteProtocolError")
    assert answer.headers["retry-after"] == "1" and len(asked(*engines)) == 2
    for engine in engines:
        engine.stop()
        gateway.wait_for(engine, up=False)
    refused(gateway.ask(red_scene(), stream=stream), 502, "none is up")
    health = gateway.client.get(f"{gateway.url}/health")
    assert health.status_code == 503 and all(
        "down: ConnectError" in state for state in health.json()["replicas"].values()
    )
    engines[0].mode = "answer"
    engines[0].start()
    gateway.wait_for(engines[0])
    assert gateway.ask(red_scene()).status_code == 200


def test_no_replica_is_asked_twice_for_one_request(serve, engines):
    gateway = serve()
    gateway.gateway.replicas.down = lambda *arguments: None  # as if each were seen to be up again at once
    for engine in engines:
        engine.mode = "early death"
    refused(gateway.ask(red_scene(), stream=True), 502, "none is left")
    assert [len(engine.requests) for engine in engines] == [1, 1]


def test_before_any_replica_was_up_there_is_a_503_and_it_comes_later(serve, engines):
    for engine in engines:
        engine.stop()
    gateway = serve()
    for answer in (gateway.ask(red_scene()), gateway.client.get(f"{gateway.url}/v1/models")):
        refused(answer, 503, "no replica is up")
        assert answer.headers["retry-after"] == "1"
    assert gateway.metric("replica_up", replica=engines[0].url) == 0
    assert engines[0].url in gateway.client.get(f"{gateway.url}/metrics").text  # seen, though never up
    engines[1].start()
    gateway.wait_for(engines[1])
    assert gateway.text(red_scene()).endswith("| q")
    engines[0].start()
    gateway.wait_for(engines[0])
    assert {engine.probes for engine in engines} == {1}
    for shade in range(0, 250, 20):
        gateway.text(red_scene(width=0, shade=shade))
    assert all(engine.requests for engine in engines)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_silent_replica_is_a_504_and_stays(serve, engines, stream):
    limit = "first_token_seconds" if stream else "answer_seconds"
    gateway = serve(limits={limit: 0.5}, health_seconds=60)
    for engine in engines:
        engine.mode = "slow" if stream else "hang"
    error = refused(gateway.ask(red_scene(), stream=stream), 504, "no answer from the engine within 0.5 s")
    assert error["code"] == "engine_timeout"
    assert len(asked(*engines)) == 1 and set(gateway.health().values()) == {"up"}
    wait_until(lambda: sum(engine.cancelled for engine in engines) == 1)


def test_a_long_answer_that_is_not_streamed_is_waited_for(serve, engines):
    """Nothing is heard of it before it is complete."""
    gateway = serve(limits={"first_token_seconds": 0.2}, health_seconds=60)
    for engine in engines:
        engine.mode = "slow"
    asking, answers = in_thread(gateway.ask, red_scene())
    wait_until(lambda: asked(*engines))
    time.sleep(0.5)
    for engine in engines:
        engine.step()
    asking.join()
    assert answers[0].status_code == 200


def test_an_engine_without_its_core_is_passed_over(serve, engines):
    """vLLM's server outlives its core, and says so inside a 200."""
    gateway = serve(health_seconds=60)
    first = gateway.ask(red_scene(), stream=True)
    (home,) = [engine for engine in engines if engine.requests]
    home.mode = "no core"
    assert streamed_text(gateway.ask(red_scene(), stream=True).content) == streamed_text(first.content)
    assert gateway.metric("retries_total") == 1
    assert gateway.metric("replica_errors_total", replica=home.url) == 1
    for engine in engines:
        engine.mode = "no core"
    refused(gateway.ask(red_scene(), stream=True), 502, "no replica could answer")
    for engine in engines:
        engine.mode = "refusal"
    assert events_of(gateway.ask(red_scene(), stream=True).content)[0]["error"]["code"] == 400


def test_who_reads_no_further_loses_the_place(serve, engines):
    gateway = serve(limits={"answer_seconds": 0.5, "concurrent": 1}, health_seconds=60)
    for engine in engines:
        engine.mode = "slow"
        engine.step()
    with pytest.raises(httpx.RemoteProtocolError):
        gateway.ask(red_scene(), stream=True)
    wait_until(gateway.is_idle)


def test_a_replica_that_falls_silent_within_an_answer_is_told(serve, engines):
    gateway = serve(limits={"first_token_seconds": 0.5}, health_seconds=60)
    for engine in engines:
        engine.mode = "slow"
        engine.step()
    *_, last = events_of(gateway.ask(red_scene(), stream=True).content)
    assert last["error"]["message"] == "the engine was lost during the answer (ReadTimeout)"


def test_a_replica_that_drops_alpha_is_kept_out_until_it_does_not(serve, engines):
    engines[0].sees_alpha = False
    gateway = serve()
    state = gateway.health()
    assert "does not see patch groups" in state[engines[0].url] and state[engines[1].url] == "up"
    for shade in range(0, 250, 50):
        gateway.text(red_scene(width=0, shade=shade))
    assert engines[0].requests == [] and len(engines[1].requests) == 5
    engines[0].sees_alpha = True
    gateway.wait_for(engines[0])
    for shade in range(0, 250, 20):
        gateway.text(red_scene(width=0, shade=shade))
    assert engines[0].requests
    # Another engine may stand there when it comes back.
    engines[0].stop()
    gateway.wait_for(engines[0], up=False)
    engines[0].sees_alpha = False
    engines[0].start()
    wait_until(lambda: "does not see" in gateway.health()[engines[0].url])


def test_a_replica_that_is_not_healthy_is_not_asked(gateway, engines):
    engines[0].healthy = False
    gateway.wait_for(engines[0], up=False)
    assert gateway.health()[engines[0].url] == "down: /health answers 503"
    for shade in range(0, 250, 50):
        gateway.text(red_scene(width=0, shade=shade))
    assert engines[0].requests == []


def test_an_engine_that_refuses_the_probe_is_kept_out(serve, engines):
    engines[0].probe_mode = "400"
    gateway = serve()
    state = gateway.health()
    assert (
        "the engine answers a patch group with 400" in state[engines[0].url]
        and "refused" in state[engines[0].url]
    )
    assert gateway.ask(red_scene()).status_code == 200 and engines[0].requests == []


def owners(gateway: Running, engines, shades, places=(0,)) -> dict[int, str]:
    """Whose each background is: all frames of it, with objects at different places, go to the same replica."""
    found = {}
    for shade in shades:
        before = [len(engine.requests) for engine in engines]
        for x in places:
            gateway.text(red_scene(x, 14, shade))
        (found[shade],) = [
            engine.url
            for engine, count in zip(engines, before, strict=True)
            if len(engine.requests) == count + len(places)
        ]
    return found


def test_a_background_stays_with_its_replica(serve, engines):
    gateway = serve(secret="always the same")
    shades = range(0, 250, 15)
    first = owners(gateway, engines, shades, (0, 28))
    assert set(first.values()) == {engine.url for engine in engines}
    assert owners(gateway, engines, shades) == first
    engines[0].stop()
    gateway.wait_for(engines[0], up=False)
    assert set(owners(gateway, engines, shades).values()) == {engines[1].url}
    engines[0].start()
    gateway.wait_for(engines[0])
    assert owners(gateway, engines, shades) == first


def test_a_lost_replica_moves_its_own_backgrounds_only():
    urls = [f"http://replica-{i}:8000" for i in range(4)]
    replicas = Replicas(urls, client=None)
    for replica in replicas.replicas:
        replica.up = True
    keys = [f"background {i}" for i in range(400)]
    before = {key: replicas.ranked(key)[0].url for key in keys}
    shares = [sum(url == owner for owner in before.values()) for url in urls]
    assert min(shares) > 60
    replicas.down(replicas.replicas[2], "gone")
    after = {key: replicas.ranked(key)[0].url for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != urls[2])
    moved = [sum(after[key] == url for key in keys if before[key] == urls[2]) for url in urls]
    assert moved[2] == 0 and min(moved[:2] + moved[3:]) > 10
    assert [replica.url for replica in replicas.ranked("background 0")][-1] == urls[2]


def test_one_replica_that_hangs_does_not_hide_another():
    async def main():
        async def answer(request):
            if request.url.host == "hangs" and not first:
                await asyncio.sleep(9)
            return httpx.Response(200 if alive else 503)

        first, alive = True, False
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            replicas = Replicas(["http://hangs", "http://works"], client, seconds=0.01)
            await replicas.start()
            first = False
            await asyncio.sleep(0.05)
            alive = True
            for _ in range(200):
                if replicas.replicas[1].up:
                    break
                await asyncio.sleep(0.01)
            found = [replica.up for replica in replicas.replicas]
            await replicas.stop()
            left = len(asyncio.all_tasks()) - 1
        return found, left

    assert asyncio.run(main()) == ([False, True], 0)


@pytest.mark.parametrize("late, stays", ((1, True), (2, True), (3, False)))
def test_a_busy_replica_keeps_its_backgrounds(late, stays):
    """Late for a look or two it is only busy; refused connections count at once."""

    async def main():
        async def answer(request):
            if failure is not None:
                raise failure("no", request=request)
            return httpx.Response(200)

        failure = None
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            replicas = Replicas(["http://one"], client)
            (replica,) = replicas.replicas
            await replicas.look()
            failure = httpx.ReadTimeout
            for _ in range(late):
                await replicas.look()
            states = [replica.up]
            failure = None
            await replicas.look()
            failure = httpx.ReadTimeout
            await replicas.look()  # counted anew
            states.append(replica.up)
            failure = httpx.ConnectError
            await replicas.look()
            states.append(replica.up)
        return states

    assert asyncio.run(main()) == [stays, True, False]


# ---- streams


def test_a_stream_is_the_whole_answer(gateway, engines):
    answer = gateway.ask(red_scene(14, 14), text="what?", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["x-request-id"]
    text = streamed_text(answer.content)
    assert text == f"{image_parts(asked(*engines)[0]['messages'])[0]['uuid']} | what?"
    assert len(events_of(answer.content)) == len(text) // PIECE + 3


def test_events_come_as_they_are_made(serve, engines):
    engines[1].stop()
    engines[0].mode = "slow"
    gateway = serve()
    body = question(stream=True, text="a" * 100)
    engines[0].step()
    with gateway.client.stream("POST", f"{gateway.url}/v1/chat/completions", json=body) as answer:
        pieces = answer.iter_raw()
        for _ in range(3):
            assert next(pieces).startswith(b"data: {")
            engines[0].step()
        assert gateway.metric("requests_in_flight") == 1
        engines[0].step(100)
        assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "text",
    [
        "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
        '{"usage": {"prompt_tokens": 1}}',
        "\N{BUS}" * 40,
        "data: [DONE]",
    ],
)
def test_any_text_comes_through_a_stream(gateway, engines, text):
    for engine in engines:
        engine.text = text
    assert streamed_text(gateway.ask(red_scene(), stream=True).content) == text
    assert gateway.text(red_scene()) == text


def test_usage_is_shown_to_who_asked(gateway, engines):
    for options, shown in (
        (None, False),
        ({}, False),
        ({"include_usage": False}, False),
        ({"include_usage": True}, True),
    ):
        fields = {} if options is None else {"stream_options": options}
        events = events_of(gateway.ask(red_scene(), stream=True, **fields).content)
        usages = [event["usage"] for event in events[:-1] if event.get("usage")]
        assert len(usages) == shown and events[-1] == "[DONE]"
        assert all(event["choices"] or shown for event in events[:-1])
    assert {body["stream_options"]["include_usage"] for body in asked(*engines)} == {True}
    tokens = gateway.metric("prompt_tokens_total", kind="cached") + gateway.metric(
        "prompt_tokens_total", kind="computed"
    )
    assert tokens == 4 * usages[0]["prompt_tokens"]


# ---- clients that leave


@pytest.mark.parametrize(
    ("mode", "stream", "events"),
    [("hang", False, 0), ("slow", True, 0), ("slow", True, 1)],
    ids=["plain", "before", "within"],
)
def test_who_leaves_frees_the_place_and_the_engine(serve, engines, mode, stream, events):
    engines[1].stop()
    engines[0].mode = mode
    gateway = serve(limits={"concurrent": 1}, health_seconds=60)
    body = json.dumps(question(red_scene(), stream=stream)).encode()
    if events:
        engines[0].step(events)
    with connection(gateway, f"Content-Length: {len(body)}") as sending:
        sending.sendall(body)
        data = b""
        while events and b"data: {" not in data:
            data += sending.recv(65536)
        wait_until(lambda: engines[0].requests and engines[0].running)
        assert not gateway.is_idle()
    wait_until(lambda: engines[0].cancelled == 1 and engines[0].running == 0)
    wait_until(gateway.is_idle)
    engines[0].mode = "answer"
    assert gateway.ask(red_scene()).status_code == 200
    assert set(gateway.health().values()) >= {"up"}, "a caller that leaves is no failure of the replica"


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


def test_who_leaves_ends_the_fetching(serve, engines):
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
    """A request of a few bytes may hold gigabytes of pixels."""
    import backdrop.serving.gateway as module

    kept, opened = [], []
    original = module.open_image

    def counting(data, max_pixels):
        image = original(data, max_pixels)
        opened.append(sum(earlier() is not None for earlier in kept))
        kept.append(weakref.ref(image))
        return image

    monkeypatch.setattr(module, "open_image", counting)
    gateway = serve(workers=1)
    gateway.text(*[red_scene(14, 14).resize((211, 123)) for _ in range(4)])
    assert opened == [0] * 4


# ---- metrics, starting, stopping


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
    shown = gateway.client.get(f"{gateway.url}/metrics")
    assert shown.headers["content-type"].startswith("text/plain")
    for engine in engines:
        assert f'backdrop_replica_up{{replica="{engine.url}"}} 1.0' in shown.text


def test_a_failure_of_the_gateways_own_is_logged_and_frees_the_place(serve, caplog):
    gateway = serve(limits={"concurrent": 1})

    def broken(*arguments):
        raise KeyError("secret detail")

    gateway.gateway._body = broken
    for _ in range(2):
        answer = gateway.ask(red_scene())
        error = refused(answer, 500, f"its log names request {answer.headers['x-request-id']}")
        assert "secret" not in error["message"]
        assert f"request {answer.headers['x-request-id']}" in caplog.text
    del gateway.gateway._body
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
    assert gateway.gateway.client.is_closed and gateway.gateway._threads._shutdown


def test_the_processor_comes_from_where_the_engine_says(engines, processor):
    engines[0].processor = processor
    engines[0].root = str(MODEL)
    try:
        gateway = Gateway(make_settings(replicas=["http://127.0.0.1:9", engines[0].url]))

        async def main():
            async with gateway._lifespan(None):
                return gateway.processor.image_processor.crop_size[
                    "height"
                ], gateway.splitter.processor._live.detector

        side, detector = asyncio.run(main())
        assert side == 168 and detector is not None
    finally:
        engines[0].root = "nowhere"


def test_without_a_processor_the_gateway_does_not_start():
    gateway = Gateway(make_settings(replicas=["http://127.0.0.1:9"]))

    async def main():
        with pytest.raises(ValueError, match="no replica says where its model is; set `processor`"):
            async with gateway._lifespan(None):
                pytest.fail("started")
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(main()) == 0 and gateway.client.is_closed


# ---- settings


def test_a_settings_file(tmp_path):
    values = {
        "replicas": ["http://a:8000/v1", "http://b:8000/"],
        "keys": HASHED,
        "limits": {"concurrent": 2},
        "matching": {"tolerance": 0},
        "image_hosts": ["*.example.org"],
    }
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump(values))
    settings = load_settings(path, split=False, processor=None)
    assert settings.replicas == ["http://a:8000", "http://b:8000"] and settings.split is False
    assert (settings.limits.concurrent, settings.limits.waiting) == (2, 128)
    assert settings.matching.tolerance == 0 and settings.keys == HASHED and settings.processor is None
    assert load_settings(path, replicas=["http://c"]).replicas == ["http://c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("replicas: [http://a]\nspeed: 3", "speed: Extra inputs are not permitted .found 3."),
        ("replicas: [http://a]\nlimits: {bodybytes: 3}", "limits.bodybytes: Extra inputs"),
        ("replicas: [http://a]\nsource: here", "source: Extra inputs"),
        ("replicas: [http://a]\n5: here", "5: Extra inputs"),
        ("replicas: http://a", "replicas: Input should be a valid list .found 'http://a'."),
        ("replicas: []", "replicas: List should have at least 1 item"),
        ("replicas: [a:8000]", "replicas: 'a:8000' is no URL; wanted http://host:port"),
        ("replicas: [http://a, http://a/v1/]", "replicas: a replica is named twice"),
        ("replicas: [http://a]\nlimits: 5", "limits: Input should be a valid dict"),
        (
            "replicas: [http://a]\nlimits: {concurrent: 0}",
            "limits.concurrent: Input should be greater than or equal to 1",
        ),
        (
            "replicas: [http://a]\nlimits: {concurrent: many}",
            "limits.concurrent: Input should be a valid integer",
        ),
        (
            "replicas: [http://a]\nmatching: {tolerance: 256}",
            "matching.tolerance: Input should be less than or equal to 255",
        ),
        ("replicas: [http://a]\nkeys: {abc: north}", "keys: the key of tenant 'north' is no SHA-256"),
        (f"replicas: [http://a]\nkeys: {{{'0' * 64}: ''}}", "keys: a tenant has no name|keys.*valid string"),
        (f"replicas: [http://a]\nkeys: {{{'a' * 64}: ''}}", "keys: a tenant has no name"),
        ("replicas: [http://a]\nsplit: perhaps", "split: Input should be a valid boolean"),
        ("- replicas", "holds a list; wanted keys and values"),
        ("replicas: [", "is no YAML"),
        ("replicas: !!python/object/apply:os.system [ls]", "is no YAML"),
        ("secret: hunter2", "replicas: Field required$"),
    ],
)
def test_a_bad_settings_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "gateway.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_settings(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(OSError, match="missing.yaml"):
        load_settings(tmp_path / "missing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"replicas: \xff")
    with pytest.raises(ValueError, match="bytes.yaml is no YAML"):
        load_settings(tmp_path / "bytes.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ValueError, match="replicas: Field required"):
        load_settings(tmp_path / "empty.yaml")


def test_keys_are_kept_as_hashes():
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    tenants = Tenants(make_settings(replicas=["http://a"], keys=HASHED))
    assert tenants.of("Bearer key-of-north") == "north" and tenants.of("Bearer key-of-south") == "south"
    assert tenants.of(f"Bearer {next(iter(HASHED))}") is None, "a hash is no key"
    assert Tenants(make_settings(replicas=["http://a"])).of(None) == "default"
