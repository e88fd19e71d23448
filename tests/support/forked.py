"""Processes that start at once: a fork server imports torch and TRL for all of them.

Functions given to `start` are found by name in the new process, so they live in modules of tests/support.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from paths import ROOT, SUPPORT

TIMEOUT_S = 300  # of a run; processes that wait for each other for ever are killed
PRELOADED = ["pytest", "programs", "trl.scripts.sft"]


class ForkServer:
    """Starts functions in processes of their own.

    Args:
        home: folder for what Hugging Face's libraries cache.
    """

    def __init__(self, home: Path):
        self.home = home
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        path = os.pathsep.join([str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        values = {"PYTHONPATH": path, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        # The server's environment is that of its start, and its processes have it too.
        with mock.patch.dict(os.environ, values):
            forkserver.ensure_running()

    def start(self, function: Callable, *arguments, log: Path, environment: dict[str, str] | None = None):
        """The started process; its output goes to `log`."""
        process = self._context.Process(target=_run, args=(function, arguments, str(log), environment or {}))
        process.start()
        return process

    def run(self, function: Callable, *arguments, log: Path, processes: int = 1, environment=None) -> str:
        """The output of a function that ran in so many processes, which find each other as torchrun's do."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks = {name: str(value) for name, value in ranks.items()} if processes > 1 else {}
            started.append(
                self.start(function, *arguments, log=log, environment=ranks | dict(environment or {}))
            )
        end = time.monotonic() + TIMEOUT_S
        for process in started:
            process.join(max(0.0, end - time.monotonic()))
        output = log.read_text()
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
        assert codes == [0] * processes, f"exit codes {codes}\n{output[-3000:]}"
        return output


def _run(function: Callable, arguments: tuple, log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    function(*arguments)
