"""vLLM as a child process: its command line for a Backdrop folder, its cache in bytes, and what happens when it dies.

vLLM lives in a Python environment of its own and is never imported here.
"""

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx

from backdrop.modeling.configuration_backdrop import BackdropConfig

logger = logging.getLogger(__name__)

ENVIRONMENT = ".venv-serve"
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
TEXT_TOKENS = 64  # of a system prompt in front of a background, when a cache is sized
STOP_SECONDS = 20.0
# vLLM's encoder cache holds as many tokens as a batch may have: its default where that is smallest, and where it is largest.
BATCHED_TOKENS = (2048, 16_384)
RESTART_SECONDS = (1.0, 60.0)  # first and longest pause before an engine is started again


def find_engine_python(given: str | None = None) -> str:
    """The Python that has vLLM: as given, of the environment's BACKDROP_ENGINE_PYTHON, `make serve-setup`'s, our own.

    Raises:
        ValueError: there is none.
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
    """One engine.

    Attributes:
        model: exported folder or Hub id.
        python: see `find_engine_python`.
        name: the model's name in the API.
        host, port: where it listens; nobody but the gateway should reach it.
        dtype: of weights and cache; "auto" is the model's own.
        max_model_len: longest prompt and answer, tokens; None: the model's.
        max_num_seqs: requests in one batch.
        max_num_batched_tokens: in one batch, and in vLLM's encoder cache.
        kv_cache_bytes: None: vLLM's own choice (on a GPU what is left of its memory).
        block_size: tokens that are cached together; the engine knows a background down to whole blocks.
        images: groups in one request.
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
    extra: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def command(self) -> list[str]:
        """The server's command line."""
        words = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", self.model]
        words += ["--served-model-name", self.name, "--host", self.host, "--port", str(self.port)]
        words += ["--trust-remote-code", "--model-impl", "transformers", "--dtype", self.dtype]
        # Groups are RGBA images. vLLM would turn them into RGB here, and again on the way into its processor cache.
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
        """The child's environment: ours, without usage statistics."""
        return {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def kv_bytes_per_token(config: BackdropConfig, dtype: str = "auto") -> int:
    """Bytes of keys and values that one token takes: 2 x layers x key-value heads x head width x bytes of a number."""
    text = config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kind = (
        str(getattr(config, "dtype", None) or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    )
    layers = text.num_hidden_layers + config.num_prefusion_layers
    return 2 * layers * heads * width * DTYPE_BYTES[kind]


def kv_cache_bytes(
    config: BackdropConfig,
    backgrounds: int,
    sequences: int,
    max_model_len: int,
    block_size: int,
    dtype: str = "auto",
) -> int:
    """Bytes of a cache that keeps so many backgrounds beside the requests in work.

    A background counts as if it owned every patch, with its separators and a system prompt of `TEXT_TOKENS` tokens,
    rounded up to blocks; a request as the longest there can be.
    """
    tokens = config.num_patches + config.extra_tokens_per_group + 2 + TEXT_TOKENS
    blocks = backgrounds * -(-tokens // block_size) + sequences * -(-max_model_len // block_size) + 1
    return blocks * block_size * kv_bytes_per_token(config, dtype)


def batched_tokens(config: BackdropConfig, backgrounds: int, sequences: int, max_model_len: int) -> int:
    """Tokens of a batch with which vLLM's encoder cache keeps so many backgrounds, within `BATCHED_TOKENS`.

    A background's last tokens lie in a block that is not full, which is never cached: they are asked for again by every
    request, and the whole group is encoded anew unless the encoder cache has it. Its size is that of a batch. Never
    less than the longest request.
    """
    wanted = backgrounds * (config.num_patches + config.extra_tokens_per_group) + sequences * max_model_len
    return max(min(max(wanted, BATCHED_TOKENS[0]), BATCHED_TOKENS[1]), max_model_len)


@dataclass
class Engine:
    """A running engine, started again when it dies.

    Attributes:
        settings: its own.
        log: file of what it prints.
        restarts: how often it was started again.
    """

    settings: EngineSettings
    log: Path
    restarts: int = 0
    _process: asyncio.subprocess.Process | None = None
    _task: asyncio.Task | None = None
    _stopping: bool = False

    async def start(self) -> None:
        """Starts it and goes on watching it.

        Raises:
            OSError: there is no such program.
            RuntimeError: another server listens where it should; that one's answers would be taken for its own.
        """
        host, port = self.settings.host, self.settings.port
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            raise RuntimeError(f"port {port} of {host} is in use; wanted a free one for the engine.")
        await self._launch()
        self._task = asyncio.create_task(self._watch())

    async def ready(self, seconds: float) -> None:
        """Waits until it answers.

        Raises:
            RuntimeError: it ended, or did not answer in time; with the last lines of its log.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        async with httpx.AsyncClient(trust_env=False, timeout=min(5.0, seconds)) as client:
            while asyncio.get_running_loop().time() < deadline:
                if self.restarts or self._task.done():
                    raise RuntimeError(f"the engine ended while it started.\n{self._last_lines()}")
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"{self.settings.url}/health")).status_code == 200:
                        return
                await asyncio.sleep(0.5)
        raise RuntimeError(f"the engine did not answer within {seconds:g} s.\n{self._last_lines()}")

    async def stop(self) -> None:
        """Ends it: SIGTERM, and SIGKILL for what is left after `STOP_SECONDS`."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            self._signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except asyncio.TimeoutError:
                self._signal(signal.SIGKILL)
                with contextlib.suppress(asyncio.TimeoutError):  # one that hangs in a driver is left behind
                    await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        self._signal(signal.SIGKILL)  # workers that outlived their parent
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _launch(self) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.settings.command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.settings.environment(),
                start_new_session=True,  # Ctrl-C is ours to pass on, and its workers end with it
            )

    async def _watch(self) -> None:
        first, longest = RESTART_SECONDS
        pause = first
        while True:
            began = asyncio.get_running_loop().time()
            code = await self._process.wait()
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
                await self._launch()
            except OSError as error:  # no memory, no file: perhaps next time
                logger.error("the engine at %s cannot be started: %s", self.settings.url, error)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _last_lines(self, count: int = 15) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"The end of {self.log}:", *lines[-count:]])
