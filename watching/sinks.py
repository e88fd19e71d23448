"""Where answers go: lines, a file of JSON lines, a webhook, an MQTT broker.

Deliveries over a network happen beside the watching: a receiver that is slow or away never stops it. What waits is
bounded; what had to be given up is counted and told at the end.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import httpx

MAX_WAITING = 1000
ATTEMPTS, FIRST_PAUSE = 4, 0.5  # of a delivery; each pause is twice the one before
CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class WatchEvent:
    """One answer, as it is sent to every sink.

    Attributes:
        time: when the frame was taken up, ISO 8601, UTC.
        camera: its name.
        frame: the frame's number or file.
        seconds: of the frame within its source.
        question, answer: as asked and answered; `answer` is None where there was an error.
        alert: the answer holds the word of `--alert`.
        alert_began: it does, and the answer to the same question before it did not.
        patches, patches_reused: of the frame.
        answer_seconds, first_token_seconds: None where unknown.
        error: why there is no answer.
    """

    time: str
    camera: str
    frame: str
    seconds: float
    question: str
    answer: str | None
    alert: bool = False
    alert_began: bool = False
    patches: int = 0
    patches_reused: int = 0
    answer_seconds: float | None = None
    first_token_seconds: float | None = None
    error: str | None = None

    def json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


class Sink(Protocol):
    """Takes events."""

    @property
    def undelivered(self) -> int:
        """Events that were given up."""

    def send(self, event: WatchEvent) -> None:
        """Takes one event, without waiting for a network."""

    def close(self) -> None:
        """Delivers what waits, for some seconds at most."""


class AlertsOnly:
    """Passes on to another sink only the events with which an alert begins."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    @property
    def undelivered(self) -> int:
        """Of the other sink."""
        return self._sink.undelivered

    def send(self, event: WatchEvent) -> None:
        """See `Sink.send`."""
        if event.alert_began:
            self._sink.send(event)

    def close(self) -> None:
        """See `Sink.close`."""
        self._sink.close()


class JsonLines:
    """A file with one JSON object a line, appended to; `-` is standard output.

    The file is opened for each line, so that it may be moved away while it is written (log rotation).

    Raises:
        OSError: the file cannot be written.
    """

    undelivered = 0

    def __init__(self, path: str) -> None:
        self._path = None if path == "-" else Path(path)
        self._write("")

    def send(self, event: WatchEvent) -> None:
        """See `Sink.send`."""
        self._write(event.json() + "\n")

    def close(self) -> None:
        """See `Sink.close`."""

    def _write(self, text: str) -> None:
        if self._path is None:
            print(text, end="", flush=True)
        else:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)


class Webhook:
    """Posts each event as JSON to a URL, in order, by a thread of its own.

    Args:
        url: http:// or https://.

    Raises:
        ValueError: it is neither.
    """

    def __init__(self, url: str) -> None:
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"webhook is {url!r}; wanted a URL that begins with http:// or https://.")
        self.undelivered = 0
        self._url = url
        self._waiting: queue.Queue[WatchEvent | None] = queue.Queue(MAX_WAITING)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="webhook", daemon=True)
        self._thread.start()

    def send(self, event: WatchEvent) -> None:
        """See `Sink.send`."""
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self.undelivered += 1

    def close(self) -> None:
        """See `Sink.close`."""
        deadline = threading.Timer(CLOSE_SECONDS, self._stop.set)
        deadline.daemon = True
        deadline.start()
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS + 30)
        deadline.cancel()

    def _deliver(self) -> None:
        with httpx.Client(timeout=10) as client:
            while (event := self._waiting.get()) is not None:
                if self._stop.is_set() or not self._post(client, event):
                    self.undelivered += 1

    def _post(self, client: httpx.Client, event: WatchEvent) -> bool:
        pause = FIRST_PAUSE
        for attempt in range(ATTEMPTS):
            if attempt and self._stop.wait(pause):
                return False
            try:
                answer = client.post(
                    self._url, content=event.json(), headers={"Content-Type": "application/json"}
                )
                if answer.is_success:
                    return True
                if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
                    return False  # it will not be taken later either
            except httpx.HTTPError:
                pass
            if attempt:
                pause *= 2
        return False


class Mqtt:
    """Publishes each event as JSON to a topic of an MQTT broker (Eclipse Paho; it connects again by itself).

    Args:
        url: `mqtt://user:password@host:port/topic`, or `mqtts://...` with TLS.

    Raises:
        ValueError: the URL names no host or no topic.
        ImportError: paho-mqtt is not installed.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        topic = unquote(parts.path.lstrip("/"))
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or not topic:
            raise ValueError(f"mqtt is {url!r}; wanted mqtt://HOST/TOPIC or mqtts://HOST/TOPIC.")
        try:
            import paho.mqtt.client as paho
        except ImportError:
            raise ImportError("MQTT needs paho-mqtt, which is not installed: pip install paho-mqtt") from None
        self._topic = topic
        self._sent = self._acknowledged = 0
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        self._client.max_queued_messages_set(MAX_WAITING)
        self._client.reconnect_delay_set(1, 30)
        self._client.on_publish = self._acknowledge
        if parts.username:
            self._client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
        if parts.scheme == "mqtts":
            self._client.tls_set()
        self._client.connect_async(parts.hostname, parts.port or (8883 if parts.scheme == "mqtts" else 1883))
        self._client.loop_start()

    @property
    def undelivered(self) -> int:
        """Events that the broker has not acknowledged."""
        return self._sent - self._acknowledged

    def send(self, event: WatchEvent) -> None:
        """See `Sink.send`. Without a connection Paho keeps the event, up to `MAX_WAITING` of them."""
        self._sent += 1
        self._client.publish(self._topic, event.json(), qos=1)

    def close(self) -> None:
        """See `Sink.close`."""
        end = time.monotonic() + CLOSE_SECONDS
        while self.undelivered and time.monotonic() < end:
            time.sleep(0.05)
        self._client.disconnect()
        self._client.loop_stop()

    def _acknowledge(self, *_: object) -> None:
        self._acknowledged += 1
