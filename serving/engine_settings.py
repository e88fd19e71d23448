"""How vLLM is started on a Backdrop folder: the Python that has it, and its server's command line.

vLLM lives in a Python environment of its own and is never imported here.
"""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = ".venv-serve"  # made by `make serve-setup`


def find_engine_python(given: str | None = None) -> str:
    """Path of the Python that has vLLM: the first of these that is set or exists.

    The path given; the environment variable BACKDROP_ENGINE_PYTHON; the environment that `make serve-setup` makes in the
    working directory; this very Python. Symbolic links are kept: resolved, the Python of a virtual environment would be
    the system's.

    Raises:
        ValueError: there is none, or the one that was named is not there.
    """
    candidates = [given, os.environ.get("BACKDROP_ENGINE_PYTHON"), str(Path(ENVIRONMENT, "bin", "python"))]
    for candidate in filter(None, candidates):
        if Path(candidate).is_file():
            return str(Path(candidate).absolute())
        if candidate in candidates[:2] and candidate:
            raise ValueError(f"{candidate} is not there; wanted the Python of an environment with vLLM.")
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    raise ValueError(
        f"no vLLM: wanted {ENVIRONMENT} (make serve-setup), --engine-python, or BACKDROP_ENGINE_PYTHON."
    )


@dataclass(frozen=True)
class EngineSettings:
    """How one vLLM server is started. None leaves a choice to vLLM.

    Attributes:
        model: exported folder or Hub id.
        python: see `find_engine_python`.
        name: the model's name in the API.
        host, port: where it listens; nobody but the gateway should reach it.
        dtype: of weights and KV cache; "auto" is the model's own.
        max_model_len: longest prompt and answer together, tokens.
        max_num_seqs: requests in one batch.
        max_num_batched_tokens: tokens in one batch, and in vLLM's encoder cache.
        kv_cache_bytes: size of the KV cache (vLLM's own choice on a GPU is all memory that is left).
        block_size: tokens of a KV-cache block; a background is cached up to its last full block.
        images: patch groups in one request.
        fit: of the images that the groups were made of, "crop", "pad" or "stretch"; None: the model's own.
        extra: further arguments of vLLM's server.
    """

    model: str
    python: str
    name: str = "backdrop"
    host: str = "127.0.0.1"
    port: int = 8100
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    block_size: int | None = None
    images: int = 32
    fit: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Base URL of the server, without /v1."""
        return f"http://{self.host}:{self.port}"

    def command(self) -> list[str]:
        """The command line of vLLM's OpenAI-compatible server."""
        words = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        words += ["--served-model-name", self.name, "--host", self.host, "--port", str(self.port)]
        words += ["--trust-remote-code", "--model-impl", "transformers", "--dtype", self.dtype]
        # Patch groups are RGBA images. Without these options vLLM turns them into RGB, once when it decodes them and
        # once more on the way into its processor cache.
        words += [
            "--media-io-kwargs",
            json.dumps({"image": {"image_mode": None}}),
            "--mm-processor-cache-gb",
            "0",
        ]
        words += [
            "--limit-mm-per-prompt",
            json.dumps({"image": self.images}),
            "--enable-prompt-tokens-details",
        ]
        if self.fit is not None:
            words += ["--mm-processor-kwargs", json.dumps({"fit": self.fit})]
        # The chat template shows tools, and has calls written, in Hermes' form; without these options a request with tools
        # is refused.
        if "--tool-call-parser" not in self.extra:
            words += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        for name, value in (
            ("max-model-len", self.max_model_len),
            ("max-num-seqs", self.max_num_seqs),
            ("max-num-batched-tokens", self.max_num_batched_tokens),
            ("kv-cache-memory-bytes", self.kv_cache_bytes),
            ("block-size", self.block_size),
        ):
            if value is not None:
                words += [f"--{name}", str(value)]
        return words + list(self.extra)

    def environment(self) -> dict[str, str]:
        """Environment variables of the child process: our own, with usage statistics switched off."""
        return {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
