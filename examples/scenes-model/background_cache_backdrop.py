"""A memo of what was computed for backgrounds, addressed by content and bounded in bytes.

Two kinds of values: the vision tokens of a background group (after the projector), and the language model's keys and
values up to and including a background. A key is a digest of everything the value depends on, so a hit never changes
an answer; anything that changes a weight, an adapter, the dtype or the attention changes the key.

A stored tensor is never written: readers that would write get a copy.
"""

import array
import contextlib
import contextvars
import hashlib
import struct
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

from .background_folder_backdrop import BackgroundFolder

logger = logging.get_logger(__name__)

DIGEST_BYTES = 20  # 160 bits: accidental collisions are out of reach
SAMPLES_PER_TENSOR = 16


@dataclass
class _Entry:
    tensors: tuple[torch.Tensor, ...]
    num_bytes: int
    seconds: float  # what computing it cost
    pins: int = 0


class _Tier:
    """Entries under a byte budget, the least recently used first."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.entries: OrderedDict[tuple[str, bytes], _Entry] = OrderedDict()
        self.num_bytes = 0

    def pop(self, key: tuple[str, bytes]) -> _Entry | None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry.num_bytes
        return entry

    def insert(self, key: tuple[str, bytes], entry: _Entry) -> list[tuple[tuple[str, bytes], _Entry]] | None:
        """Adds an entry that is not there; what had to go for it, or None if there is no room beside pinned ones."""
        pinned = sum(kept.num_bytes for kept in self.entries.values() if kept.pins)
        if pinned + entry.num_bytes > self.max_bytes:
            return None
        gone = []
        for old in list(self.entries):
            if self.num_bytes + entry.num_bytes <= self.max_bytes:
                break
            if not self.entries[old].pins:
                gone.append((old, self.pop(old)))
        self.entries[key] = entry
        self.num_bytes += entry.num_bytes
        return gone


class Lease:
    """Entries in use: they are not evicted until `release`, so that the budget counts memory that is really held."""

    def __init__(self, lock: threading.RLock):
        self._lock = lock
        self._entries: list[_Entry] = []

    def pin(self, entry: _Entry) -> None:
        """Called under the cache's lock."""
        entry.pins += 1
        self._entries.append(entry)

    def release(self) -> None:
        """Gives the entries up; again is nothing."""
        with self._lock:
            while self._entries:
                self._entries.pop().pins -= 1


class BackgroundCache:
    """Least-recently-used store of tensor tuples in up to three tiers, each under a byte budget. Thread-safe.

    Tiers: where the values were computed; the host's memory, for what is evicted there; a folder, for what is to
    outlive the process. A value found in a lower tier moves up. A lower tier is left out where fetching a value takes
    longer than computing it did.

    Args:
        max_bytes: bound of the first tier; a value that is larger alone is not stored.
        prefixes: keep the language model's keys and values too, not vision tokens alone.
        host_max_bytes: bound of the second tier, 0: none.
        folder: of the third tier (a `BackgroundFolder`), None: none.
    """

    def __init__(
        self,
        max_bytes: int,
        prefixes: bool = True,
        host_max_bytes: int = 0,
        folder: BackgroundFolder | None = None,
    ):
        for name, value, least in (("max_bytes", max_bytes, 1), ("host_max_bytes", host_max_bytes, 0)):
            if value < least:
                raise ValueError(f"{name} is {value}; wanted {least} or more bytes.")
        self.max_bytes = int(max_bytes)
        self.prefixes = prefixes
        self.folder = folder
        self._device = _Tier(int(max_bytes))
        self._host = _Tier(int(host_max_bytes))
        self._lock = threading.RLock()
        self._counts: dict[str, float] = {}
        self._digests: OrderedDict[bytes, bytes] = OrderedDict()
        self._seconds_per_byte: dict[str, float] = {}  # of computing, by kind, from this process's misses
        self._transfer_seconds_per_byte: dict[torch.device, float] = {}
        # Per context, not per object: threads that serve different tenants do not see each other's scope.
        self._scope = contextvars.ContextVar("background_cache_scope", default=("", False))

    # A lock and a context variable cannot be copied; a copied model starts with an empty cache of its own.
    def __deepcopy__(self, memo) -> "BackgroundCache":
        return self.__reduce__()[0](*self.__reduce__()[1])

    def __reduce__(self):
        return BackgroundCache, (self.max_bytes, self.prefixes, self._host.max_bytes, self.folder)

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

    def lease(self) -> Lease:
        """What `get` and `put` pin with it stays until it is released."""
        return Lease(self._lock)

    def get(
        self,
        kind: str,
        key: bytes,
        devices: Sequence[torch.device] | None = None,
        lease: Lease | None = None,
    ) -> tuple[torch.Tensor, ...] | None:
        """The stored tensors, not to be written to, or None.

        Args:
            kind: "tokens" or "prefix".
            key: digest of everything that the value depends on.
            devices: where tensors that come from a lower tier go, one each, repeated if fewer; None: the CPU.
            lease: pins the entry.
        """
        with self._lock:
            entry = self._device.entries.get((kind, key))
            if entry is not None:
                self._device.entries.move_to_end((kind, key))
                self._count_hit(kind, "device", entry.seconds)
                if lease is not None:
                    lease.pin(entry)
                return entry.tensors
        entry = self._fetch(kind, key, devices or [torch.device("cpu")], lease)
        if entry is None:
            logger.debug("background %s not known", kind)
            with self._lock:
                self._count(f"{kind}_misses")
            return None
        return entry.tensors

    def put(
        self,
        kind: str,
        key: bytes,
        value: Iterable[torch.Tensor],
        seconds: float = 0.0,
        lease: Lease | None = None,
    ) -> None:
        """Stores detached tensors that own just their bytes; evicts the least recently used beyond the budget.

        Args:
            seconds: what computing the value took; 0: unknown, it is kept in every tier.
        """
        try:
            tensors = tuple(_compact(tensor) for tensor in value)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            # The answer needs the memory more than the cache does.
            logger.warning_once(f"A background was not stored: {error}")
            with self._lock:
                self._count("out_of_memory")
                for old in [old for old, entry in self._device.entries.items() if not entry.pins]:
                    self._device.pop(old)
            return
        entry = _Entry(tensors, _num_bytes(tensors), seconds)
        if seconds and entry.num_bytes:
            with self._lock:
                self._seconds_per_byte[kind] = seconds / entry.num_bytes
        self._insert(kind, key, entry, lease)
        if self.folder is not None:
            loading = self.folder.seconds_to_load(entry.num_bytes)
            if seconds and loading > seconds:
                with self._lock:
                    self._count("skipped_slow")
            else:
                self.folder.put_soon(kind, key, tensors, seconds)

    def clear(self) -> None:
        """Forgets every value on every tier, and what was known of the weights; the counters stay."""
        with self._lock:
            self._device = _Tier(self._device.max_bytes)
            self._host = _Tier(self._host.max_bytes)
            self._digests.clear()
        if self.folder is not None:
            self.folder.clear()

    def weights_key(self, *modules: nn.Module) -> bytes:
        """What a stored value depends on in these modules.

        The fingerprint, cheap and of this process. With a folder, which other processes read: a digest of all
        weights, computed once for each fingerprint.
        """
        fingerprint = weights_fingerprint(*modules)
        if self.folder is None:
            return fingerprint
        with self._lock:
            digest = self._digests.get(fingerprint)
        if digest is None:
            digest = weights_digest(*modules)
            with self._lock:
                self._digests[fingerprint] = digest
                while len(self._digests) > 32:
                    self._digests.popitem(last=False)
        return digest

    def record_tokens(self, reused: int, computed: int) -> None:
        """Counts vision tokens that came from the memo and that were computed."""
        with self._lock:
            self._count("vision_tokens_reused", reused)
            self._count("vision_tokens_computed", computed)

    def stats(self) -> dict:
        """Counters since the cache was made.

        `entries` and `bytes` of all tiers in memory, `tiers` each tier's own; hits and misses by kind and tier,
        evictions (from memory altogether), vision tokens reused and computed, `seconds_saved`: what computing the
        hits cost when they were stored, less the time to fetch them from lower tiers.
        """
        names = ("tokens_hits", "tokens_misses", "prefix_hits", "prefix_misses", "evictions", "too_large")
        names += ("out_of_memory", "skipped_slow", "device_hits", "host_hits", "disk_hits")
        names += ("vision_tokens_reused", "vision_tokens_computed")
        with self._lock:
            counts = {name: int(self._counts.get(name, 0)) for name in names}
            memory = {"device": self._device, "host": self._host}
            tiers: dict = {
                name: {"entries": len(tier.entries), "bytes": tier.num_bytes, "max_bytes": tier.max_bytes}
                for name, tier in memory.items()
            }
            saved = self._counts.get("seconds_saved", 0.0)
        if self.folder is not None:
            tiers["disk"] = self.folder.stats()
        return {
            "entries": tiers["device"]["entries"] + tiers["host"]["entries"],
            "bytes": tiers["device"]["bytes"] + tiers["host"]["bytes"],
            "max_bytes": self.max_bytes,
            "tiers": tiers,
            **counts,
            "seconds_saved": saved,
        }

    def __repr__(self) -> str:
        stats = self.stats()
        tiers = ", ".join(
            f"{name} {tier['entries']} entries {tier['bytes'] / 2**20:.1f} of {tier['max_bytes'] / 2**20:.1f} MiB"
            for name, tier in stats["tiers"].items()
            if tier["max_bytes"]
        )
        return (
            f"BackgroundCache({tiers}; {stats['tokens_hits']} token hits, {stats['prefix_hits']} prefix hits, "
            f"{stats['evictions']} evictions, {stats['seconds_saved']:.1f} s saved)"
        )

    def _fetch(self, kind, key, devices, lease) -> _Entry | None:
        """From the host or the folder, into the first tier."""
        with self._lock:
            entry = self._host.entries.get((kind, key))
            if entry is not None and self._is_slower(
                self._transfer_seconds(devices[0], entry.num_bytes), entry
            ):
                self._count("skipped_slow")
                return None
            entry, tier = self._host.pop((kind, key)), "host"
        started = time.perf_counter()
        if entry is None and self.folder is not None:
            tier = "disk"
            size, rate = self.folder.size_of(kind, key), self._seconds_per_byte.get(kind)
            if size is not None and rate and self.folder.seconds_to_load(size) > rate * size:
                with self._lock:
                    self._count("skipped_slow")
                return None
            stored = self.folder.get(kind, key) if size is not None else None
            if stored is not None:
                entry = _Entry(stored.tensors, _num_bytes(stored.tensors), stored.compute_seconds)
        if entry is None:
            return None
        try:
            tensors = tuple(tensor.to(devices[i % len(devices)]) for i, tensor in enumerate(entry.tensors))
        except (RuntimeError, MemoryError) as error:
            logger.warning_once(f"A stored background could not be loaded: {error}")
            with self._lock:
                self._count("out_of_memory")
            return None
        entry = _Entry(tensors, entry.num_bytes, entry.seconds)
        self._insert(kind, key, entry, lease)
        with self._lock:
            self._count_hit(kind, tier, entry.seconds - (time.perf_counter() - started))
        return entry

    def _insert(self, kind: str, key: bytes, entry: _Entry, lease: Lease | None) -> None:
        with self._lock:
            previous = self._device.entries.get((kind, key))
            if previous is not None and previous.pins:
                return  # another thread stored the same value, and it is in use
            self._device.pop((kind, key))
            self._host.pop((kind, key))
            gone = self._device.insert((kind, key), entry)
            if gone is None:
                self._count("too_large")
            elif lease is not None:
                lease.pin(entry)
        if gone is not None:
            self._demote(gone)
        elif self._host.max_bytes:
            self._demote([((kind, key), entry)])

    def _demote(self, gone: list[tuple[tuple[str, bytes], _Entry]]) -> None:
        for key, entry in gone:
            dropped = [(key, entry)]
            device = next((tensor.device for tensor in entry.tensors), torch.device("cpu"))
            transfer = self._transfer_seconds(device, entry.num_bytes) if self._host.max_bytes else 0.0
            if self._host.max_bytes and not self._is_slower(transfer, entry):
                try:
                    moved = _Entry(
                        tuple(tensor.to("cpu") for tensor in entry.tensors), entry.num_bytes, entry.seconds
                    )
                    with self._lock:
                        if key not in self._device.entries:  # stored again meanwhile
                            self._host.pop(key)
                            dropped = self._host.insert(key, moved)
                            dropped = [(key, entry)] if dropped is None else dropped
                except (RuntimeError, MemoryError):
                    pass  # no host memory to be had
            with self._lock:
                self._count("evictions", len(dropped))

    @staticmethod
    def _is_slower(fetching: float, entry: _Entry) -> bool:
        return 0 < entry.seconds < fetching

    def _transfer_seconds(self, device: torch.device, num_bytes: int) -> float:
        """Estimate of a copy from the host's memory to a device, measured once for each device."""
        if device.type == "cpu":
            return 0.0
        if device not in self._transfer_seconds_per_byte:
            self._transfer_seconds_per_byte[device] = _measure_transfer(device)
        return self._transfer_seconds_per_byte[device] * num_bytes

    def _count_hit(self, kind: str, tier: str, seconds: float) -> None:
        logger.debug("background %s found in tier %s, %.3f s saved", kind, tier, seconds)
        self._count(f"{kind}_hits")
        self._count(f"{tier}_hits")
        self._count("seconds_saved", max(0.0, seconds))

    def _count(self, name: str, amount: float = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount


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


def content_keys(
    pixel_values: torch.Tensor, patch_mask: torch.Tensor, groups: list[int], context: bytes
) -> dict[int, bytes]:
    """`content_key` of some groups of `pixel_values [G, 3, S, S]`, `patch_mask [G, P]`, several at a time."""
    pixels, masks = pixel_values.detach().cpu(), patch_mask.detach().cpu()

    def one(g: int) -> bytes:
        return content_key(pixels[g], masks[g], context)

    if len(groups) < 2:
        return {g: one(g) for g in groups}
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets go of the interpreter's lock
        return dict(zip(groups, pool.map(one, groups), strict=True))


def joined_key(*parts: bytes) -> bytes:
    """Digest of parts whose borders count: `joined_key(b"ab", b"c") != joined_key(b"a", b"bc")`."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(struct.pack("<q", len(part)))
        digest.update(part)
    return digest.digest()


def weights_fingerprint(*modules: nn.Module) -> bytes:
    """Digest that changes when a parameter, a buffer, an adapter's state or a hook changes; of this process only.

    Per tensor: address, version counter, shape, dtype, device and `SAMPLES_PER_TENSOR` evenly spaced values. The
    values are there because peft merges adapters through `.data`, which moves neither address nor counter. An edit
    through `.data` that misses every sampled element, and one of weights that accelerate keeps offloaded, stay
    unseen: call `clear()` after one.
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
                kind = (device, dtype)
                group = samples.get(kind)
                if group is None:
                    group = samples[kind] = []
                shapes.append(tensor.shape)
                if size:
                    group.append(_sample(tensor, size))
    facts.append(hash(tuple(shapes)))
    digest = hashlib.blake2b(array.array("q", facts).tobytes(), digest_size=DIGEST_BYTES)
    digest.update("|".join(states).encode())
    for kind in sorted(samples, key=str):
        digest.update(str(kind).encode())
        if samples[kind]:
            digest.update(torch.cat(samples[kind]).view(torch.uint8).cpu().numpy())
    return digest.digest()


def weights_digest(*modules: nn.Module) -> bytes:
    """Digest of every byte of the weights, and of adapters' states: equal in every process, seconds for a large model."""
    tensors, states = [], []
    for module in _walk(modules):
        own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        tensors += own
        if "_active_adapter" in module.__dict__:
            states.append(_adapter_state(module))
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks = [hook for hook in hooks if not _origin(hook).startswith(("transformers.", "accelerate."))]
        if hooks or any(tensor.is_meta for tensor in own):
            # What a foreign hook does, and what offloaded weights hold, cannot be told: no other process shares it.
            states.append(uuid.uuid4().hex)

    def one(tensor: torch.Tensor) -> bytes:
        digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=DIGEST_BYTES)
        if not tensor.is_meta and tensor.numel():
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            digest.update(data.numpy())
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter's lock
        return joined_key(*pool.map(one, tensors), *(state.encode() for state in states))


def _walk(modules: Sequence[nn.Module]) -> Iterable[nn.Module]:
    """Every module once, in a fixed order; `nn.Module.modules` builds sets and names that nobody needs here."""
    stack, seen = list(reversed(modules)), set()
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend(child for child in reversed(module._modules.values()) if child is not None)


def _origin(hook) -> str:
    return getattr(hook, "__module__", None) or ""


def _sample(tensor: torch.Tensor, size: int) -> torch.Tensor:
    count = SAMPLES_PER_TENSOR if size > SAMPLES_PER_TENSOR else size
    if tensor.is_contiguous():
        return tensor.as_strided((count,), (size // count,))
    return tensor.flatten()[:: size // count][:count]


def _adapter_state(module: nn.Module) -> str:
    """State of a peft tuner layer that its tensors do not show: which adapters act, and how strongly."""
    attributes = vars(module)
    names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    return "|".join(f"{name}={attributes.get(name)}" for name in names)


def _measure_transfer(device: torch.device) -> float:
    """Seconds per byte of a copy from pageable host memory."""
    block = torch.zeros(2**24, dtype=torch.uint8)
    block.to(device).sum().item()  # warm-up; `item` waits for the device
    started = time.perf_counter()
    block.to(device)[-1].item()
    return (time.perf_counter() - started) / block.numel()


def synchronized_clock(device: torch.device) -> float:
    """Seconds, after everything queued on a device has run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A detached tensor whose storage holds nothing else, so that the budget counts what is kept."""
    tensor = tensor.detach()
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
