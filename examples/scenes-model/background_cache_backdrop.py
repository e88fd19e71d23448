"""The background cache: what was computed for backgrounds, addressed by content and bounded in bytes.

Two kinds of values: "tokens", the vision tokens of a background group (after the projector), and "prefix", the language
model's keys and values up to and including a background. A key is a digest of everything the value depends on
(`cache_keys_backdrop`), so a hit never changes an answer; anything that changes a weight, an adapter, the dtype or the
attention changes the key.

A stored tensor is never written: readers that would write get a copy.
"""

import contextlib
import contextvars
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

from .background_folder_backdrop import BackgroundFolder
from .cache_options_backdrop import byte_count, flag
from .cache_tiers_backdrop import CacheEntry, CacheTier, Lease, TransferSpeed, compact
from .weights_fingerprint_backdrop import WeightsFingerprints
from .weights_key_backdrop import weights_digest

logger = logging.get_logger(__name__)

MAX_DIGESTS = 32  # of weights that a cache remembers


@dataclass(frozen=True)
class _Scope:
    """Of a thread or task. `namespace`: None: it has never opened one."""

    namespace: str | None = None
    bypass: bool = False


_NO_SCOPE = _Scope()


class BackgroundCache:
    """Tensor tuples in up to three tiers, each under a byte budget and evicted by last use. Thread-safe.

    Tiers: the device where the values were computed; the host's memory, for what is evicted from there; a folder, for
    what is to outlive the process. A value found in a lower tier moves up. A lower tier is left out where fetching a
    value takes longer than computing it did.

    Args:
        max_bytes: bound of the first tier, a number or text such as "2GB"; a value that is larger alone is not stored.
        prefixes: keep the language model's keys and values too, not vision tokens alone.
        host_max_bytes: bound of the second tier, 0: none.
        folder: of the third tier (a `BackgroundFolder`), None: none.

    Attributes:
        device_tier, host_tier: the two tiers in memory, to look at; values go in and out by `put` and `get`.

    Raises:
        ValueError: an option is of the wrong type or too small.
    """

    def __init__(
        self,
        max_bytes: int | str,
        prefixes: bool = True,
        host_max_bytes: int | str = 0,
        folder: BackgroundFolder | None = None,
    ):
        self.max_bytes = byte_count("max_bytes", max_bytes, 1)
        self.prefixes = flag("prefixes", prefixes)
        self.folder = folder
        self.device_tier = CacheTier(self.max_bytes)
        self.host_tier = CacheTier(byte_count("host_max_bytes", host_max_bytes))
        self._lock = threading.RLock()
        self._counts: dict[str, float] = {}
        self._fingerprints = WeightsFingerprints()
        self._digests: OrderedDict[bytes, bytes] = OrderedDict()  # of all weights, by fingerprint
        # Of computing, by value value_kind, from this process's misses.
        self._compute_seconds_per_byte: dict[str, float] = {}
        self._transfers = TransferSpeed()
        # A context variable, so that threads and tasks that serve different tenants do not see each other's scope.
        self._scope = contextvars.ContextVar("background_cache_scope", default=_NO_SCOPE)
        self._is_shared = False  # a named namespace has been opened

    # A lock and a context variable cannot be copied; a copied model starts with an empty cache of its own.
    def __deepcopy__(self, memo) -> "BackgroundCache":
        return self.__reduce__()[0](*self.__reduce__()[1])

    def __reduce__(self):
        return BackgroundCache, (self.max_bytes, self.prefixes, self.host_tier.max_bytes, self.folder)

    @property
    def namespace(self) -> str:
        """Namespace of the current scope; values never cross namespaces. "": the one of calls without a scope."""
        return self._scope.get().namespace or ""

    @property
    def bypassed(self) -> bool:
        """True inside `scope(bypass=True)`, and where it cannot be told whose a call is (see `scope`)."""
        scope = self._scope.get()
        if scope.namespace is None and self._is_shared and not scope.bypass:
            logger.warning_once(
                "The background cache is bypassed in a thread or task without a namespace, because named ones are in use. "
                "A new thread does not inherit its starter's scope: open cache.scope(namespace=...) in it, or start "
                'contextvars.copy_context().run in it; cache.scope(namespace="") is the namespace without a name.'
            )
            return True
        return scope.bypass

    @contextlib.contextmanager
    def scope(self, namespace: str | None = None, bypass: bool | None = None):
        """Namespace and bypass for the calls made inside a `with` block (of this thread or task only).

        Once a named namespace was opened, a call from a thread or task that never opened any is nobody's: it may belong to
        a tenant whose scope did not reach the thread. It is computed without the cache, and a warning says so.

        Args:
            namespace: whose values are read and stored, "": those without a name; None: as outside the block.
            bypass: True reads and stores nothing; None: as outside the block.

        Raises:
            ValueError: `namespace` is no text, or `bypass` no bool.
        """
        if not isinstance(namespace, str | None):
            raise ValueError(f"namespace is {namespace!r}; wanted text.")
        if not isinstance(bypass, bool | None):
            raise ValueError(f"bypass is {bypass!r}; wanted True or False.")
        outside = self._scope.get()
        if namespace:
            self._is_shared = True
        self._scope.set(
            _Scope(
                outside.namespace if namespace is None else namespace,
                outside.bypass if bypass is None else bypass,
            )
        )
        try:
            yield self
        finally:
            # Who has left a namespace knows of namespaces: outside it means the one without a name.
            left = "" if outside.namespace is None and namespace is not None else outside.namespace
            self._scope.set(_Scope(left, outside.bypass))

    def lease(self) -> Lease:
        """A new lease: entries that `get` and `put` pin with it stay until it is released."""
        return Lease(self._lock)

    def get(
        self,
        value_kind: str,
        key: bytes,
        devices: Sequence[torch.device] | Callable[[], Sequence[torch.device]] | None = None,
        lease: Lease | None = None,
    ) -> tuple[torch.Tensor, ...] | None:
        """The stored tensors, which nobody may write to, or None.

        Args:
            value_kind: "tokens" or "prefix".
            key: digest of everything that the value depends on.
            devices: where tensors that come from a lower tier go, one each, repeated if fewer, or what gives them
                (asked only then); None: the CPU.
            lease: pins the entry, see `lease`.
        """
        with self._lock:
            entry = self.device_tier.entries.get((value_kind, key))
            if entry is not None:
                self.device_tier.entries.move_to_end((value_kind, key))
                self._count_hit(value_kind, "device", entry.seconds)
                if lease is not None:
                    lease.pin(entry)
                return entry.tensors
        if callable(devices):
            devices = devices()
        entry = self._fetch(value_kind, key, devices or [torch.device("cpu")], lease)
        if entry is None:
            logger.debug("background %s not known", value_kind)
            with self._lock:
                self._count(f"{value_kind}_misses")
            return None
        return entry.tensors

    def put(
        self,
        value_kind: str,
        key: bytes,
        value: Iterable[torch.Tensor],
        seconds: float = 0.0,
        lease: Lease | None = None,
    ) -> None:
        """Stores tensors, detached and without what else their storage holds; evicts what is over the budget.

        Args:
            value_kind: "tokens" or "prefix".
            key: digest of everything that the value depends on, 20 bytes.
            value: tensors of any shapes, on any devices.
            seconds: what computing the value took; 0: unknown, it is kept in every tier.
            lease: pins the entry, see `lease`.
        """
        try:
            tensors = tuple(compact(tensor) for tensor in value)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            # The answer needs the memory more than the cache does.
            logger.warning_once(f"A background was not stored: {error}")
            with self._lock:
                self._count("out_of_memory")
                self.device_tier.drop_unpinned()
            return
        entry = CacheEntry.of(tensors, seconds)
        if seconds and entry.num_bytes:
            with self._lock:
                self._compute_seconds_per_byte[value_kind] = seconds / entry.num_bytes
        self._insert(value_kind, key, entry, lease)
        if self.folder is not None:
            loading = self.folder.seconds_to_load(entry.num_bytes)
            if seconds and loading > seconds:
                with self._lock:
                    self._count("skipped_slow")
            else:
                self.folder.put_soon(value_kind, key, tensors, seconds)

    def clear(self) -> None:
        """Forgets every value on every tier, and what was known of the weights; the counters stay.

        Raises:
            OSError: an entry of the folder cannot be removed.
        """
        with self._lock:
            self.device_tier = CacheTier(self.device_tier.max_bytes)
            self.host_tier = CacheTier(self.host_tier.max_bytes)
            self._fingerprints.clear()
            self._digests.clear()
        if self.folder is not None:
            self.folder.clear()

    def weights_key(self, *modules: nn.Module) -> bytes | None:
        """What a stored value depends on in these modules; None where that cannot be told, which is logged once.

        Without a folder their fingerprint, cheap and valid in this process only. With a folder, which other processes
        read, a digest of all weights, computed once for each fingerprint.
        """
        snapshot = self._fingerprints.of(*modules)
        if snapshot.unseen is not None:
            logger.warning_once(
                f"The background cache cannot tell what {snapshot.unseen} does: what it concerns is computed anew at every "
                "call, as without the cache."
            )
            return None
        fingerprint = snapshot.fingerprint
        if self.folder is None:
            return fingerprint
        with self._lock:
            digest = self._digests.get(fingerprint)
        if digest is None:
            digest = weights_digest(*modules)
            with self._lock:
                self._digests[fingerprint] = digest
                while len(self._digests) > MAX_DIGESTS:
                    self._digests.popitem(last=False)
        return digest

    def forget_weights(self) -> None:
        """Lets the weights' memory go; their key is made anew when it is next asked for, and is the same if they are."""
        self._fingerprints.clear()

    def record_tokens(self, reused: int, computed: int) -> None:
        """Counts vision tokens that came from the cache, and those that were computed."""
        with self._lock:
            self._count("vision_tokens_reused", reused)
            self._count("vision_tokens_computed", computed)

    def stats(self) -> dict:
        """Counters since the cache was made.

        `entries` and `bytes` of all tiers in memory, `tiers` each tier's own; hits and misses by value kind and tier;
        evictions (from memory altogether); vision tokens reused and computed; `seconds_saved`: what computing the
        hits cost when they were stored, less the time to fetch them from lower tiers.
        """
        names = ("tokens_hits", "tokens_misses", "prefix_hits", "prefix_misses", "evictions", "too_large")
        names += ("out_of_memory", "skipped_slow", "device_hits", "host_hits", "disk_hits")
        names += ("vision_tokens_reused", "vision_tokens_computed")
        with self._lock:
            counts = {name: int(self._counts.get(name, 0)) for name in names}
            memory = {"device": self.device_tier, "host": self.host_tier}
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

    def _fetch(self, value_kind, key, devices, lease) -> CacheEntry | None:
        """An entry from the host's memory or the folder, now in the first tier; None: not there, or too slow."""
        with self._lock:
            entry = self.host_tier.entries.get((value_kind, key))
            if entry is not None and entry.is_cheaper_than(
                self._transfers.seconds(devices[0], entry.num_bytes)
            ):
                self._count("skipped_slow")
                return None
            entry, tier = self.host_tier.pop((value_kind, key)), "host"
        started = time.perf_counter()
        if entry is None and self.folder is not None:
            tier = "disk"
            size, rate = self.folder.size_of(value_kind, key), self._compute_seconds_per_byte.get(value_kind)
            if size is not None and rate and self.folder.seconds_to_load(size) > rate * size:
                with self._lock:
                    self._count("skipped_slow")
                return None
            stored = self.folder.get(value_kind, key) if size is not None else None
            if stored is not None:
                entry = CacheEntry.of(stored.tensors, stored.compute_seconds)
        if entry is None:
            return None
        try:
            tensors = tuple(tensor.to(devices[i % len(devices)]) for i, tensor in enumerate(entry.tensors))
        except (RuntimeError, MemoryError) as error:
            logger.warning_once(f"A stored background could not be loaded: {error}")
            with self._lock:
                self._count("out_of_memory")
            return None
        entry = CacheEntry(tensors, entry.num_bytes, entry.seconds)
        self._insert(value_kind, key, entry, lease)
        with self._lock:
            self._count_hit(value_kind, tier, entry.seconds - (time.perf_counter() - started))
        return entry

    def _insert(self, value_kind: str, key: bytes, entry: CacheEntry, lease: Lease | None) -> None:
        """Into the first tier; what does not fit there goes to the host's memory."""
        with self._lock:
            previous = self.device_tier.entries.get((value_kind, key))
            if previous is not None and previous.pins:
                return  # another thread stored the same value, and it is in use
            self.device_tier.pop((value_kind, key))
            self.host_tier.pop((value_kind, key))
            evicted = self.device_tier.insert((value_kind, key), entry)
            if evicted is None:
                self._count("too_large")
            elif lease is not None:
                lease.pin(entry)
        if evicted is not None:
            self._demote(evicted)
        elif self.host_tier.max_bytes:
            self._demote([((value_kind, key), entry)])

    def _demote(self, evicted: list[tuple[tuple[str, bytes], CacheEntry]]) -> None:
        """Moves entries that the first tier has no room for to the host's memory; counts those that leave it too."""
        for name, entry in evicted:
            dropped = [(name, entry)]
            device = next((tensor.device for tensor in entry.tensors), torch.device("cpu"))
            transfer = self._transfers.seconds(device, entry.num_bytes) if self.host_tier.max_bytes else 0.0
            if self.host_tier.max_bytes and not entry.is_cheaper_than(transfer):
                try:
                    moved = CacheEntry(
                        tuple(tensor.to("cpu") for tensor in entry.tensors), entry.num_bytes, entry.seconds
                    )
                    with self._lock:
                        if name not in self.device_tier.entries:  # stored again meanwhile
                            self.host_tier.pop(name)
                            dropped = self.host_tier.insert(name, moved)
                            dropped = [(name, entry)] if dropped is None else dropped
                except (RuntimeError, MemoryError):
                    pass  # no host memory to be had
            with self._lock:
                self._count("evictions", len(dropped))

    def _count_hit(self, value_kind: str, tier: str, seconds: float) -> None:
        logger.debug("background %s found in tier %s, %.3f s saved", value_kind, tier, seconds)
        self._count(f"{value_kind}_hits")
        self._count(f"{tier}_hits")
        self._count("seconds_saved", max(0.0, seconds))

    def _count(self, name: str, amount: float = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount
