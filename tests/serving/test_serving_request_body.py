"""Bodies that are too long, too slow, too deep or broken off."""

import json

import pytest
from fake_engine import wait_until
from running_gateway import (
    PLAIN,
    connection,
    nested,
    question,
    refused,
    status_of,
)


def test_a_body_of_a_million_empty_objects_is_not_parsed(refusing):
    refused(refusing.post(PLAIN + b'"metadata":{"a":[' + b"{}," * 999_999 + b"{}]}}"), 413, "JSON values")


@pytest.mark.parametrize("depth", range(100, 1100, 50))
def test_no_depth_of_nesting_is_a_failure(one_gateway, engines, depth):
    answer = one_gateway.post(PLAIN + b'"metadata":' + nested(depth) + b"}")
    assert answer.status_code in (200, 400), answer.text


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


def test_a_client_that_leaves_while_sending_releases_its_slot(serve):
    gateway = serve(limits={"concurrent": 1})
    with connection(gateway, "Content-Length: 1000") as sending:
        sending.sendall(b"{")
        wait_until(lambda: gateway.metric("requests_in_flight") == 1)
    wait_until(gateway.is_idle)
    assert gateway.ask().status_code == 200 and gateway.metric("requests_total", status="499") == 1
