"""A real stack: two vLLM engines behind a gateway, started by `backdrop serve` on the committed model."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import yaml
from paths import EXAMPLE, ROOT

from backdrop.serving.tenants import hash_key

MODEL = EXAMPLE
BLOCK = 32
KEYS = {"north": "key-of-north", "south": "key-of-south"}
KEEPER = {"Authorization": "Bearer key-of-the-keeper"}


def free_ports(count: int) -> list[int]:
    """Consecutive free ports, as the engines of `backdrop serve` take them."""
    while True:
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            ports = range(first.getsockname()[1], first.getsockname()[1] + count)
            with contextlib.suppress(OSError, OverflowError):
                for port in ports[1:]:
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                return list(ports)


@dataclass
class Stack:
    """A running `backdrop serve`."""

    process: subprocess.Popen
    url: str
    engines: list[str]
    log: Path

    def engine_processes(self, number: int) -> list[psutil.Process]:
        """The server of an engine and everything below it."""
        port = self.engines[number].rsplit(":", 1)[1]
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended in the meantime
                if f"--port {port}" in " ".join(child.cmdline()):
                    return [child, *child.children(recursive=True)]
        return []

    def signal_engine(self, number: int, sent: signal.Signals) -> None:
        """Sends a signal to an engine and its workers."""
        processes = self.engine_processes(number)
        assert processes, f"engine {number} is not running"
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(sent)

    def states(self) -> dict[str, str]:
        return httpx.get(f"{self.url}/health", headers=KEEPER, timeout=10).json()["replicas"]

    def wait_until_up(self, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                if set(self.states().values()) == {"up"}:
                    return
            time.sleep(0.5)
        raise AssertionError(f"not all replicas came up: {self.states()}\n{self.log.read_text()[-3000:]}")

    def changes(self) -> str:
        """The lines of the gateway's log about replicas."""
        return "\n".join(line for line in self.log.read_text().splitlines() if "replica" in line)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", headers=KEEPER, timeout=10).text
        found = re.search(rf"^{re.escape(name)} (.*)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


def start_stack(folder: Path, engine_python: str, replicas: int = 2) -> Stack:
    ports = free_ports(replicas + 1)
    config = folder / "gateway.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "keys": {hash_key(key): tenant for tenant, key in KEYS.items()},
                "admin_keys": {hash_key("key-of-the-keeper"): "*"},
                "health_seconds": 0.5,
            }
        )
    )
    command = [sys.executable, "-m", "backdrop", "serve", str(MODEL), "--port", str(ports[-1])]
    command += ["--replicas", str(replicas), "--engine-port", str(ports[0]), "--engine-python", engine_python]
    command += [
        "--config",
        str(config),
        "--log-folder",
        str(folder),
        "--dtype",
        "float32",
        "--tolerance",
        "0",
    ]
    command += [
        "--max-model-len",
        "512",
        "--max-num-seqs",
        "16",
        "--backgrounds",
        "200",
        "--block-size",
        str(BLOCK),
    ]
    command += ["--", "--enforce-eager"]
    log = folder / "gateway.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
    stack = Stack(
        process, f"http://127.0.0.1:{ports[-1]}", [f"http://127.0.0.1:{port}" for port in ports[:-1]], log
    )
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(f"backdrop serve ended with {process.returncode}\n{log.read_text()[-4000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{stack.url}/health", timeout=5).status_code == 200:
                stack.wait_until_up()
                return stack
        time.sleep(0.5)
    raise AssertionError(f"backdrop serve did not start\n{log.read_text()[-4000:]}")
