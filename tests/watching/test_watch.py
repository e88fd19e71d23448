"""The loop: every question about every due frame, alerts once, errors told, an end in order, memory that stays."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc

import httpx
import numpy as np
import openai
import pytest
from paths import EXAMPLE, ROOT

from backdrop.watching import watch as watch_module
from backdrop.watching.answerers import Answered
from backdrop.watching.changes import ChangeWatcher
from backdrop.watching.sources import TimedFrame
from backdrop.watching.watch import watch


class Frames:
    """A source of made frames."""

    dropped = reconnects = 0

    def __init__(self, images, live=False):
        self.images, self.live, self.closed = images, live, False

    def frames(self, every):
        for number, image in enumerate(self.images):
            yield TimedFrame(image, number * every, number, str(number))

    def close(self):
        self.closed = True


class Levels:
    """Answers with the frame's level; fails where it is told to."""

    def __init__(self, failing=()):
        self.failing, self.asked = failing, 0

    def ask(self, image, question):
        self.asked += 1
        if self.asked - 1 in self.failing:
            raise openai.APIConnectionError(request=httpx.Request("POST", "http://gateway/v1"))
        return Answered(f"Yes, {image[0, 0, 0]}" if image[0, 0, 0] > 100 else "No.", 576, 500, 0.2, 0.1)

    def close(self):
        pass


class Kept:
    undelivered = 0

    def __init__(self):
        self.events, self.closed = [], False

    def send(self, event):
        self.events.append(event)

    def close(self):
        self.closed = True


def flat(*levels):
    return [np.full((32, 32, 3), level, np.uint8) for level in levels]


def test_every_question_about_every_frame():
    source, sink = Frames(flat(10, 200)), Kept()
    summary = watch(source, ["Bright?", "Dark?"], Levels(), [sink], every=2.0, camera="yard")
    assert [(e.frame, e.question, e.answer, e.seconds) for e in sink.events] == [
        ("0", "Bright?", "No.", 0.0),
        ("0", "Dark?", "No.", 0.0),
        ("1", "Bright?", "Yes, 200", 2.0),
        ("1", "Dark?", "Yes, 200", 2.0),
    ]
    assert source.closed and sink.closed and {e.camera for e in sink.events} == {"yard"}
    figures = summary.figures()
    assert figures["answers"] == 4 and figures["share_reused"] == 500 / 576
    assert json.loads(json.dumps(figures)) == figures


def test_an_alert_is_told_when_it_begins():
    sink = Kept()
    summary = watch(Frames(flat(10, 200, 200, 10, 200)), ["Bright?"], Levels(), [sink], alert="yes")
    assert [e.alert for e in sink.events] == [False, True, True, False, True]
    assert [e.alert_began for e in sink.events] == [False, True, False, False, True]
    assert summary.alerts == 2


def test_an_alert_is_a_whole_word():
    sink = Kept()
    watch(Frames(flat(200)), ["Bright?"], Levels(), [sink], alert="ye")
    assert not sink.events[0].alert


def test_a_gateway_that_is_away_is_told_and_a_camera_goes_on():
    sink = Kept()
    answerer = Levels(failing=range(1, 8))
    summary = watch(Frames(flat(*[200] * 10), live=True), ["Bright?"], answerer, [sink], alert="yes")
    assert summary.errors == 7 and summary.answers == 3
    assert all("Connection error" in e.error and e.answer is None for e in sink.events[1:8])
    # A recording gives up, since its later frames can be asked about again.
    source = Frames(flat(*[200] * 10))
    with pytest.raises(openai.APIConnectionError):
        watch(source, ["Bright?"], Levels(failing=range(10)), [sink])
    assert source.closed


def test_only_what_has_changed_is_asked_about():
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
    person = plain.copy()
    person[20:70, 40:60] = 20
    frames = [plain, plain, plain, person, person, plain]
    answerer, sink = Levels(), Kept()
    summary = watch(Frames(frames), ["Who?"], answerer, [sink], changes=ChangeWatcher())
    assert [e.frame for e in sink.events] == ["0", "3", "5"] and summary.unchanged == 3


def test_noise_is_no_change_and_a_clock_is_learned():
    rng = np.random.default_rng(1)
    plain = rng.integers(40, 200, (224, 224, 3)).astype(np.int16)
    watcher, asked = ChangeWatcher(), []
    for number in range(120):
        frame = plain + rng.normal(0, 2.5, plain.shape)
        frame[:28, :56] = rng.integers(0, 255, (28, 56, 1))  # a clock: eight patches, all the time
        if number >= 110:
            frame[100:150, 100:130] = 0
        asked.append(watcher.changed(frame.clip(0, 255).astype(np.uint8)))
    assert not any(asked[60:110]), "the clock is learned"
    assert asked[110] and not any(asked[111:])


@pytest.mark.parametrize("options", [{"tolerance": -1}, {"tolerance": 256}, {"share": 1.5}])
def test_bounds_of_changes(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ChangeWatcher(**options)


def test_bounds_and_questions():
    summary = watch(Frames(flat(*[10] * 9)), ["a", "b"], Levels(), [], max_frames=4)
    assert summary.frames == 4 and summary.answers == 8
    with pytest.raises(ValueError, match="no question"):
        watch(Frames(flat(10)), [], Levels(), [])


def test_memory_stays_for_days(monkeypatch):
    monkeypatch.setattr(watch_module, "KEPT_TIMES", 50)
    image = flat(10)[0]

    class Endless(Frames):
        def frames(self, every):
            for number in range(1200):
                if number == 200:
                    self.early = tracemalloc.get_traced_memory()[0]
                yield TimedFrame(image, number, number, str(number))
            self.late = tracemalloc.get_traced_memory()[0]

    source = Endless([])
    tracemalloc.start()
    summary = watch(source, ["Bright?"], Levels(), [])
    tracemalloc.stop()
    assert summary.answers == 1200 and source.late - source.early < 20_000


def test_the_command_watches_a_recording_and_ends_in_order(tmp_path):
    from backdrop.scenes.recording import write_recording

    write_recording(tmp_path / "yard.mp4", frames=30, seed=0)
    command = [sys.executable, "-m", "backdrop", "watch", str(tmp_path / "yard.mp4")]
    command += ["-q", "How many vehicles are there?", "--model", str(EXAMPLE), "--every", "0"]
    command += ["--jsonl", str(tmp_path / "answers.jsonl"), "--frames", "6", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert figures["answers"] == len(lines) == 6 and figures["share_reused"] > 0.2
    assert all(line["answer"] and line["first_token_seconds"] > 0 for line in lines)


def test_a_stop_delivers_what_is_there(tmp_path):
    """SIGTERM, as systemd sends it: the summary is printed and the exit is clean."""
    from backdrop.scenes.recording import write_recording

    write_recording(tmp_path / "frames", frames=3, seed=0)
    code = (
        "import sys, time; import backdrop.watching.sources as s\n"
        "class Slow(s.ImageFiles):\n"
        "    def frames(self, every):\n"
        "        for frame in super().frames(every):\n"
        "            yield frame\n"
        "            print('asked', flush=True); time.sleep(60)\n"
        "s.ImageFiles = Slow\n"
        "sys.argv[0] = 'backdrop'; from backdrop.cli import main; main()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "watch",
        str(tmp_path / "frames"),
        "-q",
        "How many vehicles are there?",
    ]
    command += ["--model", str(EXAMPLE), "--jsonl", str(tmp_path / "a.jsonl"), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline().strip() == "asked"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and json.loads(out)["answers"] == 1
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["--model", "m", "--url", "u"]])
def test_one_of_model_and_url(options):
    command = [sys.executable, "-m", "backdrop", "watch", ".", "-q", "What?", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "wanted one of --model" in done.stderr
