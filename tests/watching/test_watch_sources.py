"""Frames from folders, recordings, stills over HTTP and a real RTSP stream that is cut off and comes back."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image
from rtsp_server import RtspCamera, write_h264

from backdrop.watching import sources
from backdrop.watching.sources import HttpStills, ImageFiles, LiveStream, VideoFile, open_source


@pytest.fixture
def camera(tmp_path):
    pytest.importorskip("av")
    pytest.importorskip("aio_rtsp_toolkit")
    found = RtspCamera(tmp_path)
    yield found
    if found.process is not None:
        found.cut_off()


def write_avi(path, frames, rate=10.0):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), rate, (64, 48))
    for number in range(frames):
        writer.write(np.full((48, 64, 3), (10 * number % 250, 0, 200), np.uint8))  # BGR
    writer.release()


def test_a_folder_gives_its_images_by_name(tmp_path):
    for name, level in (("b.png", 20), ("a.jpg", 10), ("c.webp", 30)):
        Image.new("RGB", (8, 6), (level, 0, 0)).save(tmp_path / name, quality=100)
    (tmp_path / "notes.txt").write_text("no image")
    found = list(open_source(str(tmp_path)).frames(5))
    assert [frame.name for frame in found] == ["a.jpg", "b.png", "c.webp"]
    assert [frame.image.shape for frame in found] == [(6, 8, 3)] * 3
    assert [int(frame.image[..., 0].mean() / 10 + 0.5) for frame in found] == [1, 2, 3]


@pytest.mark.parametrize("content", ["nothing", "empty", "damaged image", "damaged video", "no file"])
def test_what_is_no_source_is_one_clear_line(tmp_path, content):
    path = tmp_path / {"damaged image": "x.png", "damaged video": "x.mp4"}.get(content, "x")
    if content == "nothing":
        path.mkdir()
    elif content != "no file":
        path.write_bytes(b"" if content == "empty" else b"damaged")
    with pytest.raises(ValueError, match="x") as error:
        list(open_source(str(path)).frames(0))
    assert "\n" not in str(error.value) and "wanted" in str(error.value) or "Pillow" in str(error.value)


def test_a_recording_is_read_by_its_own_time(tmp_path):
    write_avi(tmp_path / "clip.avi", 40)
    source = open_source(str(tmp_path / "clip.avi"))
    assert isinstance(source, VideoFile) and not source.live
    found = list(source.frames(1.0))
    assert [round(frame.seconds, 2) for frame in found] == [0.0, 1.0, 2.0, 3.0]
    assert found[0].image[0, 0, 0] > 150, "RGB, not OpenCV's BGR"
    assert len(list(open_source(str(tmp_path / "clip.avi")).frames(0))) == 40


def test_a_source_ends_when_it_is_closed(tmp_path):
    write_avi(tmp_path / "clip.avi", 40)
    source = VideoFile(tmp_path / "clip.avi")
    seen = 0
    for _ in source.frames(0):
        seen += 1
        if seen == 3:
            source.close()
    assert seen == 3


def test_a_stream_is_lost_and_comes_back(camera, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FIRST_PAUSE", 0.2)
    write_h264(tmp_path / "clip.mp4", 600)
    camera.start()
    told = []
    source = open_source(camera.url("clip.mp4"), told.append)
    assert isinstance(source, LiveStream) and source.live
    came_back = threading.Event()
    seen = []
    for frame in source.frames(0.3):
        seen.append(frame)
        assert frame.image.shape == (120, 160, 3) and frame.image[..., 0].max() > 150
        if len(seen) == 3:
            camera.cut_off()
            threading.Timer(1.0, lambda: (camera.start(), came_back.set())).start()
        if source.reconnects:
            break
    assert came_back.is_set() and source.reconnects == 1
    assert len(told) == 2 and "is lost" in told[0] and "is back" in told[1]
    # Ten frames a second came, and one in three was asked for.
    assert source.dropped > 2
    assert [frame.number for frame in seen] == list(range(len(seen)))


def test_a_stream_that_never_answers_can_be_closed(monkeypatch):
    monkeypatch.setattr(sources, "OPEN_SECONDS", 1.0)
    told = []
    source = LiveStream("rtsp://127.0.0.1:9/none", told.append)
    threading.Timer(0.5, source.close).start()
    started = time.monotonic()
    assert list(source.frames(0)) == [] and time.monotonic() - started < 10
    assert told and "does not answer" in told[0]


def test_only_the_newest_frame_is_kept(monkeypatch):
    """A reader that is asked rarely falls behind nothing: what it gives is new, and the rest was dropped."""

    class Capture:
        def __init__(self):
            self.number = 0

        def isOpened(self):
            return True

        def read(self):
            time.sleep(0.01)
            self.number += 1
            return True, np.full((4, 4, 3), self.number % 256, np.uint8)

        def release(self):
            pass

    source = LiveStream("rtsp://camera/stream", lambda line: None)
    monkeypatch.setattr(source, "_open", Capture)
    levels = []
    for frame in source.frames(0.0):
        levels.append(int(frame.image[0, 0, 0]))
        time.sleep(0.2)
        if len(levels) == 4:
            source.close()
    assert levels[-1] - levels[0] > 15
    assert source.dropped > 15


class StillsHandler(BaseHTTPRequestHandler):
    answers: list = []

    def do_GET(self):
        status, level = self.answers.pop(0) if self.answers else (200, 99)
        data = BytesIO()
        Image.new("RGB", (8, 8), (level, 0, 0)).save(data, "PNG")
        self.send_response(status)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(data.getvalue())

    def log_message(self, *args):
        pass


def test_stills_over_http_survive_errors(monkeypatch):
    monkeypatch.setattr(sources, "FIRST_PAUSE", 0.05)
    server = ThreadingHTTPServer(("127.0.0.1", 0), StillsHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    StillsHandler.answers = [(200, 1), (200, 11), (503, 0), (200, 22)]
    told = []
    source = open_source(f"http://127.0.0.1:{server.server_port}/still", told.append)
    assert isinstance(source, HttpStills)
    levels = []
    for frame in source.frames(0.0):
        levels.append(int(frame.image[0, 0, 0]))
        if len(levels) == 3:
            source.close()
    server.shutdown()
    assert levels == [11, 22, 99] and source.reconnects == 1
    assert "503" in told[0] and "is back" in told[1]


def test_the_address_says_what_a_source_is(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "one.png")
    assert isinstance(open_source("0"), LiveStream)
    assert isinstance(open_source("rtsp://camera/stream"), LiveStream)
    assert isinstance(open_source(str(tmp_path / "one.png")), ImageFiles)
