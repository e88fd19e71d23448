"""LMCache between two engines: a background computed on one is read by the other."""

import contextlib
import json
import os
import signal
import subprocess
import time

import httpx
import pytest
from running import BLOCK, MODEL, ROOT, free_ports

from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.scenes.world import render_scene
from backdrop.serving import BackdropClient, FrameSplitter
from backdrop.serving.engine_settings import EngineSettings

pytestmark = pytest.mark.slow


def wait(url: str, process: subprocess.Popen, log) -> None:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"{url} does not answer\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="module")
def two_engines(engine_python, tmp_path_factory):
    found = subprocess.run([engine_python, "-c", "import lmcache"], capture_output=True)
    if found.returncode:
        pytest.skip("no LMCache in the engine's environment (make lmcache-test)")
    folder = tmp_path_factory.mktemp("lmcache")
    shared, http, *ports = free_ports(4)
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "0",
        "LMCACHE_TRACK_USAGE": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    server = [engine_python, "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1", "--port", str(shared)]
    server += ["--chunk-size", str(BLOCK), "--l1-size-gb", "0.5", "--eviction-policy", "LRU"]
    server += [
        "--supported-transfer-mode",
        "engine_driven",
        "--http-host",
        "127.0.0.1",
        "--http-port",
        str(http),
    ]
    connector = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": shared},
    }
    engines = [
        EngineSettings(
            model=str(MODEL),
            python=engine_python,
            port=port,
            dtype="float32",
            max_model_len=512,
            max_num_seqs=4,
            kv_cache_bytes=2**28,
            block_size=BLOCK,
            extra=("--enforce-eager", "--kv-transfer-config", json.dumps(connector)),
        )
        for port in ports
    ]
    running = []
    try:
        for name, command in (("server", server), *((f"engine{e.port}", e.command()) for e in engines)):
            log = folder / f"{name}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command, stdout=file, stderr=file, env=environment, cwd=ROOT, start_new_session=True
                )
            running.append(process)
            if name == "server":
                time.sleep(10)  # engines wait for it only for a limited time
            else:
                wait(f"{engines[len(running) - 2].url}/health", process, log)
        yield [engine.url for engine in engines]
    finally:
        for process in running[::-1]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_background_of_one_replica_is_known_to_the_other(two_engines):
    # One splitter for both, as one gateway has: its references are the same for both engines.
    splitter = FrameSplitter(BackdropProcessor.from_pretrained(MODEL), tolerance=0)
    first, second = (BackdropClient(f"{url}/v1", processor=MODEL, tolerance=0) for url in two_engines)
    for client in (first, second):
        client.connect()
        client.preparation.splitter = splitter
    question = "What time is the alarm set for?"
    for background in (115_201, 115_202):
        frames = [render_scene("phone", background, frame) for frame in range(1, 5)]
        right = [next(q.answer for q in scene.questions if q.topic == "time") for scene in frames]
        asked = zip((first, second, second, first), frames, strict=True)
        answers = []
        for client, scene in asked:
            answers.append(client.ask(scene.image, question))
            time.sleep(1)  # the answer does not wait until its blocks are stored
        assert answers[0].cached_tokens == 0
        assert answers[1].cached_tokens >= 2 * BLOCK  # the other replica never saw this background
        assert [answer.text for answer in answers] == right
