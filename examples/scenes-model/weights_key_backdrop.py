"""What a stored value depends on in a model's weights: a cheap fingerprint, and a digest that every process shares."""

import array
import hashlib
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from .cache_keys_backdrop import DIGEST_BYTES, joined_key

SAMPLES_PER_TENSOR = 16


def weights_fingerprint(*modules: nn.Module) -> bytes:
    """Digest that changes when a parameter, a buffer, an adapter's state or a hook changes; valid in this process only.

    Per tensor: address, version counter, shape, dtype, device and `SAMPLES_PER_TENSOR` evenly spaced values. The
    values are there because peft merges adapters through `.data`, which changes neither address nor counter. An edit
    through `.data` that misses every sampled element, and an edit of weights that accelerate keeps offloaded, are not
    seen: call `BackgroundCache.clear` after one.
    """
    facts: list[int] = []
    states: list[str] = []
    shapes: list[torch.Size] = []
    samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    with torch.no_grad():
        for module in _walk(modules):
            if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                facts += [
                    *module._forward_hooks,
                    *module._forward_pre_hooks,
                    id(module.__dict__.get("forward")),
                ]
            if "_active_adapter" in module.__dict__:
                states.append(_adapter_state(module))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None:
                    continue
                size, dtype, device = tensor.numel(), tensor.dtype, tensor.device
                if device.type == "meta":
                    facts += (id(tensor), size)
                    continue
                version = -1 if tensor.is_inference() else tensor._version
                facts += (tensor.data_ptr(), version, size)
                alike = (device, dtype)
                group = samples.get(alike)
                if group is None:
                    group = samples[alike] = []
                shapes.append(tensor.shape)
                if size:
                    group.append(_sample(tensor, size))
    facts.append(hash(tuple(shapes)))
    digest = hashlib.blake2b(array.array("q", facts).tobytes(), digest_size=DIGEST_BYTES)
    digest.update("|".join(states).encode())
    for alike in sorted(samples, key=str):
        digest.update(str(alike).encode())
        if samples[alike]:
            digest.update(torch.cat(samples[alike]).view(torch.uint8).cpu().numpy())
    return digest.digest()


def weights_digest(*modules: nn.Module) -> bytes:
    """Digest of every byte of the weights, and of adapters' states: equal in every process.

    Takes seconds for a large model.
    """
    tensors, states = [], []
    for module in _walk(modules):
        own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        tensors += own
        if "_active_adapter" in module.__dict__:
            states.append(_adapter_state(module))
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


def _walk(modules: Sequence[nn.Module]) -> Iterable[nn.Module]:
    """Every module once, in a fixed order. Faster than `nn.Module.modules`, which builds names too."""
    stack, seen = list(reversed(modules)), set()
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend(child for child in reversed(module._modules.values()) if child is not None)


def _origin(hook) -> str:
    """The module that defines a hook."""
    return getattr(hook, "__module__", None) or ""


def _sample(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Up to `SAMPLES_PER_TENSOR` evenly spaced values of a tensor of `size` elements."""
    count = SAMPLES_PER_TENSOR if size > SAMPLES_PER_TENSOR else size
    if tensor.is_contiguous():
        return tensor.as_strided((count,), (size // count,))
    return tensor.flatten()[:: size // count][:count]


def _adapter_state(module: nn.Module) -> str:
    """State of a peft tuner layer that its tensors do not show: which adapters act, and how strongly."""
    attributes = vars(module)
    names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    return "|".join(f"{name}={attributes.get(name)}" for name in names)
