"""Slots: how many requests are in progress, how many wait, and who is told to come back."""

import httpx
import pytest
from fake_engine import red_scene, wait_until
from running_gateway import in_thread, question, refused


def test_a_busy_gateway_says_when_to_come_back(serve, engines):
    engines[1].stop()
    engines[0].mode = "slow"
    gateway = serve(limits={"concurrent": 1, "waiting": 1})
    first, first_answer = in_thread(gateway.ask, text="first")
    wait_until(lambda: engines[0].requests)
    second, second_answer = in_thread(gateway.ask, text="second")
    wait_until(lambda: gateway.metric("requests_waiting") == 1)
    answer = gateway.ask(text="third")
    refused(answer, 429, "1 requests are in progress and 1 are waiting")
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
    refused(answer, 429, "no other request ended within 0.05 s")
    assert answer.headers["retry-after"] == "1"
    engines[0].step()
    first.join()


def test_a_stream_holds_its_slot_to_the_end(serve, engines):
    engines[1].stop()
    engines[0].mode = "slow"
    gateway = serve(limits={"concurrent": 1, "waiting": 0})
    engines[0].step()
    with gateway.client.stream(
        "POST", f"{gateway.url}/v1/chat/completions", json=question(stream=True, text="a" * 50)
    ) as answer:
        pieces = answer.iter_raw()
        next(pieces)
        refused(gateway.ask(), 429, "1 requests are in progress and 0 are waiting")
        engines[0].step(100)
        for _ in pieces:
            pass
    engines[0].mode = "answer"
    wait_until(gateway.is_idle)
    assert gateway.ask().status_code == 200


def test_a_client_that_stops_reading_loses_its_slot(serve, engines):
    gateway = serve(limits={"answer_seconds": 0.2, "concurrent": 1}, health_seconds=60)
    for engine in engines:
        engine.mode = "slow"
        engine.step()
    with pytest.raises(httpx.RemoteProtocolError):
        gateway.ask(red_scene(), stream=True)
    wait_until(gateway.is_idle)
