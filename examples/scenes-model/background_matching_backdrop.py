"""Recognising a known background, so that its pixels can be replaced by the reference's and the model's memo hits.

The promise: every patch of a new image is either reused with staleness <= tolerance, or freshly encoded. Staleness is
the largest, over a patch's four quarter blocks, of the mean absolute RGB difference in grey levels. With tolerance 0
the reused pixels are equal.

This is the simplest correct form: a few references per namespace, compared one by one.
"""

import contextlib
import contextvars
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from .patch_groups_backdrop import patch_staleness


@dataclass(frozen=True)
class Reference:
    """A background seen before: `pixels` uint8 `[S, S, 3]`, the patches it owns `[P]` bool, when it was seen (s)."""

    pixels: np.ndarray
    patch_mask: np.ndarray
    created: float

    @property
    def num_bytes(self) -> int:
        """Bytes kept for it."""
        return self.pixels.nbytes + self.patch_mask.nbytes


@dataclass(frozen=True)
class Match:
    """`reference` and the patches `[P]` bool of the new image that must be encoded freshly."""

    reference: Reference
    fresh: np.ndarray
    staleness: np.ndarray


class BackgroundMatcher:
    """References by namespace, and the choice among them. Thread-safe.

    Args:
        patch_size: pixels.
        tolerance: largest staleness that is reused, grey levels 0-255; 0: pixels must be equal.
        min_reuse: smallest share of the image's patches that a match must reuse.
        max_overridden: largest share of the reference's own patches that may be stale and overridden by fresh ones.
        detect: "on_miss" runs the detector only when no background matches, "always" adds its objects to the fresh
            patches of a match.
        max_references: references kept in each namespace; the one least recently matched goes first.
        ttl: seconds after which a reference is forgotten, None: never.
    """

    def __init__(
        self,
        patch_size: int,
        tolerance: float = 0.0,
        min_reuse: float = 0.3,
        max_overridden: float = 0.3,
        detect: str = "on_miss",
        max_references: int = 16,
        ttl: float | None = None,
    ):
        if not 0 <= tolerance <= 255:
            raise ValueError(f"tolerance is {tolerance}; wanted grey levels from 0 to 255.")
        if not 0 < min_reuse <= 1:
            raise ValueError(f"min_reuse is {min_reuse}; wanted a share above 0, at most 1.")
        if not 0 <= max_overridden <= 1:
            raise ValueError(f"max_overridden is {max_overridden}; wanted a share from 0 to 1.")
        if detect not in ("on_miss", "always"):
            raise ValueError(f"detect is {detect!r}; wanted 'on_miss' or 'always'.")
        if max_references < 1:
            raise ValueError(f"max_references is {max_references}; wanted 1 or more.")
        self.patch_size = patch_size
        self.tolerance = tolerance
        self.min_reuse = min_reuse
        self.max_overridden = max_overridden
        self.detect = detect
        self.max_references = max_references
        self.ttl = ttl
        self._references: dict[str, OrderedDict[int, Reference]] = {}
        self._next_id = 0
        self._counts = {"matches": 0, "misses": 0, "patches_reused": 0, "patches_fresh": 0}
        self._lock = threading.Lock()
        self._scope = contextvars.ContextVar("background_matching_scope", default=("", False))

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

    def match(self, image: np.ndarray) -> Match | None:
        """The reference that leaves the fewest patches to encode, or None.

        Args:
            image: uint8 `[S, S, 3]` at the model's geometry.
        """
        namespace = self._scope.get()[0]
        with self._lock:
            self._forget_expired(namespace)
            candidates = list(self._references.get(namespace, {}).items())
        best, best_id = None, None
        for reference_id, reference in candidates:
            staleness = patch_staleness(reference.pixels, image, self.patch_size)
            reusable = reference.patch_mask & (staleness <= self.tolerance)
            overridden = 1 - reusable.sum() / reference.patch_mask.sum()
            if reusable.mean() < self.min_reuse or overridden > self.max_overridden:
                continue
            if best is None or reusable.sum() > (~best.fresh).sum():
                best, best_id = Match(reference, ~reusable, staleness), reference_id
        with self._lock:
            self._counts["matches" if best else "misses"] += 1
            if best is not None:
                self._counts["patches_reused"] += int((~best.fresh).sum())
                self._counts["patches_fresh"] += int(best.fresh.sum())
                if best_id in self._references.get(namespace, {}):
                    self._references[namespace].move_to_end(best_id)
        return best

    def add(self, pixels: np.ndarray, patch_mask: np.ndarray) -> None:
        """Remembers a background: uint8 `[S, S, 3]` and the patches it owns `[P]` bool."""
        namespace = self._scope.get()[0]
        # An own, read-only copy: a caller that goes on drawing into its frame must not change a reference.
        pixels, patch_mask = pixels.copy(), patch_mask.copy()
        pixels.flags.writeable = patch_mask.flags.writeable = False
        with self._lock:
            references = self._references.setdefault(namespace, OrderedDict())
            references[self._next_id] = Reference(pixels, patch_mask, time.monotonic())
            self._next_id += 1
            while len(references) > self.max_references:
                references.popitem(last=False)

    def clear(self) -> None:
        """Forgets the references of all namespaces."""
        with self._lock:
            self._references.clear()

    def stats(self) -> dict[str, int]:
        """References and their bytes now; matches, misses and patches since the matcher was made."""
        with self._lock:
            kept = [reference for group in self._references.values() for reference in group.values()]
            return {
                "references": len(kept),
                "bytes": sum(reference.num_bytes for reference in kept),
                **self._counts,
            }

    def _forget_expired(self, namespace: str) -> None:
        if self.ttl is None:
            return
        references = self._references.get(namespace, OrderedDict())
        oldest = time.monotonic() - self.ttl
        for reference_id in [i for i, reference in references.items() if reference.created < oldest]:
            del references[reference_id]
