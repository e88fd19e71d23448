"""A digest of a model's weights that every process shares: what a value stored in a folder depends on in them."""

import hashlib
import uuid
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from .cache_keys_backdrop import DIGEST_BYTES, joined_key
from .module_state_backdrop import ModuleStates


def weights_digest(*modules: nn.Module) -> bytes:
    """Digest of every byte of the weights, of other attributes, of the code of forwards, and of adapters' states.

    Equal in every process. Takes seconds for a large model.
    """
    states = ModuleStates(modules)
    parts = [states.text.encode()]
    if states.unseen or any(tensor.is_meta for tensor in states.tensors):
        # What a foreign hook does and what offloaded weights hold cannot be known here, so this digest is made unique: no
        # other process shares the values.
        parts.append(uuid.uuid4().bytes)

    def one(tensor: torch.Tensor) -> bytes:
        digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=DIGEST_BYTES)
        if not tensor.is_meta and tensor.numel():
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            digest.update(data.numpy())
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # hashlib releases the interpreter's lock
        return joined_key(*pool.map(one, states.tensors), *parts)
