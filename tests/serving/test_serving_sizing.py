"""The size of an engine's caches in bytes and tokens."""

import tiny
from paths import EXAMPLE

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.serving.sizing import TEXT_TOKENS, batched_tokens, kv_bytes_per_token, kv_cache_bytes


def test_bytes_of_a_token_of_the_committed_model():
    config = BackdropConfig.from_pretrained(EXAMPLE)
    # Keys and values, 4 layers, 6 heads of 32 numbers of 4 or 2 bytes.
    assert kv_bytes_per_token(config, "float32") == 2 * 4 * 6 * 32 * 4 == 6144
    assert kv_bytes_per_token(config, "bfloat16") == kv_bytes_per_token(config, "float16") == 3072
    assert kv_bytes_per_token(config) == 6144  # the folder's own dtype, float32
    config.dtype = "torch.bfloat16"
    assert kv_bytes_per_token(config) == 3072


def test_bytes_of_a_token_with_grouped_heads_and_prefusion():
    # 2 layers and 1 of prefusion, 2 of 4 heads, 32 / 4 numbers.
    config = tiny.backdrop_config(num_prefusion_layers=1)
    assert kv_bytes_per_token(config, "float32") == 2 * 3 * 2 * 8 * 4
    config = tiny.backdrop_config(text_config=tiny.text_config(head_dim=16))
    assert kv_bytes_per_token(config, "float32") == 2 * 2 * 2 * 16 * 4


def test_bytes_of_a_cache_of_the_committed_model():
    config = BackdropConfig.from_pretrained(EXAMPLE)
    # 144 patches, 2 separators, a system prompt: 7 blocks of 32 for each of 10 backgrounds; 512 / 32 for each of 4
    # requests; and one that vLLM keeps for itself.
    assert TEXT_TOKENS == 64 and -(-(144 + 2 + 64) // 32) == 7
    wanted = (10 * 7 + 4 * 16 + 1) * 32 * 6144
    assert kv_cache_bytes(config, 10, 4, 512, 32, "float32") == wanted
    assert kv_cache_bytes(config, 10, 4, 512, 32, "float16") == wanted // 2
    # Rounded up: 210 tokens are 14 blocks of 16, 500 are 32.
    assert kv_cache_bytes(config, 1, 1, 500, 16, "float32") == (14 + 32 + 1) * 16 * 6144


def test_tokens_of_a_batch_keep_the_backgrounds_of_the_committed_model():
    config = BackdropConfig.from_pretrained(EXAMPLE)
    assert batched_tokens(config, 20, 4, 512) == 20 * 144 + 4 * 512
    assert batched_tokens(config, 1, 1, 512) == 2048  # vLLM's own smallest default
    assert batched_tokens(config, 1000, 4, 512) == 16_384  # the largest batch that is asked for
    assert batched_tokens(config, 1000, 4, 32_768) == 32_768
