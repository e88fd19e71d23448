"""vLLM as a child process, with a small script in its place: command line, cache size, and what happens when it dies."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest
import tiny
from paths import EXAMPLE

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.serving import engine as engine_module
from backdrop.serving.engine import (
    TEXT_TOKENS,
    Engine,
    EngineSettings,
    batched_tokens,
    find_engine_python,
    kv_bytes_per_token,
    kv_cache_bytes,
)

MODEL = EXAMPLE

# Stands in for the Python with vLLM: answers /health; what it does otherwise stands in the --model argument.
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
            end = time.monotonic() + 5  # a killed process goes when the machine has time for it
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


# ---- settings


def test_the_command_line():
    words = EngineSettings(model="folder", python="/venv/bin/python").command()
    assert words == [
        *("/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "folder"),
        *("--served-model-name", "backdrop", "--host", "127.0.0.1", "--port", "8100"),
        *("--trust-remote-code", "--model-impl", "transformers", "--dtype", "auto"),
        *("--media-io-kwargs", '{"image": {"image_mode": null}}', "--mm-processor-cache-gb", "0"),
        *("--limit-mm-per-prompt", '{"image": 32}', "--enable-prompt-tokens-details"),
    ]
    full = EngineSettings(
        model="folder",
        python="python",
        name="scenes",
        host="0.0.0.0",
        port=9000,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=4096,
        kv_cache_bytes=2**28,
        block_size=32,
        images=4,
        extra=("--enforce-eager", "--seed", "0"),
    )
    words = full.command()
    found = {name: value for name, value in zip(words, words[1:], strict=False) if name.startswith("--")}
    assert found["--served-model-name"] == "scenes" and found["--dtype"] == "bfloat16"
    assert (found["--host"], found["--port"]) == ("0.0.0.0", "9000") and full.url == "http://0.0.0.0:9000"
    assert (found["--max-model-len"], found["--max-num-seqs"], found["--block-size"]) == ("512", "4", "32")
    assert found["--max-num-batched-tokens"] == "4096"
    assert found["--kv-cache-memory-bytes"] == str(2**28)
    assert json.loads(found["--limit-mm-per-prompt"]) == {"image": 4}
    assert words[-3:] == ["--enforce-eager", "--seed", "0"]


def test_the_environment_tells_nobody(monkeypatch):
    monkeypatch.setenv("SOME_NAME", "kept")
    environment = EngineSettings(model="folder", python="python").environment()
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert environment["SOME_NAME"] == "kept" and "VLLM_NO_USAGE_STATS" not in os.environ


def test_the_python_with_vllm_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BACKDROP_ENGINE_PYTHON", raising=False)
    monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"no vLLM: wanted .venv-serve \(make serve-setup\), --engine-python, or BACK"
    ):
        find_engine_python()
    monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: name)
    assert find_engine_python() == sys.executable
    standard = tmp_path / ".venv-serve" / "bin" / "python"
    standard.parent.mkdir(parents=True)
    standard.touch()
    assert find_engine_python() == str(standard)
    (tmp_path / "other").touch()
    monkeypatch.setenv("BACKDROP_ENGINE_PYTHON", str(tmp_path / "other"))
    assert find_engine_python() == str(tmp_path / "other")
    assert find_engine_python(str(standard)) == str(standard)
    with pytest.raises(
        ValueError, match="^gone is not there; wanted the Python of an environment with vLLM.$"
    ):
        find_engine_python("gone")
    monkeypatch.setenv("BACKDROP_ENGINE_PYTHON", "elsewhere")
    with pytest.raises(ValueError, match="elsewhere is not there"):
        find_engine_python()


def test_a_venvs_python_is_not_resolved(tmp_path):
    # Resolved it would be the system's, which knows nothing of the environment.
    (tmp_path / "python").symlink_to(sys.executable)
    assert find_engine_python(str(tmp_path / "python")) == str(tmp_path / "python")


# ---- the cache's size


def test_bytes_of_a_token_of_the_committed_model():
    config = BackdropConfig.from_pretrained(MODEL)
    # Keys and values, 4 layers, 6 heads of 32 numbers of 4 or 2 bytes.
    assert kv_bytes_per_token(config, "float32") == 2 * 4 * 6 * 32 * 4 == 6144
    assert kv_bytes_per_token(config, "bfloat16") == kv_bytes_per_token(config, "float16") == 3072
    assert kv_bytes_per_token(config) == 6144  # as the folder says: float32
    config.dtype = "torch.bfloat16"
    assert kv_bytes_per_token(config) == 3072


def test_bytes_of_a_token_with_grouped_heads_and_prefusion():
    # 2 layers and 1 of prefusion, 2 of 4 heads, 32 / 4 numbers.
    config = tiny.backdrop_config(num_prefusion_layers=1)
    assert kv_bytes_per_token(config, "float32") == 2 * 3 * 2 * 8 * 4
    config = tiny.backdrop_config(text_config=tiny.text_config(head_dim=16))
    assert kv_bytes_per_token(config, "float32") == 2 * 2 * 2 * 16 * 4


def test_bytes_of_a_cache_of_the_committed_model():
    config = BackdropConfig.from_pretrained(MODEL)
    # 144 patches, 2 separators, a system prompt: 7 blocks of 32 for each of 10 backgrounds; 512 / 32 for each of 4
    # requests; and one that vLLM keeps for itself.
    assert TEXT_TOKENS == 64 and -(-(144 + 2 + 64) // 32) == 7
    wanted = (10 * 7 + 4 * 16 + 1) * 32 * 6144
    assert kv_cache_bytes(config, 10, 4, 512, 32, "float32") == wanted
    assert kv_cache_bytes(config, 10, 4, 512, 32, "float16") == wanted // 2
    # Rounded up: 210 tokens are 14 blocks of 16, 500 are 32.
    assert kv_cache_bytes(config, 1, 1, 500, 16, "float32") == (14 + 32 + 1) * 16 * 6144


def test_tokens_of_a_batch_keep_the_backgrounds_of_the_committed_model():
    config = BackdropConfig.from_pretrained(MODEL)
    assert batched_tokens(config, 20, 4, 512) == 20 * 144 + 4 * 512
    assert batched_tokens(config, 1, 1, 512) == 2048  # vLLM's own smallest default
    assert batched_tokens(config, 1000, 4, 512) == 16_384  # a batch must be computed too
    assert batched_tokens(config, 1000, 4, 32_768) == 32_768


# ---- a running engine


def test_it_starts_answers_and_stops(stub):
    async def main():
        async with running(stub()) as engine:
            await engine.ready(10)
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(f"{engine.settings.url}/health")).status_code == 200
            (pid,) = pids(engine)
            assert os.getpgid(pid) == pid, "a signal to us must not reach it"
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


def test_a_killed_engine_is_started_again(stub, caplog):
    async def main():
        async with running(stub("worker")) as engine:
            await engine.ready(10)
            await until(lambda: len(pids(engine)) == 2)
            os.kill(engine._process.pid, signal.SIGKILL)
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
        (0.0005, 0.001, [0.0005] * 3),  # each lived longer than the longest pause
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
        assert engine._process.returncode == -signal.SIGKILL
        await until(lambda: not any(map(is_running, pids(engine))))

    asyncio.run(main())


def test_stop_kills_workers_that_outlive_their_parent(stub):
    async def main():
        async with running(stub("worker")) as engine:
            await engine.ready(10)
            await until(lambda: len(pids(engine)) == 2)
        assert engine._process.returncode == -signal.SIGTERM
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
            os.kill(engine._process.pid, signal.SIGKILL)
            await until(lambda: "cannot be started" in caplog.text)
            python.with_suffix(".away").rename(python)
            await until(lambda: len(pids(engine)) == 2)

    asyncio.run(main())
