"""Who answers: a model in this process, or a gateway."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import pipeline
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from backdrop.serving.client import BackdropClient

CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Answered:
    """An answer and what it cost.

    Attributes:
        text: the answer.
        patches, patches_reused: of the frame; 0 where the gateway does not tell.
        seconds: until the whole answer was there.
        first_token_seconds: until its first token was; None where the gateway does not tell.
    """

    text: str
    patches: int
    patches_reused: int
    seconds: float
    first_token_seconds: float | None


class Answerer(Protocol):
    """What `watch` asks about frames."""

    def ask(self, image: np.ndarray, question: str) -> Answered:
        """The answer to a question about a frame, uint8 `[H, W, 3]`."""

    def close(self) -> None:
        """Frees what it holds."""


class LocalModel:
    """A model in this process, with matching and the background cache on.

    Args:
        model: a folder or a Hub id.
        matching: options of `processor.enable_background_matching`.
        max_new_tokens: longest answer.
    """

    def __init__(self, model: str, matching: dict[str, Any], max_new_tokens: int = 64) -> None:
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # the pipeline warns about its own call, at every call
        self._pipe = pipeline("image-text-to-text", model=model, trust_remote_code=True)
        self._pipe.model.enable_background_cache(max_bytes=CACHE_BYTES)
        matcher = self._pipe.processor.enable_background_matching(**matching)
        self._max_new_tokens = max_new_tokens
        self._report: Any = None
        matcher.observer = self._hear

    def ask(self, image: np.ndarray, question: str) -> Answered:
        """See `Answerer.ask`."""
        content = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": question}]
        self._report = None
        clock = _FirstToken()
        started = time.perf_counter()
        found = self._pipe(
            text=[{"role": "user", "content": content}],
            return_full_text=False,
            generate_kwargs={
                "max_new_tokens": self._max_new_tokens,
                "do_sample": False,
                "streamer": clock,
            },
        )
        seconds = time.perf_counter() - started
        report, reused, patches = self._report, 0, 0
        if report is not None:
            patches = len(report.fresh)
            if report.reference is not None and not report.refreshed:
                reused = int((~report.fresh).sum())
        first = None if clock.time is None else clock.time - started
        return Answered(found[0]["generated_text"].strip(), patches, reused, seconds, first)

    def close(self) -> None:
        """See `Answerer.close`."""
        self._pipe.model.disable_background_cache()

    def _hear(self, report: Any) -> None:
        self._report = report


class _FirstToken(BaseStreamer):
    """Notes when the first new token comes; the prompt is put before it."""

    def __init__(self) -> None:
        self.time: float | None = None
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen and self.time is None:
            self.time = time.perf_counter()
        self._prompt_seen = True

    def end(self) -> None:
        pass


class Gateway:
    """A Backdrop gateway, or an engine that serves a Backdrop model.

    Args:
        url: of the API, with /v1.
        camera: whose references its frames match and become.
        api_key: None: the environment's OPENAI_API_KEY.
        model: its name there; None: the first.
        matching: tolerance and options of matching where frames are split here, that is, at an engine.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        url: str,
        camera: str,
        api_key: str | None = None,
        model: str | None = None,
        matching: dict[str, Any] | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        options = dict(matching or {})
        tolerance = options.pop("tolerance", 10.0)
        self._client = BackdropClient(
            url, model=model, api_key=api_key, tolerance=tolerance, matching=options
        )
        self._namespace = f"camera/{camera}"
        self._max_new_tokens = max_new_tokens

    def ask(self, image: np.ndarray, question: str) -> Answered:
        """See `Answerer.ask`.

        Raises:
            openai.APIError: the gateway refuses, or does not answer.
        """
        started = time.perf_counter()
        answer = self._client.ask(
            Image.fromarray(image), question, namespace=self._namespace, max_tokens=self._max_new_tokens
        )
        seconds = time.perf_counter() - started
        return Answered(answer.text, answer.patches, answer.patches_reused, seconds, None)

    def close(self) -> None:
        """See `Answerer.close`."""
        self._client.close()
