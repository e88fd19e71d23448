"""How large the engines' caches must be for a number of backgrounds, and the settings of engines sized so."""

from dataclasses import dataclass

from backdrop.modeling.configuration_backdrop import BackdropConfig

from .engine_settings import EngineSettings, find_engine_python

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
TEXT_TOKENS = 64  # allowed for the system prompt in front of a background
# vLLM's encoder cache holds as many tokens as a batch: its smallest default, and the largest batch we ask for.
BATCHED_TOKENS = (2048, 16_384)
# Tokens of a KV-cache block. vLLM's own on the CPU is 128, which is more than many backgrounds have.
BLOCK_SIZE = 32
MAX_SEQUENCES = 256  # requests in one batch, where a cache is sized and no number is given


def kv_bytes_per_token(config: BackdropConfig, dtype: str = "auto") -> int:
    """Bytes of one token's keys and values: 2 x layers x key-value heads x head width x bytes of a number.

    Args:
        config: the served model's; its prefusion layers count as layers.
        dtype: "float32", "float16" or "bfloat16"; "auto" is the configuration's own, float32 where it has none.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    layers = text.num_hidden_layers + config.num_prefusion_layers
    return 2 * layers * heads * width * DTYPE_BYTES[dtype]


def kv_cache_bytes(
    config: BackdropConfig,
    backgrounds: int,
    sequences: int,
    max_model_len: int,
    block_size: int,
    dtype: str = "auto",
) -> int:
    """Bytes of a KV cache that keeps a number of backgrounds beside the requests in progress.

    A background counts as if it owned every patch, with its separators and a system prompt of `TEXT_TOKENS` tokens,
    rounded up to whole blocks; a request counts as the longest there can be.

    Args:
        backgrounds: how many are kept.
        sequences: requests in one batch.
        max_model_len: tokens of the longest prompt and answer.
        block_size: tokens of a block.
        dtype: see `kv_bytes_per_token`.
    """
    tokens = config.num_patches + config.extra_tokens_per_group + 2 + TEXT_TOKENS
    blocks = backgrounds * -(-tokens // block_size) + sequences * -(-max_model_len // block_size) + 1
    return blocks * block_size * kv_bytes_per_token(config, dtype)


def batched_tokens(config: BackdropConfig, backgrounds: int, sequences: int, max_model_len: int) -> int:
    """Tokens of a batch with which vLLM's encoder cache keeps a number of backgrounds, within `BATCHED_TOKENS`.

    The last tokens of a background lie in a block that is not full. Such a block is never cached, so every request
    asks for these tokens again, and the whole group is encoded anew unless the encoder cache has it. That cache is as
    large as a batch. The result is never less than `max_model_len`.

    Args:
        backgrounds, sequences, max_model_len: see `kv_cache_bytes`.
    """
    wanted = backgrounds * (config.num_patches + config.extra_tokens_per_group) + sequences * max_model_len
    return max(min(max(wanted, BATCHED_TOKENS[0]), BATCHED_TOKENS[1]), max_model_len)


@dataclass(frozen=True)
class CacheSize:
    """The caches of one engine, sized for a number of backgrounds.

    Attributes:
        backgrounds: how many it keeps.
        sequences: requests in one batch beside them.
        kv_cache_bytes: of keys and values.
        batched_tokens: of a batch, and of the encoder cache.
    """

    backgrounds: int
    sequences: int
    kv_cache_bytes: int
    batched_tokens: int

    def __str__(self) -> str:
        return (
            f"cache: {self.kv_cache_bytes / 2**30:.2f} GiB for {self.backgrounds} backgrounds and {self.sequences} "
            f"requests; {self.batched_tokens:,} tokens a batch, and as many in the encoder cache"
        )


def size_cache(
    config: BackdropConfig,
    backgrounds: int,
    sequences: int,
    max_model_len: int,
    block_size: int = BLOCK_SIZE,
    dtype: str = "auto",
) -> CacheSize:
    """`kv_cache_bytes` and `batched_tokens` of the same arguments."""
    return CacheSize(
        backgrounds,
        sequences,
        kv_cache_bytes(config, backgrounds, sequences, max_model_len, block_size, dtype),
        batched_tokens(config, backgrounds, sequences, max_model_len),
    )


def plan_engines(
    model: str,
    ports: list[int],
    *,
    python: str | None = None,
    name: str = "backdrop",
    dtype: str = "auto",
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    backgrounds: int | None = None,
    block_size: int | None = None,
    max_images: int = 256,
    fit: str | None = None,
    extra: tuple[str, ...] = (),
) -> tuple[list[EngineSettings], CacheSize | None]:
    """Settings of one engine for each port, and the size of their caches where backgrounds are given.

    Args:
        model: exported folder or Hub id.
        ports: where the engines listen.
        python: see `find_engine_python`.
        name, dtype, max_model_len, max_num_seqs, fit, extra: see `EngineSettings`.
        backgrounds: each engine's caches are sized for so many; None: vLLM's own sizes.
        block_size: tokens of a KV-cache block; None: `BLOCK_SIZE`.
        max_images: ordinary images in one request; each becomes up to two patch groups.

    Raises:
        ValueError: the model has prefusion layers, the sizes cannot be computed, or there is no vLLM.
    """
    config = BackdropConfig.from_pretrained(model)
    if config.num_prefusion_layers:
        raise ValueError(
            f"{model} has {config.num_prefusion_layers} prefusion layers, which vLLM would leave out; wanted a folder "
            "written by backdrop export --fold-prefusion."
        )
    block_size = block_size or BLOCK_SIZE
    size = kv_bytes = batch = None
    if backgrounds is not None:
        if max_model_len is None:
            raise ValueError("--backgrounds needs --max-model-len: requests in progress take room too.")
        max_num_seqs = max_num_seqs or MAX_SEQUENCES  # the engine is told what its cache is sized for
        size = size_cache(config, backgrounds, max_num_seqs, max_model_len, block_size, dtype)
        kv_bytes, batch = size.kv_cache_bytes, size.batched_tokens
    python = find_engine_python(python)
    engines = [
        EngineSettings(
            model=model,
            python=python,
            name=name,
            port=port,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=batch,
            kv_cache_bytes=kv_bytes,
            block_size=block_size,
            images=2 * max_images,
            fit=fit,
            extra=extra,
        )
        for port in ports
    ]
    return engines, size
