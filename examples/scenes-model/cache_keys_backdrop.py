"""Keys of the background cache: digests of everything that a stored value depends on.

Vision tokens of a background depend on its pixels and mask, on tower and projector, and on how they run. The language
model's keys and values up to a background's end depend, beyond that, on every token id and position before the end and
on every background before it. All of it is in the key, so a hit never changes an answer. The model makes its keys
itself and takes no caller's.
"""

import hashlib
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .adapter_rows_backdrop import prefix_modules
from .configuration_backdrop import BACKGROUND, VisionFeatures
from .host_copies_backdrop import host_copies
from .module_state_backdrop import code_digest
from .weights_fingerprint_backdrop import DIGEST_BYTES

# torch's switches between kernels of its attention, which differ in the last bits.
ATTENTION_KERNELS = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)


def content_key(pixel_values: torch.Tensor, patch_mask: torch.Tensor, context: bytes) -> bytes:
    """Key of one group's vision tokens: a digest of the group as the model sees it.

    Args:
        pixel_values: `[3, S, S]`, any float dtype.
        patch_mask: `[P]` bool.
        context: what else the value depends on: `in_namespace` of `tokens_run_key`.
    """
    # SHA-256 has instructions of its own on today's CPUs, where it takes half of BLAKE2b's time for a megabyte of pixels.
    digest = hashlib.sha256(context)
    for tensor in (pixel_values, patch_mask):
        tensor = tensor.detach().contiguous().cpu()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.digest()[:DIGEST_BYTES]


def content_keys(
    pixel_values: torch.Tensor, patch_mask: torch.Tensor, groups: list[int], context: bytes
) -> dict[int, bytes]:
    """`content_key` of some groups of `pixel_values [G, 3, S, S]`, `patch_mask [G, P]`, several at a time."""
    copies = host_copies([tensor[g] for tensor in (pixel_values, patch_mask) for g in groups])
    pixels, masks = copies[: len(groups)], copies[len(groups) :]

    def one(pixels: torch.Tensor, mask: torch.Tensor) -> bytes:
        return content_key(pixels, mask, context)

    if len(groups) < 2:
        return dict(zip(groups, map(one, pixels, masks), strict=True))
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib releases the interpreter's lock
        return dict(zip(groups, pool.map(one, pixels, masks), strict=True))


def prefix_key(
    input_ids: torch.Tensor, position_ids: torch.Tensor, content: Sequence[bytes], context: bytes
) -> bytes:
    """Key of the language model's keys and values up to a background's end.

    Args:
        input_ids, position_ids: `[n]`, everything from the row's first token to that end.
        content: `content_key` of each background before that end, in order.
        context: what else the value depends on: `in_namespace` of `prefix_run_key`.
    """
    return joined_key(
        context, input_ids.cpu().numpy().tobytes(), position_ids.cpu().numpy().tobytes(), *content
    )


def tokens_run_key(model, vision_features: VisionFeatures) -> bytes | None:
    """How a `BackdropModel` makes vision tokens of backgrounds: weights, settings, and which of the tower's states.

    None: that cannot be told.
    """
    key = _run_key(model, model.vision_modules(BACKGROUND))
    settings = (vision_features.layers, vision_features.strategy)
    return None if key is None else joined_key(repr(settings).encode(), key)


def prefix_run_key(model) -> bytes | None:
    """How a `BackdropModel` makes keys and values of its language model: weights and settings; None: that cannot be told."""
    return _run_key(model, prefix_modules(model))


def in_namespace(model, run_key: bytes, adapter: str | None = None) -> bytes:
    """A run key in the present namespace of the model's background cache: what is stored under it crosses neither.

    Args:
        adapter: the one that this call names for a row (`adapter_rows_backdrop`), None: it names none.
    """
    key = joined_key(model.background_cache.namespace.encode(), run_key)
    return key if adapter is None else joined_key(key, adapter.encode())


def joined_key(*parts: bytes) -> bytes:
    """Digest of parts whose borders count: `joined_key(b"ab", b"c") != joined_key(b"a", b"bc")`."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(struct.pack("<q", len(part)))
        digest.update(part)
    return digest.digest()


def _run_key(model, modules: Sequence[nn.Module]) -> bytes | None:
    """Digest of how the model runs (dtype, attention, switches) and of the modules' weights; None: it cannot be told."""
    config, cache = model.config, model.background_cache
    weights = cache.weights_key(*modules)
    if weights is None:
        return None
    autocast = [
        f"{device_type}={torch.get_autocast_dtype(device_type)}"
        for device_type in ("cpu", "cuda")
        if torch.is_autocast_enabled(device_type)
    ]
    settings = (
        *_attention(config.vision_config),
        *_attention(config.text_config),
        config.prefusion_rotary,
        config.masked_attention,
        str(model.dtype),
        autocast,
        torch.get_float32_matmul_precision(),
        *(enabled() for enabled in ATTENTION_KERNELS),
    )
    if cache.folder is not None:
        # Another process may run another version, or another configuration of the same weights.
        settings += (
            torch.__version__,
            transformers.__version__,
            model.device.type,
            config.to_json_string(),
        )
    return joined_key(repr(settings).encode(), weights)


def _attention(config) -> tuple[str | None, str | None]:
    """The name of a model's attention, and what it runs where it is a function that somebody registered."""
    name = config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    foreign = function is not None and not function.__module__.startswith("transformers.")
    return name, code_digest(function) if foreign else None
