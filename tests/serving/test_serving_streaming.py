"""Streamed answers: whole, in time, cut off by an engine, left by a client."""

import json
import time

import pytest
from fake_engine import PIECE, image_parts, red_scene, wait_until
from running_gateway import (
    asked,
    connection,
    events_of,
    in_thread,
    question,
    refused,
    streamed_text,
)


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


def test_usage_is_shown_to_clients_that_ask_for_it(gateway, engines):
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


@pytest.fixture
def waiting(serve, engines):
    """A gateway that sends a stream's headers, and its comments, without waiting long for the first token."""
    engines[1].stop()
    engines[0].mode = "slow"
    return serve(limits={"headers_seconds": 0.05, "comment_seconds": 0.05}, health_seconds=60)


def test_headers_and_comments_come_before_the_first_token(waiting, engines):
    body = question(red_scene(), stream=True, stream_options={"include_usage": True})
    with waiting.client.stream("POST", f"{waiting.url}/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200 and answer.headers["x-backdrop-patches-fresh"] == "16"
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no" and answer.headers["x-request-id"]
        pieces = answer.iter_raw()
        for _ in range(3):
            assert set(next(pieces).decode().split("\n\n")) == {": waiting", ""}
        engines[0].step(1000)
        rest = b"".join(pieces).decode().replace(": waiting\n\n", "")
    assert streamed_text(rest.encode()).endswith("| q")
    assert events_of(rest.encode())[-2]["usage"]["backdrop"]["seconds"]["first_token"] > 0.1


def test_a_failure_after_the_headers_is_an_event(waiting, engines):
    engines[0].mode = "hang"
    waiting.gateway.settings.limits.first_token_seconds = 0.3
    answer = waiting.ask(red_scene(), stream=True)
    (last,) = events_of(answer.content.replace(b": waiting\n\n", b""))
    assert answer.status_code == 200 and last["error"]["code"] == "engine_timeout"


def test_a_refusal_after_the_headers_is_an_event(waiting, engines):
    engines[0].mode = "slow 400"
    thread, found = in_thread(waiting.ask, red_scene(), stream=True)
    wait_until(lambda: engines[0].running)
    time.sleep(0.1)
    engines[0].step(1000)
    thread.join()
    (last,) = events_of(found[0].content.replace(b": waiting\n\n", b""))
    assert last == {"error": {"message": "refused with 400"}}


def test_a_client_that_leaves_while_it_waits_releases_everything(waiting, engines):
    body = json.dumps(question(red_scene(), stream=True)).encode()
    with connection(waiting, f"Content-Length: {len(body)}") as sending:
        sending.sendall(body)
        data = b""
        while b": waiting" not in data:
            data += sending.recv(65536)
    wait_until(lambda: engines[0].cancelled == 1 and engines[0].running == 0)
    wait_until(waiting.is_idle)


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


def test_a_replica_that_falls_silent_within_an_answer_is_told(serve, engines):
    gateway = serve(limits={"first_token_seconds": 0.5}, health_seconds=60)
    for engine in engines:
        engine.mode = "slow"
        engine.step()
    *_, last = events_of(gateway.ask(red_scene(), stream=True).content)
    assert last["error"]["message"] == "the engine was lost during the answer (ReadTimeout)"


@pytest.mark.parametrize(
    ("mode", "stream", "events"),
    [("hang", False, 0), ("slow", True, 0), ("slow", True, 1)],
    ids=["plain", "before", "within"],
)
def test_a_client_that_leaves_releases_its_slot_and_the_engine(serve, engines, mode, stream, events):
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
