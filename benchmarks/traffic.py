"""Requests as cameras make them, sent to any server of the chat completions API, and what came back.

A camera is one background of the made scenes with its frames; every frame is asked one question. Answers are known, and
which background they belong to: labels, signs and names differ from background to background, so that an answer read off
another camera's background is recognised (`is_foreign`).
"""

import asyncio
import base64
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO

import httpx
import numpy as np
from PIL import Image

from backdrop.scenes.world import FAMILIES, Scene, Split, background_seeds, disturbed, render_scene

# Topics whose answer is read off the background and differs from background to background.
NAMING_TOPICS = ("label", "sign", "name")
MAX_TOKENS = 12


@dataclass(frozen=True)
class Ask:
    """One request: which camera, what is asked, and the right answer.

    Attributes:
        camera: index of the background.
        url: the frame as a data: URL.
        answer: the right one.
        names: whether the answer names the background (its label, sign or name).
    """

    camera: int
    url: str
    question: str
    answer: str
    names: bool

    def body(self, model: str) -> dict:
        """The request's JSON."""
        content = [
            {"type": "image_url", "image_url": {"url": self.url}},
            {"type": "text", "text": self.question},
        ]
        return {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0.0,
            "max_tokens": MAX_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        ask: the request.
        status: HTTP's; 0: the connection failed.
        text: the answer; None: there is none.
        error: what the server said instead.
        first_token: seconds to the first event of the answer, which vLLM sends with the first token.
        seconds: to the end.
        prompt_tokens, cached_tokens: of the usage.
    """

    ask: Ask
    status: int
    text: str | None = None
    error: str = ""
    first_token: float = float("nan")
    seconds: float = float("nan")
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def right(self) -> bool:
        """Whether the answer is the right one, letter by letter."""
        return self.text == self.ask.answer


@dataclass
class Summary:
    """Figures over outcomes; times in seconds.

    Attributes:
        requests: sent.
        lost: without an answer.
        refused: why -> how many of the lost: the HTTP status, "0" where the connection failed.
        right: share of the answers that are right.
        foreign: answers that name another camera's background.
        per_second: answers a second.
        cached: share of the prompt tokens that came from the engine's prefix cache.
    """

    requests: int = 0
    lost: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    right: float = float("nan")
    foreign: int = 0
    first_token_p50: float = float("nan")
    first_token_p95: float = float("nan")
    seconds_p95: float = float("nan")
    per_second: float = float("nan")
    cached: float = float("nan")


class SceneTraffic:
    """Requests about made scenes; every frame is new, as a camera's are.

    Args:
        cameras: backgrounds, of all families in turn.
        noise: as a camera sends them: noise, light, JPEG; False: as they are drawn.
        split: whose backgrounds.

    Attributes:
        names: answer that names a background -> its camera.
    """

    def __init__(self, cameras: int, seed: int = 0, noise: bool = False, split: Split = "test"):
        rng = random.Random(f"traffic/{seed}")
        self._seeds = rng.sample(list(background_seeds(split)), cameras)
        self._noise = noise
        self.names: dict[str, int] = {}
        for camera in range(cameras):
            for question in self._scene(camera, 0).questions:
                if question.topic in NAMING_TOPICS:
                    self.names[question.answer] = camera

    def draw(self, rng: random.Random) -> Ask:
        """The next request."""
        camera = rng.randrange(len(self._seeds))
        scene = self._scene(camera, rng.randrange(2**31))
        image = disturbed(scene.image, rng.randrange(2**31)) if self._noise else scene.image
        question = rng.choice(scene.questions)
        return Ask(
            camera, png_url(image), question.question, question.answer, question.topic in NAMING_TOPICS
        )

    def _scene(self, camera: int, frame: int) -> Scene:
        return render_scene(FAMILIES[camera % len(FAMILIES)], self._seeds[camera], frame)


def png_url(image: Image.Image) -> str:
    """The image as a PNG in a data: URL."""
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


async def ask_once(
    client: httpx.AsyncClient, url: str, ask: Ask, model: str, key: str | None = None
) -> Outcome:
    """Sends one request and reads its answer as it comes."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    started = time.perf_counter()
    text, first, error, ended = "", float("nan"), "", False
    usage: dict = {}
    try:
        async with client.stream(
            "POST", f"{url}/v1/chat/completions", json=ask.body(model), headers=headers
        ) as response:
            if response.status_code != 200:
                body = (await response.aread()).decode(errors="replace")
                return Outcome(ask, response.status_code, error=body[:300])
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    error = json.dumps(chunk["error"])[:300]
                    break
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    first = first if first == first else time.perf_counter() - started
                    text += choice["delta"].get("content") or ""
    except httpx.HTTPError as problem:
        return Outcome(ask, 0, error=f"{type(problem).__name__}: {problem}")
    if not ended:
        return Outcome(ask, 200, error=error or "the answer was cut off")
    details = usage.get("prompt_tokens_details") or {}
    return Outcome(
        ask,
        200,
        text.strip(),
        "",
        first,
        time.perf_counter() - started,
        usage.get("prompt_tokens", 0),
        details.get("cached_tokens") or 0,
    )


async def drive(
    url: str,
    model: str,
    draw: Callable[[random.Random], Ask],
    seconds: float,
    concurrency: int,
    seed: int = 0,
    keys: Sequence[str | None] = (None,),
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Sends requests from several clients, each of which asks again as soon as it has its answer.

    Args:
        url: of the server, without `/v1`.
        model: the name it serves the model under.
        draw: makes the next request.
        seconds: after so long no new request is sent.
        concurrency: clients.
        keys: API keys, shared out among the clients in turn.
        on_outcome: called after each request.
    """
    outcomes: list[Outcome] = []
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
            while time.perf_counter() < end:
                ask = await asyncio.to_thread(draw, rng)
                found = await ask_once(client, url, ask, model, keys[number % len(keys)])
                outcomes.append(found)
                if on_outcome is not None:
                    on_outcome(found)
                if found.text is None:
                    await asyncio.sleep(0.2)  # as clients do that try again

    await asyncio.gather(*(one(number) for number in range(concurrency)))
    return outcomes


def summarize(outcomes: Sequence[Outcome], names: dict[str, int], seconds: float) -> Summary:
    """Figures of a run.

    Args:
        names: answer that names a background -> its camera (`SceneTraffic.names`).
        seconds: how long the run took.
    """
    answered = [outcome for outcome in outcomes if outcome.text is not None]
    refused: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.text is None:
            name = str(outcome.status) if outcome.status != 200 else "cut off, with an error"
            refused[name] = refused.get(name, 0) + 1
    summary = Summary(
        requests=len(outcomes),
        lost=len(outcomes) - len(answered),
        refused=refused,
        foreign=sum(is_foreign(outcome, names) for outcome in answered),
        per_second=len(answered) / seconds,
    )
    if answered:
        first = [outcome.first_token for outcome in answered if outcome.first_token == outcome.first_token]
        summary.right = sum(outcome.right for outcome in answered) / len(answered)
        summary.first_token_p50, summary.first_token_p95 = np.percentile(first, [50, 95]).tolist()
        summary.seconds_p95 = float(np.percentile([outcome.seconds for outcome in answered], 95))
        tokens = sum(outcome.prompt_tokens for outcome in answered)
        summary.cached = sum(outcome.cached_tokens for outcome in answered) / max(1, tokens)
    return summary


def is_foreign(outcome: Outcome, names: dict[str, int]) -> bool:
    """Whether an answer that should name its own background names another's."""
    if outcome.text is None or not outcome.ask.names or outcome.right:
        return False
    return names.get(outcome.text, outcome.ask.camera) != outcome.ask.camera
