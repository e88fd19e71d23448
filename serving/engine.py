"""vLLM as a child process: started, watched, started again when it dies, and stopped with everything below it.

It hangs on a leash (`leash.py`), so that it ends with this process even where that is killed: an engine that is left would
keep its port and its memory from the next one.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx

from .engine_settings import EngineSettings

logger = logging.getLogger(__name__)

STOP_SECONDS = 20.0  # between SIGTERM and SIGKILL
PORT_SECONDS = 5.0  # for which a port may still be held by the engine of a gateway that was just killed
LEASH = Path(__file__).with_name("leash.py")
RESTART_SECONDS = (1.0, 60.0)  # first and longest pause before an engine is started again


@dataclass
class Engine:
    """A vLLM server in a child process, started again whenever it dies.

    Attributes:
        settings: how it is started.
        log: file that receives what it prints.
        restarts: how often it was started again.
    """

    settings: EngineSettings
    log: Path
    restarts: int = 0
    _process: asyncio.subprocess.Process | None = None
    _task: asyncio.Task | None = None
    _stopping: bool = False

    @property
    def pid(self) -> int | None:
        """Process id of the server that was started last; None before the first start."""
        return None if self._process is None else self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status of the server that was started last, minus the signal's number where one killed it; None: it runs."""
        return None if self._process is None else self._process.returncode

    async def start(self) -> None:
        """Starts the server, and a task that starts it again when it dies.

        Raises:
            OSError: there is no such program.
            RuntimeError: another server already listens on its port; its answers would be taken for the engine's.
        """
        host, port = self.settings.host, self.settings.port
        deadline = asyncio.get_running_loop().time() + PORT_SECONDS
        while await _is_in_use(host, port):
            if asyncio.get_running_loop().time() > deadline:
                raise RuntimeError(f"port {port} of {host} is in use; wanted a free one for the engine.")
            await asyncio.sleep(0.1)
        self._task = asyncio.create_task(self._watch(await self._launch()))

    async def ready(self, seconds: float) -> None:
        """Waits until the server answers /health.

        Args:
            seconds: how long at most.

        Raises:
            RuntimeError: it was never started, or ended, or did not answer in time; of the last two the message holds
                the last lines of its log.
        """
        watching = self._task
        if watching is None:
            raise RuntimeError("the engine was not started; wanted `start` before `ready`.")
        deadline = asyncio.get_running_loop().time() + seconds
        async with httpx.AsyncClient(trust_env=False, timeout=min(5.0, seconds)) as client:
            while asyncio.get_running_loop().time() < deadline:
                if self.restarts or watching.done():
                    raise RuntimeError(f"the engine ended while it started.\n{self._last_lines()}")
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{self.settings.url}/health")).status_code == 200:
                        return
                await asyncio.sleep(0.5)
        raise RuntimeError(f"the engine did not answer within {seconds:g} s.\n{self._last_lines()}")

    async def stop(self) -> None:
        """Ends the server with SIGTERM, and with SIGKILL what is left of it after `STOP_SECONDS`. Idempotent."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            self._signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except asyncio.TimeoutError:
                self._signal(signal.SIGKILL)
                with contextlib.suppress(
                    asyncio.TimeoutError
                ):  # a process that hangs in a driver cannot be killed
                    await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        self._signal(signal.SIGKILL)  # worker processes may outlive the server
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _launch(self) -> asyncio.subprocess.Process:
        command = self.settings.command()
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(errno.ENOENT, "there is no such program", command[0])
        with self.log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-SE", str(LEASH), *command),
                stdin=asyncio.subprocess.PIPE,  # the leash: closed with this process
                stdout=log,
                stderr=log,
                env=self.settings.environment(),
                start_new_session=True,  # Ctrl-C reaches only us, and its workers can be signalled as one group
            )
        self._process = process
        return process

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        first, longest = RESTART_SECONDS
        pause = first
        while True:
            began = asyncio.get_running_loop().time()
            code = await process.wait()
            if self._stopping:
                return
            self._signal(signal.SIGKILL)
            self.restarts += 1
            if asyncio.get_running_loop().time() - began > longest:
                pause = first
            logger.error(
                "the engine at %s ended with %s; started again in %g s (log: %s)",
                self.settings.url,
                code,
                pause,
                self.log,
            )
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
            try:
                process = await self._launch()
            except OSError as error:  # out of memory, or the program was moved: the next try may succeed
                logger.error("the engine at %s cannot be started: %s", self.settings.url, error)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _last_lines(self, count: int = 15) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"The end of {self.log}:", *lines[-count:]])


async def _is_in_use(host: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection(host, port)
        writer.close()
        return True
    return False
