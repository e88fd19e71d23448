"""A digest of a model's weights that every process shares: what a value stored in a folder depends on in them."""

import hashlib
import uuid
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from .cache_keys_backdrop import DIGEST_BYTES, joined_key
from .weights_fingerprint_backdrop import adapter_state, walk


def weights_digest(*modules: nn.Module) -> bytes:
    """Digest of every byte of the weights, and of adapters' states: equal in every process.

    Takes seconds for a large model.
    """
    tensors, states = [], []
    for module in walk(modules):
        own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        tensors += own
        if "_active_adapter" in module.__dict__:
            states.append(adapter_state(module))
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks = [hook for hook in hooks if not _origin(hook).startswith(("transformers.", "accelerate."))]
        if hooks or any(tensor.is_meta for tensor in own):
            # What a foreign hook does and what offloaded weights hold cannot be known here, so this digest is made
            # unique: no other process shares the values.
            states.append(uuid.uuid4().hex)

    def one(tensor: torch.Tensor) -> bytes:
        digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=DIGEST_BYTES)
        if not tensor.is_meta and tensor.numel():
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            digest.update(data.numpy())
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter's lock
        return joined_key(*pool.map(one, tensors), *(state.encode() for state in states))


def _origin(hook) -> str:
    """The module that defines a hook."""
    return getattr(hook, "__module__", None) or ""
