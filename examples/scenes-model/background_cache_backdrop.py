"""A memo of what was computed for backgrounds, addressed by content and bounded in bytes.

Two kinds of values: the vision tokens of a background group (after the projector), and the language model's keys and
values up to and including a background. A key is a digest of everything the value depends on, so a hit never changes
an answer; anything that changes a weight, an adapter, the dtype or the attention changes the key.

A stored tensor is never written: readers that would write get a copy.
"""

import contextlib
import contextvars
import hashlib
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import nn

DIGEST_BYTES = 20  # 160 bits: accidental collisions are out of reach
SAMPLES_PER_PARAMETER = 16


class BackgroundCache:
    """Least-recently-used store of tensor tuples under a byte budget. Thread-safe.

    Args:
        max_bytes: upper bound of the stored tensors' bytes; a value that is larger alone is not stored.
    """

    def __init__(self, max_bytes: int):
        if max_bytes <= 0:
            raise ValueError(f"max_bytes is {max_bytes}; wanted a positive number of bytes.")
        self.max_bytes = int(max_bytes)
        self._entries: OrderedDict[tuple[str, bytes], tuple[torch.Tensor, ...]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.RLock()
        self._counts: dict[str, int] = {}
        # Per context, not per object: threads that serve different tenants do not see each other's scope.
        self._scope = contextvars.ContextVar("background_cache_scope", default=("", False))

    # A lock and a context variable cannot be copied; a copied model starts with an empty cache of its own.
    def __deepcopy__(self, memo) -> "BackgroundCache":
        return BackgroundCache(self.max_bytes)

    def __reduce__(self):
        return BackgroundCache, (self.max_bytes,)

    @property
    def namespace(self) -> str:
        """Namespace of the current scope; values never cross namespaces."""
        return self._scope.get()[0]

    @property
    def bypassed(self) -> bool:
        """True inside `scope(bypass=True)`."""
        return self._scope.get()[1]

    @contextlib.contextmanager
    def scope(self, namespace: str | None = None, bypass: bool | None = None):
        """Namespace and bypass for the calls made inside a `with` block (of this thread or task only)."""
        current = self._scope.get()
        token = self._scope.set(
            (current[0] if namespace is None else namespace, current[1] if bypass is None else bypass)
        )
        try:
            yield self
        finally:
            self._scope.reset(token)

    def get(self, kind: str, key: bytes) -> tuple[torch.Tensor, ...] | None:
        """The stored tensors, not to be written to, or None. `kind` is "tokens" or "prefix"."""
        with self._lock:
            value = self._entries.get((kind, key))
            if value is not None:
                self._entries.move_to_end((kind, key))
            self._count(f"{kind}_{'hits' if value is not None else 'misses'}")
            return value

    def put(self, kind: str, key: bytes, value: Iterable[torch.Tensor]) -> None:
        """Stores detached tensors that own just their bytes; evicts the least recently used beyond the budget."""
        value = tuple(_compact(tensor) for tensor in value)
        size = _num_bytes(value)
        with self._lock:
            previous = self._entries.pop((kind, key), None)
            if previous is not None:
                self._bytes -= _num_bytes(previous)
            if size > self.max_bytes:
                self._count("too_large")
                return
            while self._bytes + size > self.max_bytes:
                _, evicted = self._entries.popitem(last=False)
                self._bytes -= _num_bytes(evicted)
                self._count("evictions")
            self._entries[(kind, key)] = value
            self._bytes += size

    def clear(self) -> None:
        """Forgets every value; the counters stay."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def record_tokens(self, reused: int, computed: int) -> None:
        """Counts vision tokens that came from the memo and that were computed."""
        with self._lock:
            self._count("vision_tokens_reused", reused)
            self._count("vision_tokens_computed", computed)

    def stats(self) -> dict[str, int]:
        """Counters since the cache was made: entries and bytes now, hits and misses by kind, evictions, tokens."""
        names = ("tokens_hits", "tokens_misses", "prefix_hits", "prefix_misses", "evictions", "too_large")
        names += ("vision_tokens_reused", "vision_tokens_computed")
        with self._lock:
            counts = {name: self._counts.get(name, 0) for name in names}
            return {
                "entries": len(self._entries),
                "bytes": self._bytes,
                "max_bytes": self.max_bytes,
                **counts,
            }

    def _count(self, name: str, amount: int = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"BackgroundCache({stats['entries']} entries, {stats['bytes'] / 2**20:.1f} of "
            f"{stats['max_bytes'] / 2**20:.1f} MiB, {stats['tokens_hits']} token hits, {stats['prefix_hits']} prefix hits)"
        )


def content_key(pixel_values: torch.Tensor, patch_mask: torch.Tensor, context: bytes) -> bytes:
    """Digest of one group as the model sees it.

    Args:
        pixel_values: `[3, S, S]`, any float dtype.
        patch_mask: `[P]` bool.
        context: what else the value depends on (kind, weights, dtype, attention, namespace).
    """
    digest = hashlib.blake2b(context, digest_size=DIGEST_BYTES)
    for tensor in (pixel_values, patch_mask):
        tensor = tensor.detach().contiguous().cpu()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.digest()


def joined_key(*parts: bytes) -> bytes:
    """Digest of parts whose borders count: `joined_key(b"ab", b"c") != joined_key(b"a", b"bc")`."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(struct.pack("<q", len(part)))
        digest.update(part)
    return digest.digest()


def weights_fingerprint(*modules: nn.Module) -> bytes:
    """Digest that changes when a parameter, a buffer or the state of an adapter changes.

    Per tensor: address, version counter, shape, dtype, device and `SAMPLES_PER_PARAMETER` evenly spaced values. The
    values are there because peft merges adapters through `.data`, which moves neither address nor counter. An edit
    through `.data` that misses every sampled element stays unseen: call `clear()` after one.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for module in modules:
        for name, tensor in _named_tensors(module):
            version = 0 if tensor.is_inference() else tensor._version
            address = tensor.data_ptr() if tensor.device.type != "meta" else 0
            digest.update(
                f"{name}|{address}|{version}|{tuple(tensor.shape)}|{tensor.dtype}|{tensor.device}".encode()
            )
            if tensor.device.type != "meta" and tensor.numel():
                flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
                step = max(1, flat.numel() // SAMPLES_PER_PARAMETER)
                samples.setdefault(tensor.device, []).append(
                    flat[::step][:SAMPLES_PER_PARAMETER].to(torch.float32)
                )
        for name, child in module.named_modules():
            state = _adapter_state(child)
            if state:
                digest.update(f"{name}|{state}".encode())
    for device in sorted(samples, key=str):
        digest.update(torch.cat(samples[device]).cpu().numpy().tobytes())
    return digest.digest()


def _named_tensors(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _adapter_state(module: nn.Module) -> str:
    """State of a peft tuner layer that its tensors do not show: which adapters act, and how strongly."""
    attributes = vars(module)
    if "_active_adapter" not in attributes:
        return ""
    names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    return "|".join(f"{name}={attributes.get(name)}" for name in names)


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A detached tensor whose storage holds nothing else, so that the budget counts what is kept."""
    tensor = tensor.detach()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
