"""vLLM as a child process, with a small script in its place: how it starts, stops, dies and is started again."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from backdrop.serving import engine as engine_module
from backdrop.serving.engine import Engine
from backdrop.serving.engine_settings import EngineSettings

# Takes the place of the Python with vLLM: answers /health; the words of its --model argument say how it misbehaves.
STUB = f"""#!{sys.executable} -SE
import os, signal, socket, sys, time

words = sys.argv[1:]
how = words[words.index("--model") + 1].split(",")
port = int(words[words.index("--port") + 1])
print("stub", os.getpid(), os.environ["VLLM_NO_USAGE_STATS"], flush=True)
if "worker" in how and os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("worker", os.getpid(), flush=True)
    time.sleep(60)
if "fails" in how:
    for i in range(40):
        print("line", i)
    sys.exit("no such model")
if "stubborn" in how:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", port))
listener.listen()
if "mute" in how:
    time.sleep(60)
while True:
    connection, _ = listener.accept()
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
    connection.close()
"""


@pytest.fixture
def fast(monkeypatch):
    """Pauses of milliseconds."""
    monkeypatch.setattr(engine_module, "RESTART_SECONDS", (0.02, 0.05))
    monkeypatch.setattr(engine_module, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(engine_module, "PORT_SECONDS", 0.2)


@pytest.fixture
def stub(tmp_path, unused_port, fast):
    """Makes engines whose Python is the stub; at the end none of its processes may be left."""
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    made = []

    def make(how: str = "works", **options) -> Engine:
        settings = EngineSettings(model=how, python=str(python), port=unused_port, **options)
        made.append(Engine(settings, tmp_path / "engine.log"))
        return made[-1]

    yield make
    for engine in made:
        for pid in pids(engine):
            end = time.monotonic() + 5  # a busy machine takes its time to remove a killed process
            while is_running(pid) and time.monotonic() < end:
                time.sleep(0.01)
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
                pytest.fail(f"process {pid} is left")


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def pids(engine: Engine, word: str = "") -> list[int]:
    """Of the processes that wrote into the log."""
    if not engine.log.exists():
        return []
    lines = [line.split() for line in engine.log.read_text().splitlines()]
    return [int(line[1]) for line in lines if line and line[0] in ("stub", "worker") and word in line[0]]


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


async def until(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(engine: Engine):
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
    assert len(asyncio.all_tasks()) == 1


def test_it_starts_answers_and_stops(stub):
    async def main():
        async with running(stub()) as engine:
            await engine.ready(10)
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(f"{engine.settings.url}/health")).status_code == 200
            (pid,) = pids(engine)
            assert os.getpgid(pid) == engine.pid != os.getpgid(0), "a signal to us must not reach it"
            assert engine.restarts == 0 and is_running(pid)
        assert not is_running(pid)
        assert engine.log.read_text().split() == ["stub", str(pid), "1"]

    asyncio.run(main())


def test_another_server_on_its_port_is_not_taken_for_it(stub):
    import socket

    engine = stub()
    with (
        socket.create_server((engine.settings.host, engine.settings.port)),
        pytest.raises(
            RuntimeError, match=rf"port {engine.settings.port} of 127.0.0.1 is in use; wanted a free"
        ),
    ):
        asyncio.run(engine.start())
    assert not engine.log.exists(), "nothing was started"
    asyncio.run(engine.stop())


def test_a_gateway_that_is_killed_leaves_no_engine(stub, monkeypatch):
    """Nor its workers; and the next one has the port at once."""
    engine = stub("works,worker,stubborn")

    async def gateway(ready):
        await engine.start()
        await engine.ready(10)
        ready.set()
        await asyncio.sleep(60)

    forked = multiprocessing.get_context("fork")
    ready = forked.Event()
    process = forked.Process(target=lambda: asyncio.run(gateway(ready)))
    process.start()
    assert ready.wait(10)
    assert len(pids(engine)) == 2 and all(is_running(pid) for pid in pids(engine))
    process.kill()
    process.join()
    monkeypatch.setattr(engine_module, "PORT_SECONDS", 5.0)

    async def check():
        async with running(stub()) as after:
            await after.ready(5)
            assert [pid for pid in pids(engine) if is_running(pid)] == pids(engine)[-1:]

    asyncio.run(check())


def test_a_leash_ends_as_its_program_does():
    for program, code in (("import sys; sys.exit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9)):
        command = [sys.executable, str(engine_module.LEASH), sys.executable, "-SEc", program]
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as leash:
            assert leash.wait(10) == code


def test_a_killed_engine_is_started_again(stub, caplog):
    async def main():
        async with running(stub("worker")) as engine:
            await engine.ready(10)
            await until(lambda: len(pids(engine)) == 2)
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: len(pids(engine, "stub")) == 2)
            assert engine.restarts == 1
            await until(lambda: not any(map(is_running, pids(engine)[:2])))  # its worker too
            await until(lambda: is_running(pids(engine, "stub")[1]))
            async with httpx.AsyncClient(trust_env=False) as client:
                for _ in range(500):
                    with contextlib.suppress(httpx.HTTPError):
                        assert (await client.get(f"{engine.settings.url}/health")).status_code == 200
                        break
                    await asyncio.sleep(0.01)
                else:
                    pytest.fail("it does not answer again")

    asyncio.run(main())
    assert "ended with -9; started again in 0.02 s" in caplog.text


@pytest.mark.parametrize(
    ("first", "longest", "wanted"),
    [
        (0.01, 5.0, [0.01, 0.02, 0.04]),
        (0.3, 0.5, [0.3, 0.5]),
        (0.0005, 0.001, [0.0005] * 3),  # after a life longer than the longest pause, pauses begin anew
    ],
    ids=["growing", "bounded", "anew"],
)
def test_pauses_before_restarts(stub, caplog, monkeypatch, first, longest, wanted):
    monkeypatch.setattr(engine_module, "RESTART_SECONDS", (first, longest))

    async def main():
        async with running(stub("fails")) as engine:
            await until(lambda: engine.restarts >= len(wanted), 20)

    asyncio.run(main())
    pauses = [record.args[2] for record in caplog.records if "started again" in record.msg]
    assert pauses[: len(wanted)] == wanted


def test_stop_kills_what_does_not_listen(stub):
    async def main():
        async with running(stub("worker,stubborn")) as engine:
            await engine.ready(10)
            await until(lambda: len(pids(engine)) == 2)
            started = time.monotonic()
        assert 0.1 <= time.monotonic() - started < 5
        assert engine.returncode == -signal.SIGKILL
        await until(lambda: not any(map(is_running, pids(engine))))

    asyncio.run(main())


def test_stop_kills_workers_that_outlive_their_parent(stub):
    async def main():
        async with running(stub("worker")) as engine:
            await engine.ready(10)
            await until(lambda: len(pids(engine)) == 2)
        assert engine.returncode == -signal.SIGTERM
        await until(lambda: not any(map(is_running, pids(engine))))
        assert engine.restarts == 0

    asyncio.run(main())


def test_stop_ends_the_pause_before_a_restart(stub, monkeypatch):
    monkeypatch.setattr(engine_module, "RESTART_SECONDS", (60.0, 60.0))

    async def main():
        engine = stub("fails")
        await engine.start()
        await until(lambda: engine.restarts == 1)
        await asyncio.wait_for(engine.stop(), 5)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_stop_before_start_and_twice(stub):
    async def main():
        engine = stub()
        await engine.stop()
        engine = stub()
        await engine.start()
        await engine.stop()
        await engine.stop()

    asyncio.run(main())


def test_an_engine_that_ends_while_it_starts_says_why(stub):
    async def main():
        async with running(stub("fails")) as engine:
            with pytest.raises(
                RuntimeError, match="the engine ended while it started.\nThe end of .*engine.log:"
            ) as caught:
                await engine.ready(10)
            lines = str(caught.value).splitlines()
            assert (
                len(lines) == 17 and "no such model" in lines and "line 39" in lines and "line 1" not in lines
            )

    asyncio.run(main())


def test_an_engine_that_does_not_answer_in_time_says_so(stub):
    async def main():
        async with running(stub("mute")) as engine:
            await until(lambda: pids(engine))
            with pytest.raises(RuntimeError, match="did not answer within 0.05 s.\nThe end of .*:\nstub"):
                await engine.ready(0.05)

    asyncio.run(main())


def test_a_python_that_is_not_there_is_an_error_at_once(tmp_path, fast):
    async def main():
        engine = Engine(
            EngineSettings(model="folder", python=str(tmp_path / "python")), tmp_path / "engine.log"
        )
        with pytest.raises(FileNotFoundError, match="python"):
            await asyncio.wait_for(engine.start(), 5)
        await engine.stop()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_a_restart_that_cannot_be_is_tried_again(stub, caplog):
    async def main():
        async with running(stub()) as engine:
            await engine.ready(10)
            python = Path(engine.settings.python)
            python.rename(python.with_suffix(".away"))
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: "cannot be started" in caplog.text)
            python.with_suffix(".away").rename(python)
            await until(lambda: len(pids(engine)) == 2)

    asyncio.run(main())
