"""The loop of `backdrop watch`: frames in, answers out, and a summary that is bounded however long it runs."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from statistics import median
from typing import Any

import openai

from .answerers import Answered, Answerer
from .changes import ChangeWatcher
from .sinks import Sink, WatchEvent
from .sources import FrameSource, TimedFrame

KEPT_TIMES = 1000  # the medians are of so many answers at most, the last ones
ERRORS_IN_A_ROW = 5  # of a recording; a live source goes on however often the gateway is away


@dataclass
class WatchSummary:
    """What was watched.

    Attributes:
        frames, unchanged: frames that came, and those of them about which nothing was asked since nothing had changed.
        answers, alerts, errors: of all questions; an alert counts once for as long as it lasts.
        patches, patches_reused: of all frames, once for each answer.
        dropped, reconnects, undelivered: of the source and of the sinks.
    """

    frames: int = 0
    unchanged: int = 0
    answers: int = 0
    alerts: int = 0
    errors: int = 0
    patches: int = 0
    patches_reused: int = 0
    dropped: int = 0
    reconnects: int = 0
    undelivered: int = 0
    _reused_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TIMES))
    _new_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TIMES))

    def count(self, answered: Answered) -> None:
        """Adds an answer."""
        self.answers += 1
        self.patches += answered.patches
        self.patches_reused += answered.patches_reused
        seconds = answered.first_token_seconds
        (self._reused_seconds if answered.patches_reused else self._new_seconds).append(
            answered.seconds if seconds is None else seconds
        )

    def figures(self) -> dict[str, Any]:
        """The summary as JSON takes it; times are milliseconds to the first token (at a gateway: to the whole answer)."""
        counts = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return counts | {
            "share_reused": self.patches_reused / self.patches if self.patches else None,
            "milliseconds_reused": _median_ms(self._reused_seconds),
            "milliseconds_new_background": _median_ms(self._new_seconds),
        }


def watch(
    source: FrameSource,
    questions: Sequence[str],
    answerer: Answerer,
    sinks: Sequence[Sink],
    *,
    camera: str = "camera",
    every: float = 5.0,
    changes: ChangeWatcher | None = None,
    alert: str | None = None,
    max_frames: int | None = None,
    max_seconds: float | None = None,
    on_frame: Callable[[TimedFrame, list[WatchEvent]], None] | None = None,
) -> WatchSummary:
    """Asks every question about every frame of a source that is due.

    Args:
        every: seconds between two frames, at least.
        changes: None: every frame is asked about; otherwise those in which something has changed.
        alert: a word or words; an answer that holds them is an alert (whole words, upper and lower case alike).
        max_frames, max_seconds: the end, for whoever wants one.
        on_frame: is shown each frame that was asked about, with its answers.

    Returns:
        The summary; also after an interrupt (Ctrl-C), which ends the watching in order.

    Raises:
        ValueError: there is no question.
        openai.APIError: a gateway failed `ERRORS_IN_A_ROW` times in a row, and the source is a recording.
    """
    if not questions:
        raise ValueError("there is no question; wanted at least one.")
    summary = WatchSummary()
    pattern = None if alert is None else re.compile(rf"(?<!\w){re.escape(alert)}(?!\w)", re.IGNORECASE)
    alerting = dict.fromkeys(questions, False)
    end = None if max_seconds is None else time.monotonic() + max_seconds
    errors_in_a_row = 0
    try:
        for frame in source.frames(every):
            summary.frames += 1
            if changes is not None and not changes.changed(frame.image):
                summary.unchanged += 1
            else:
                events = []
                for question in questions:
                    try:
                        answered = answerer.ask(frame.image, question)
                    except openai.APIError as error:
                        summary.errors += 1
                        errors_in_a_row += 1
                        if not source.live and errors_in_a_row >= ERRORS_IN_A_ROW:
                            raise
                        event = _event(frame, camera, question, error=error)
                    else:
                        summary.count(answered)
                        errors_in_a_row = 0
                        event = _event(frame, camera, question, answered)
                        if pattern is not None and pattern.search(answered.text):
                            event = replace(event, alert=True, alert_began=not alerting[question])
                        alerting[question] = event.alert
                        summary.alerts += event.alert_began
                    events.append(event)
                    for sink in sinks:
                        sink.send(event)
                if on_frame is not None:
                    on_frame(frame, events)
            if max_frames is not None and summary.frames >= max_frames:
                break
            if end is not None and time.monotonic() >= end:
                break
    except KeyboardInterrupt:
        pass
    finally:
        source.close()
        for sink in sinks:
            sink.close()
        summary.dropped, summary.reconnects = source.dropped, source.reconnects
        summary.undelivered = sum(sink.undelivered for sink in sinks)
    return summary


def _event(
    frame: TimedFrame,
    camera: str,
    question: str,
    answered: Answered | None = None,
    error: Exception | None = None,
) -> WatchEvent:
    cost: dict[str, Any] = {}
    if answered is not None:
        first = answered.first_token_seconds
        cost = {
            "patches": answered.patches,
            "patches_reused": answered.patches_reused,
            "answer_seconds": round(answered.seconds, 4),
            "first_token_seconds": None if first is None else round(first, 4),
        }
    return WatchEvent(
        time=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        camera=camera,
        frame=frame.name,
        seconds=round(frame.seconds, 3),
        question=question,
        answer=None if answered is None else answered.text,
        error=None if error is None else " ".join(str(error).split()),
        **cost,
    )


def _median_ms(seconds: Sequence[float]) -> float | None:
    return round(1000 * median(seconds), 1) if seconds else None
