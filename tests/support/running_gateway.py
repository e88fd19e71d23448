"""A gateway that is really served, on loopback, and what its tests ask and look at."""

import contextlib
import json
import socket
import threading

import httpx
from fake_engine import AppThread, FakeEngine, data_url, wait_until

from backdrop.serving.gateway import Gateway
from backdrop.serving.tenants import hash_key

KEYS = {"north": "key-of-north", "south": "key-of-south"}  # by tenant
KEEPER = {"Authorization": "Bearer key-of-the-keeper"}
ADMIN_KEYS = {hash_key("key-of-the-keeper"): "*"}
HASHED_KEYS = {hash_key(key): tenant for tenant, key in KEYS.items()}

# A chat request's body in bytes, but for further fields and its end.
PLAIN = b'{"messages":[{"role":"user","content":"hi"}],'

# Coroutines of a gateway that is served and idle.
IDLE_TASKS = {"AppThread._serve", "LifespanOn.main", "Replicas._watch"}


class RunningGateway(AppThread):
    """A gateway under uvicorn, with a client of its own: `with RunningGateway(gateway) as running: running.ask(image)`."""

    def __init__(self, gateway: Gateway):
        super().__init__(gateway.app())
        self.gateway = gateway
        self.client = httpx.Client(trust_env=False, timeout=10, verify=False)

    def post(self, body, key: str | None = None, **headers) -> httpx.Response:
        """The answer to a chat request; `body` is a dictionary or bytes, `key` an API key."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return self.client.post(f"{self.url}/v1/chat/completions", content=content, headers=headers)

    def ask(self, *images, text: str = "q", key: str | None = None, **fields) -> httpx.Response:
        """The answer to a question about images; `fields` are further ones of the request."""
        return self.post(question(*images, text=text, **fields), key)

    def text(self, *images, **options) -> str:
        """The text of the answer to it."""
        answer = self.ask(*images, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def health(self) -> dict[str, str]:
        """State by replica, as keepers see it."""
        return self.client.get(f"{self.url}/health", headers=KEEPER).json()["replicas"]

    def metric(self, name: str, **labels) -> float:
        """The value of a metric, named without its prefix."""
        return self.gateway.metrics.registry.get_sample_value(f"backdrop_{name}", labels) or 0.0

    def wait_for(self, engine: FakeEngine, up: bool = True) -> None:
        """Returns once the gateway has seen that an engine is up, or down."""
        (replica,) = [r for r in self.gateway.replicas.replicas if r.url == engine.url]
        wait_until(lambda: replica.up == up)

    def is_idle(self) -> bool:
        """Whether every slot is free, and nothing is in progress."""
        gateway = self.gateway
        return (
            gateway.admission.slots._value == gateway.settings.limits.concurrent
            and gateway.admission.waiting == 0
            and self.metric("requests_in_flight") == self.metric("requests_waiting") == 0
            and all(replica.in_flight == 0 for replica in gateway.replicas.replicas)
            and set(self.tasks()) <= IDLE_TASKS
        )


def question(*images, text: str = "q", **fields) -> dict:
    """A chat request about images (or their URLs)."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}], **fields}


def user(*parts) -> dict:
    """A chat request of one message of these content parts."""
    return {"messages": [{"role": "user", "content": list(parts)}]}


def nested(depth: int) -> bytes:
    """Empty JSON arrays, one in another."""
    return b"[" * depth + b"]" * depth


def refused(answer: httpx.Response, status: int, *words: str) -> dict:
    """The error of a refusal, whose one line has all these words."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert all(word in error["message"] for word in words), error["message"]
    assert "\n" not in error["message"] and error["code"] and error["type"] and error["param"] is None
    return error


def events_of(data: bytes) -> list:
    """The events of a stream, decoded; the last one may be "[DONE]"."""
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
    """The cache salt of a request that an engine received."""
    return engine.requests[number]["cache_salt"]


def asked(*engines: FakeEngine) -> list[dict]:
    """The requests that engines received."""
    return [body for engine in engines for body in engine.requests]


def in_thread(function, *arguments, **options) -> tuple[threading.Thread, list]:
    """A running thread, and the list that will hold the function's result."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments, **options)))
    thread.start()
    return thread, found


@contextlib.contextmanager
def connection(gateway: RunningGateway, *headers: str):
    """A TCP connection on which a POST has begun, its body still to be sent."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as found:
        head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", "Host: gateway", *headers, "", ""])
        found.sendall(head.encode())
        yield found


def status_of(connection: socket.socket) -> tuple[int, str]:
    """Status and JSON body of an answer on a connection that may stay open."""
    data = b""
    while b"\r\n\r\n" not in data or not data.endswith(b"}"):
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()
