"""Fake engines, and gateways in front of them, for all tests of serving."""

import contextlib
import functools
import ssl

import pytest
from fake_engine import FakeEngine, red_processor, wait_until
from paths import EXAMPLE
from running_gateway import ADMIN_KEYS, RunningGateway, asked

from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.serving.gateway import Gateway
from backdrop.serving.settings import make_settings


@pytest.fixture(scope="session", autouse=True)
def _one_tls_context():
    """Every client of httpx loads all certificates of the system, 0.1 s each; nothing here speaks TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))
        yield


@pytest.fixture(scope="session")
def processor():
    """56 px, 14 px patches, split by the red detector, margin 0; nobody may change it."""
    return red_processor()


@pytest.fixture(scope="session")
def example_processor():
    """The committed model's, with its own detector; nobody may change it."""
    return BackdropProcessor.from_pretrained(EXAMPLE)


@pytest.fixture(scope="session")
def running_engines(processor):
    """Two fake engines, started once."""
    with FakeEngine(processor) as first, FakeEngine(processor) as second:
        yield [first, second]


@pytest.fixture
def engines(running_engines):
    """Two fake engines as new, both running."""
    for engine in running_engines:
        engine.reset()
        if not engine.is_running:
            engine.start()
    yield running_engines
    for engine in running_engines:
        assert not engine.mixed_up, "one uuid for two groups"
        engine.mode, engine.modes = "answer", []
        engine.step(1000)


@pytest.fixture
def serve(engines, processor):
    """Starts gateways in front of the engines; at the end none may hold a slot, a task or a request."""
    with contextlib.ExitStack() as stack:

        def start(parts: dict | None = None, **values) -> RunningGateway:
            urls = [engine.url for engine in engines]
            values = {"replicas": urls, "health_seconds": 0.05, "admin_keys": ADMIN_KEYS, **values}
            gateway = Gateway(make_settings("test", **values), **{"processor": processor, **(parts or {})})
            running = RunningGateway(gateway)
            stack.callback(running.client.close)
            stack.enter_context(running)
            stack.callback(lambda: running.is_running and wait_until(running.is_idle))
            return running

        yield start


@pytest.fixture
def gateway(serve):
    """A gateway with default settings."""
    return serve()


@pytest.fixture(scope="module")
def one_gateway(running_engines, processor):
    """A gateway for requests that never get as far as an engine; takes images of 20,000 bytes and 90,000 pixels."""
    for engine in running_engines:
        engine.reset()
        if not engine.is_running:
            engine.start()
    gateway = Gateway(
        make_settings(
            replicas=[engine.url for engine in running_engines],
            health_seconds=60,
            limits={"image_pixels": 90_000, "image_bytes": 20_000},
        ),
        processor,
    )
    with RunningGateway(gateway) as running:
        yield running
        running.client.close()


@pytest.fixture
def refusing(one_gateway, engines):
    """The same gateway; at the end it has asked no engine, and is idle."""
    yield one_gateway
    assert asked(*engines) == []
    wait_until(one_gateway.is_idle)
