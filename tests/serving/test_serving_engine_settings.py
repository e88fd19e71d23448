"""How vLLM is started: its command line, its environment, and the Python that has it."""

import json
import os
import sys

import pytest

from backdrop.serving import engine_settings as settings_module
from backdrop.serving.engine_settings import EngineSettings, find_engine_python


def test_the_command_line():
    words = EngineSettings(model="folder", python="/venv/bin/python").command()
    assert words == [
        *("/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "folder"),
        *("--served-model-name", "backdrop", "--host", "127.0.0.1", "--port", "8100"),
        *("--trust-remote-code", "--model-impl", "transformers", "--dtype", "auto"),
        *("--media-io-kwargs", '{"image": {"image_mode": null}}', "--mm-processor-cache-gb", "0"),
        *("--limit-mm-per-prompt", '{"image": 32}', "--enable-prompt-tokens-details"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    own = EngineSettings(
        model="folder", python="python", extra=("--tool-call-parser", "llama3_json")
    ).command()
    assert own.count("--tool-call-parser") == 1 and "--enable-auto-tool-choice" not in own
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
        fit="pad",
        extra=("--enforce-eager", "--seed", "0"),
    )
    words = full.command()
    found = {name: value for name, value in zip(words, words[1:], strict=False) if name.startswith("--")}
    assert found["--mm-processor-kwargs"] == '{"fit": "pad"}'
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
    monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"no vLLM: wanted .venv-serve \(make serve-setup\), --engine-python, or BACK"
    ):
        find_engine_python()
    monkeypatch.setattr(settings_module.importlib.util, "find_spec", lambda name: name)
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
    # The link's target is the system's Python, which knows nothing of the environment.
    (tmp_path / "python").symlink_to(sys.executable)
    assert find_engine_python(str(tmp_path / "python")) == str(tmp_path / "python")
