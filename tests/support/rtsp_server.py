"""A camera: a clip, served over RTSP by a packaged server in a process of its own, that can be cut off and started again."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

CODE = "import asyncio, sys; from aio_rtsp_toolkit import server; asyncio.run(server.serve(*sys.argv[1:3], int(sys.argv[3])))"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def write_h264(path: Path, frames: int, rate: int = 10, side: tuple[int, int] = (160, 120)) -> None:
    """A clip of a bright square that moves from left to right, encoded by FFmpeg."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.options = {"bf": "0", "g": str(rate)}
        for number in range(frames):
            image = np.full((side[1], side[0], 3), 60, np.uint8)
            left = number * 3 % (side[0] - 30)
            image[40:70, left : left + 30] = [220, 40, 40]
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


class RtspCamera:
    """Serves the clips of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-c", CODE, str(self.folder), "127.0.0.1", str(self.port)]
        with (self.folder / "rtsp.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise AssertionError("the RTSP server did not start")

    def cut_off(self) -> None:
        self.process.kill()
        self.process.wait()

    def url(self, name: str) -> str:
        return f"rtsp://127.0.0.1:{self.port}/{name}"
