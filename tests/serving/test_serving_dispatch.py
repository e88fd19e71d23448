"""Replicas that fail: which requests go to another one, and what the client is told when none can answer."""

import time

import pytest
from fake_engine import PIECE, red_scene, wait_until
from running_gateway import KEEPER, asked, events_of, in_thread, refused, streamed_text


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
    # A replica whose connection failed is down; one that answered with an error stays up until its health check.
    assert gateway.metric("replica_up", replica=own.url) == failure.isdecimal()
    assert gateway.health()[other.url] == "up"


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_what_an_engine_refuses_is_passed_on(gateway, engines, stream):
    for engine in engines:
        engine.mode = "400"
    answer = gateway.ask(red_scene(), stream=stream)
    assert answer.status_code == 400 and answer.json() == {"error": {"message": "refused with 400"}}
    assert len(asked(*engines)) == 1 and "up" in gateway.health().values()


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_request_that_no_engine_can_answer_leaves_the_replicas_up(serve, engines, stream):
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
def test_when_every_replica_is_gone_the_client_gets_a_502(gateway, engines, stream):
    for engine in engines:
        engine.mode = "early death" if stream else "close"
    answer = gateway.ask(red_scene(), stream=stream)
    refused(answer, 502, "no replica could answer: none is left" if stream else "RemoteProtocolError")
    assert answer.headers["retry-after"] == "1" and len(asked(*engines)) == 2
    for engine in engines:
        engine.stop()
    wait_until(lambda: all("ConnectError" in state for state in gateway.health().values()))
    refused(gateway.ask(red_scene(), stream=stream), 502, "none is up")
    health = gateway.client.get(f"{gateway.url}/health")
    assert health.status_code == 503 and health.json() == {"status": "no replica is up"}
    assert all("down: ConnectError" in state for state in gateway.health().values())
    engines[0].mode = "answer"
    engines[0].start()
    gateway.wait_for(engines[0])
    assert gateway.ask(red_scene()).status_code == 200


def test_no_replica_is_asked_twice_for_one_request(serve, engines):
    gateway = serve()
    # As if each were seen to be up again at once.
    gateway.gateway.replicas.mark_down = lambda *arguments: None
    for engine in engines:
        engine.mode = "early death"
    refused(gateway.ask(red_scene(), stream=True), 502, "none is left")
    assert [len(engine.requests) for engine in engines] == [1, 1]


def test_until_a_replica_was_up_requests_get_a_503(serve, engines):
    for engine in engines:
        engine.stop()
    gateway = serve()
    for answer in (gateway.ask(red_scene()), gateway.client.get(f"{gateway.url}/v1/models")):
        refused(answer, 503, "no replica is up")
        assert answer.headers["retry-after"] == "1"
    assert gateway.metric("replica_up", replica=engines[0].url) == 0
    assert (
        engines[0].url in gateway.client.get(f"{gateway.url}/metrics", headers=KEEPER).text
    )  # the metrics name it although it was never up
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
    """An answer that is not streamed is silent until it is complete, which may take longer than a stream may be silent."""
    gateway = serve(limits={"first_token_seconds": 0.2}, health_seconds=60)
    for engine in engines:
        engine.mode = "slow"
    asking, answers = in_thread(gateway.ask, red_scene())
    wait_until(lambda: asked(*engines))
    time.sleep(0.3)
    for engine in engines:
        engine.step()
    asking.join()
    assert answers[0].status_code == 200


def test_an_engine_without_its_core_is_passed_over(serve, engines):
    """vLLM's server outlives its core, and then reports the failure as an event of a stream with status 200."""
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
