"""What is sent arrives, in order and whole; what cannot be delivered is counted and stops nothing."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rtsp_server import free_port

from backdrop.watching import sinks
from backdrop.watching.sinks import AlertsOnly, JsonLines, Mqtt, WatchEvent, Webhook


def event(number: int, **changes) -> WatchEvent:
    return WatchEvent("2026-01-01T00:00:00Z", "gate", str(number), number, "Open?", "yes – “ja”", **changes)


class Receiver:
    """Answers posts with the given statuses, then with 200."""

    def __init__(self, *statuses: int) -> None:
        self.statuses, self.bodies = list(statuses), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = outer.statuses.pop(0) if outer.statuses else 200
                if status == 200:
                    outer.bodies.append(json.loads(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"


def test_json_lines_are_appended_and_there_at_once(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"old": 1}\n')
    sink = JsonLines(str(path))
    sink.send(event(1))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"old": 1} and lines[1]["answer"] == "yes – “ja”" and lines[1]["frame"] == "1"
    sink.close()


def test_a_webhook_gets_everything_in_order_though_it_fails_at_first(monkeypatch):
    monkeypatch.setattr(sinks, "FIRST_PAUSE", 0.01)
    receiver = Receiver(503, 429)
    sink = Webhook(receiver.url)
    for number in range(5):
        sink.send(event(number))
    sink.close()
    assert [body["frame"] for body in receiver.bodies] == ["0", "1", "2", "3", "4"]
    assert sink.undelivered == 0


def test_a_webhook_that_refuses_or_is_away_costs_only_its_events(monkeypatch):
    monkeypatch.setattr(sinks, "FIRST_PAUSE", 0.01)
    receiver = Receiver(404)
    sink = Webhook(receiver.url)
    sink.send(event(0))
    sink.send(event(1))
    sink.close()
    assert [body["frame"] for body in receiver.bodies] == ["1"] and sink.undelivered == 1
    away = Webhook(f"http://127.0.0.1:{free_port()}/hook")
    started = time.monotonic()
    away.send(event(0))
    assert time.monotonic() - started < 0.5, "sending waits for nobody"
    away.close()
    assert away.undelivered == 1


def test_what_waits_for_a_webhook_is_bounded(monkeypatch):
    monkeypatch.setattr(sinks, "MAX_WAITING", 3)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(sinks, "FIRST_PAUSE", 60.0)
    sink = Webhook(f"http://127.0.0.1:{free_port()}/hook")
    for number in range(10):
        sink.send(event(number))
    assert sink.undelivered >= 6
    sink.close()
    assert sink.undelivered == 10


def test_only_the_beginning_of_an_alert_is_passed_on(tmp_path):
    path = tmp_path / "alerts.jsonl"
    sink = AlertsOnly(JsonLines(str(path)))
    sink.send(event(1))
    sink.send(event(2, alert=True, alert_began=True))
    sink.send(event(3, alert=True))
    sink.close()
    assert [json.loads(line)["frame"] for line in path.read_text().splitlines()] == ["2"]


class Broker:
    """A packaged MQTT broker in a thread."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self._call(self._start())

    async def _start(self):
        from amqtt.broker import Broker as Amqtt

        config = {
            "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{self.port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
        self.broker = Amqtt(config)
        await self.broker.start()

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def stop(self):
        self._call(self.broker.shutdown())
        self.loop.call_soon_threadsafe(self.loop.stop)


def test_mqtt_delivers_also_what_was_sent_before_the_broker_was_there():
    paho = pytest.importorskip("paho.mqtt.client")
    pytest.importorskip("amqtt")
    port = free_port()
    sink = Mqtt(f"mqtt://127.0.0.1:{port}/cameras/gate")
    sink.send(event(0))
    assert sink.undelivered == 1
    broker = Broker(port)
    received = []
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client.on_message = lambda _, __, message: received.append((message.topic, json.loads(message.payload)))
    client.connect("127.0.0.1", port)
    client.subscribe("cameras/#", qos=1)
    client.loop_start()
    time.sleep(0.5)
    sink.send(event(1))
    sink.close()
    end = time.monotonic() + 10
    while len(received) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    client.disconnect()
    client.loop_stop()
    broker.stop()
    assert sink.undelivered == 0
    assert {body["frame"] for _, body in received} >= {"1"} and {topic for topic, _ in received} == {
        "cameras/gate"
    }


@pytest.mark.parametrize("url", ["host/topic", "mqtt://host", "mqtt:///topic", "http://host/topic"])
def test_mqtt_addresses_are_checked(url):
    with pytest.raises(ValueError, match="wanted mqtt://HOST/TOPIC"):
        Mqtt(url)


def test_webhook_addresses_are_checked():
    with pytest.raises(ValueError, match="wanted a URL"):
        Webhook("host/hook")
