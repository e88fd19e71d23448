"""Recognising a known background, so that a reference's pixels can replace it and the model's background cache hits.

The promise: every patch of a new image is either reused with staleness <= tolerance, or freshly encoded. Staleness is
the largest, over a patch's four quarter blocks, of the mean absolute RGB difference in grey levels. With tolerance 0
the reused pixels are equal. `reusable_patches` is stricter than the promise: it sees thin lines and small lamps too.
"""

import contextlib
import contextvars
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from transformers.utils import logging

from .background_tracking_backdrop import BackgroundTracker
from .matches_backdrop import Match, MatchReport
from .option_checks_backdrop import check_flag, check_number, check_path, check_whole_number
from .patch_groups_backdrop import pixel_mask
from .reference_descriptors_backdrop import Candidate
from .reference_store_backdrop import KnownBackground, Reference, ReferenceStore
from .staleness_backdrop import patch_staleness, reusable_patches

logger = logging.get_logger(__name__)

MAX_COMPARISONS = 4  # references whose pixels are compared with one image
SAMPLED_LINE = 4  # every fourth line of patches tells whether a full comparison can succeed
TRACKED_REFERENCES = 16  # this many, the most recently matched, can improve


@dataclass(frozen=True)
class _Scope:
    """Of a thread or task. `namespace`: None: it has never opened one."""

    namespace: str | None = None
    bypass: bool = False
    tolerance: float | None = None


_NO_SCOPE = _Scope()


class BackgroundMatcher:
    """Finds the reference that matches an image, and keeps the references of every namespace. Thread-safe.

    Args:
        patch_size: pixels.
        tolerance: largest staleness that is reused, grey levels 0-255; 0: pixels must be equal. 10 suits cameras.
        min_reuse: smallest share of the image's patches that a match must reuse.
        max_overridden: largest share of the reference's own patches that may be stale and overridden by fresh ones.
        detect: "on_miss" runs the detector only when no background matches, "always" adds its objects to the fresh
            patches of a match.
        max_references: references kept over all namespaces; the least recently matched one of the namespace that has
            most is evicted first. It bounds the bytes: each takes `S * S * 3 + P` in a memory-mapped file, and some 500
            bytes of memory.
        ttl: seconds after which a reference is forgotten, None: never.
        refresh: replace a reference by the mean of the frames that matched it, once that pays.
        folder: where the memory-mapped files live, None: the system's temporary folder.

    Attributes:
        observer: called with a `MatchReport` for every image, in the thread that asks; None: nobody is told.

    Raises:
        ValueError: an option is of the wrong type or out of its range.
    """

    def __init__(
        self,
        patch_size: int,
        tolerance: float = 0.0,
        min_reuse: float = 0.3,
        max_overridden: float = 0.3,
        detect: str = "on_miss",
        max_references: int = 256,
        ttl: float | None = None,
        refresh: bool = True,
        folder: str | None = None,
    ):
        check_number("tolerance", tolerance, "grey levels from 0 to 255", 0, 255)
        check_number("min_reuse", min_reuse, "a share above 0, at most 1", 0, 1, above=True)
        check_number("max_overridden", max_overridden, "a share from 0 to 1", 0, 1)
        if detect not in ("on_miss", "always"):
            raise ValueError(f"detect is {detect!r}; wanted 'on_miss' or 'always'.")
        check_whole_number("max_references", max_references, "1 or more", 1)
        if ttl is not None:
            check_number("ttl", ttl, "seconds above 0, or None", 0, above=True)
        check_flag("refresh", refresh)
        if folder is not None:
            check_path("folder", folder, "the path of a folder, or None for the system's temporary one")
        self.patch_size = patch_size
        self._tolerance = tolerance
        self.min_reuse = min_reuse
        self.max_overridden = max_overridden
        self.detect = detect
        self.refresh = refresh
        self.observer: Callable[[MatchReport], None] | None = None
        self._store = ReferenceStore(patch_size, max_references, ttl, folder)
        self._trackers: OrderedDict[int, BackgroundTracker] = OrderedDict()
        self._counts = dict.fromkeys(
            ("matches", "misses", "refreshes", "expired", "patches_reused", "patches_fresh"), 0
        )
        self._lock = threading.Lock()
        self._scope = contextvars.ContextVar("background_matching_scope", default=_NO_SCOPE)
        self._is_shared = False  # a named namespace has been opened

    @property
    def tolerance(self) -> float:
        """Largest staleness that is reused: the matcher's, or that of `scope(tolerance=...)`."""
        given = self._scope.get().tolerance
        return self._tolerance if given is None else given

    @tolerance.setter
    def tolerance(self, tolerance: float) -> None:
        self._tolerance = tolerance

    @property
    def namespace(self) -> str:
        """Namespace of the current scope; references never cross namespaces. "": the one of calls without a scope."""
        return self._scope.get().namespace or ""

    @property
    def bypassed(self) -> bool:
        """True inside `scope(bypass=True)`, and where it cannot be told whose an image is (see `scope`)."""
        scope = self._scope.get()
        if scope.namespace is None and self._is_shared and not scope.bypass:
            logger.warning_once(
                "Background matching is bypassed in a thread or task without a namespace, because named ones are in use. A "
                "new thread does not inherit its starter's scope: open matcher.scope(namespace=...) in it, or start "
                'contextvars.copy_context().run in it; matcher.scope(namespace="") is the namespace without a name.'
            )
            return True
        return scope.bypass

    @contextlib.contextmanager
    def scope(self, namespace: str | None = None, bypass: bool | None = None, tolerance: float | None = None):
        """Sets namespace, bypass and tolerance for the calls made inside a `with` block, of this thread or task only.

        Once a named namespace was opened, an image from a thread or task that never opened any is nobody's: it may belong
        to a tenant whose scope did not reach the thread. It is split without matching, and a warning says so.

        Args:
            namespace: whose references are used and added, "": those without a name; None: as outside the block.
            bypass: True neither uses nor adds references; None: as outside the block.
            tolerance: largest staleness that is reused, grey levels from 0 to 255; None: as outside the block.

        Raises:
            ValueError: `namespace` is no text, `bypass` no bool, or `tolerance` no number from 0 to 255.
        """
        if not isinstance(namespace, str | None):
            raise ValueError(f"namespace is {namespace!r}; wanted text.")
        if not isinstance(bypass, bool | None):
            raise ValueError(f"bypass is {bypass!r}; wanted True or False.")
        if tolerance is not None:
            check_number("tolerance", tolerance, "grey levels from 0 to 255", 0, 255)
        outside = self._scope.get()
        if namespace:
            self._is_shared = True
        self._scope.set(
            _Scope(
                outside.namespace if namespace is None else namespace,
                outside.bypass if bypass is None else bypass,
                outside.tolerance if tolerance is None else tolerance,
            )
        )
        try:
            yield self
        finally:
            # Who has left a namespace knows of namespaces: outside it means the one without a name.
            left = "" if outside.namespace is None and namespace is not None else outside.namespace
            self._scope.set(replace(outside, namespace=left))

    def match(self, image: np.ndarray) -> Match | None:
        """`find`, and `accept` what it found: the reference to use for uint8 `[S, S, 3]`, or None."""
        match = self.find(image)
        return None if match is None else self.accept(image, match)

    def find(self, image: np.ndarray) -> Match | None:
        """The reference that leaves the fewest patches to encode, or None where none matches.

        References and counters stay as they are, except that expired references are dropped.

        Args:
            image: uint8 `[S, S, 3]` at the model's geometry.
        """
        namespace = self.namespace
        with self._lock:
            self._counts["expired"] += self._store.remove_expired()
            candidates = self._store.candidates(namespace, image, self.tolerance)
        best, best_score, ruled_out = None, 0, 0
        for candidate in candidates[:MAX_COMPARISONS]:
            # The others promise clearly less than what was found.
            if best is not None and candidate.score > 1.25 * best_score + 2:
                break
            if best is not None and best.fresh.sum() <= candidate.min_fresh:
                continue
            found, sample_differs = self._compare_candidate(candidate, image)
            ruled_out += sample_differs and found is None
            if ruled_out == 2:  # the others promise even less
                break
            if found is not None and (best is None or found.fresh.sum() < best.fresh.sum()):
                best, best_score = found, candidate.score
        return best

    def _compare_candidate(self, candidate: Candidate, image: np.ndarray) -> tuple[Match | None, bool]:
        """The match with a candidate, if it is one, and whether a sample of its patches ruled it out as it stands."""
        with self._lock:
            if candidate.reference_id not in self._store:  # evicted by another thread meanwhile
                return None, False
            reference = self._store.read(candidate.reference_id)
        sample_differs = self._sample_differs(reference, image)
        found = None if sample_differs else self._compare(reference, image)
        return found or self._compare_improved(reference, image), sample_differs

    def _compare(self, reference: Reference, image: np.ndarray) -> Match | None:
        """The match with a reference, None where it reuses too little or overrides too much."""
        same, staleness = reusable_patches(reference.pixels, image, self.patch_size, self.tolerance)
        reusable = reference.patch_mask & same
        overridden = 1 - reusable.sum() / reference.patch_mask.sum()
        if reusable.mean() < self.min_reuse or overridden > self.max_overridden:
            return None
        return Match(reference, ~reusable, staleness)

    def _sample_differs(self, reference: Reference, image: np.ndarray) -> bool:
        """Whether hardly a patch fits in every fourth line of patches; a fifth of the cost of comparing all."""
        grid = image.shape[0] // self.patch_size
        if grid < 2 * SAMPLED_LINE:
            return False
        p = self.patch_size
        lines = range(SAMPLED_LINE // 2, grid, SAMPLED_LINE)
        of_reference, of_image = (
            np.concatenate([pixels[line * p : (line + 1) * p] for line in lines])
            for pixels in (reference.pixels, image)
        )
        staleness = patch_staleness(of_reference, of_image, p).reshape(len(lines), grid)
        owned = reference.patch_mask.reshape(grid, grid)[list(lines)]
        fitting = (owned & (staleness <= self.tolerance)).sum()
        return bool(fitting < 0.5 * (1 - self.max_overridden) * owned.sum())

    def _compare_improved(self, reference: Reference, image: np.ndarray) -> Match | None:
        """The match with what the frames of a reference show by now, where the reference itself is too stale."""
        with self._lock:
            tracker = self._trackers.get(reference.reference_id) if self.refresh else None
            if tracker is None:
                return None
            pixels, owned = tracker.proposal(reference.pixels, reference.patch_mask)
        match = self._compare(Reference(pixels, owned, reference.reference_id), image)
        return None if match is None else replace(match, refreshed=True)

    def accept(
        self,
        image: np.ndarray,
        match: Match,
        objects: np.ndarray | None = None,
        find_objects: Callable[[], np.ndarray] | None = None,
    ) -> Match:
        """Counts a match, learns from the image, and replaces the reference by a better one where that pays by now.

        Args:
            image: uint8 `[S, S, 3]`, the one that was matched.
            match: what `find` gave for it.
            objects: bool `[P]`, detected objects, which are fresh whatever the reference shows.
            find_objects: gives the patches of detected objects, bool `[P]`. It is called only where the reference is
                about to be replaced: a parked object is still an object; without this the running mean absorbs it.

        Returns:
            The match to use: the given one, or one with a refreshed reference.
        """
        reusable = ~match.fresh
        with self._lock:
            self._store.mark_used(match.reference.reference_id)
            improves = self.refresh and self._learn(image, match)
        if improves:
            # The lock is not held while a detector runs.
            parked = objects if objects is not None or find_objects is None else find_objects()
            with self._lock:
                match = self._improve(image, match, parked)
        objects = np.zeros_like(match.fresh) if objects is None else objects
        unseen = ~match.reference.patch_mask
        stale = match.fresh & ~unseen
        match = Match(match.reference, match.fresh | objects, match.staleness, match.refreshed)
        with self._lock:
            self._counts["matches"] += 1
            self._counts["refreshes"] += match.refreshed
            self._counts["patches_reused"] += 0 if match.refreshed else int((~match.fresh).sum())
            self._counts["patches_fresh"] += len(reusable) if match.refreshed else int(match.fresh.sum())
        logger.debug(
            "background %d: %d of %d patches reused%s",
            match.reference.reference_id,
            (~match.fresh).sum(),
            len(match.fresh),
            ", refreshed" if match.refreshed else "",
        )
        self._report(image, match.reference, match.fresh, unseen, stale, objects, match.refreshed)
        return match

    def miss(
        self, image: np.ndarray, patch_mask: np.ndarray | None, objects: np.ndarray | None = None
    ) -> None:
        """Counts an image that matched nothing, and remembers the background found in it.

        Args:
            image: uint8 `[S, S, 3]`.
            patch_mask: bool `[P]`, the patches of its background; None: it has none.
            objects: bool `[P]`, the patches of its objects.
        """
        if patch_mask is not None:
            self.add(image, patch_mask)
        patches = (image.shape[0] // self.patch_size) ** 2
        with self._lock:
            self._counts["misses"] += 1
            self._counts["patches_fresh"] += patches
        everything, nothing = np.ones(patches, dtype=bool), np.zeros(patches, dtype=bool)
        self._report(
            image, None, everything, everything, nothing, nothing if objects is None else objects, False
        )

    def add(self, image: np.ndarray, patch_mask: np.ndarray) -> None:
        """Remembers a background: a frame uint8 `[S, S, 3]` and the patches of it that are background, `[P]` bool."""
        with self._lock:
            self._store.add(self.namespace, image, patch_mask)

    def clear(self, namespace: str | None = None) -> None:
        """Forgets the references of a namespace, or of all with None; the counters stay."""
        with self._lock:
            if namespace is None:
                self._store.clear()
                self._trackers.clear()
                return
            for reference_id in self._store.of_namespace(namespace):
                self._store.remove(reference_id)
                self._trackers.pop(reference_id, None)

    def known(self) -> list[KnownBackground]:
        """What is kept, the least recently used first."""
        with self._lock:
            return self._store.known()

    def reference(self, reference_id: int) -> Reference | None:
        """A reference by its number; None where it is not kept any more."""
        with self._lock:
            return self._store.read(reference_id) if reference_id in self._store else None

    def forget(self, reference_id: int) -> bool:
        """Forgets one reference; whether it was there."""
        with self._lock:
            if reference_id not in self._store:
                return False
            self._store.remove(reference_id)
            self._trackers.pop(reference_id, None)
            return True

    def stats(self) -> dict[str, int]:
        """The references and bytes kept now, and what was counted since the matcher was made.

        `bytes` is the sum of `memory_bytes` (descriptors and running means) and `file_bytes` (memory-mapped files).
        """
        with self._lock:
            memory, files = self._store.num_bytes()
            memory += sum(tracker.num_bytes for tracker in self._trackers.values())
            return {
                "references": len(self._store),
                "max_references": self._store.max_references,
                "bytes": memory + files,
                "memory_bytes": memory,
                "file_bytes": files,
                **self._counts,
            }

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"BackgroundMatcher(tolerance={self.tolerance}, {stats['references']} references, "
            f"{stats['bytes'] / 2**20:.1f} MiB, {stats['matches']} matches, {stats['misses']} misses, "
            f"{stats['refreshes']} refreshes)"
        )

    def _learn(self, image: np.ndarray, match: Match) -> bool:
        """Takes the image into the reference's running mean; returns whether the reference should be replaced now."""
        old = match.reference
        if old.reference_id not in self._store:
            return False  # evicted or replaced by another thread meanwhile; the match holds all the same
        tracker = self._trackers.pop(old.reference_id, None)
        if tracker is None:
            tracker = BackgroundTracker(image, self.patch_size, self._tolerance)
        else:
            tracker.update(image, match.fresh)
        self._trackers[old.reference_id] = tracker
        for known in [known for known in self._trackers if known not in self._store]:
            del self._trackers[known]
        while len(self._trackers) > TRACKED_REFERENCES:
            self._trackers.popitem(last=False)
        return match.refreshed or tracker.pays(old.patch_mask)

    def _improve(self, image: np.ndarray, match: Match, objects: np.ndarray | None) -> Match:
        """The match with a better reference, which is stored; the given match where that does not pay after all."""
        old = match.reference
        tracker = self._trackers.get(old.reference_id)
        if tracker is None or old.reference_id not in self._store:
            return match
        if objects is not None:
            tracker.note_objects(objects)
        # The reference of a refreshed match is a proposal already; the stored one is what it was made from.
        kept = self._store.read(old.reference_id)
        if not match.refreshed and not tracker.pays(kept.patch_mask):
            return match  # the patches that were encoded freshly time after time were parked objects
        tracker.reset_waste()
        pixels, owned = tracker.proposal(kept.pixels, kept.patch_mask)
        same, staleness = reusable_patches(pixels, image, self.patch_size, self.tolerance)
        fresh = ~(same & owned)
        if not match.refreshed and fresh.sum() >= match.fresh.sum():
            return match  # what it would have saved in earlier frames is not in this one
        namespace = self.namespace
        self._store.remove(old.reference_id)
        del self._trackers[old.reference_id]
        shown = np.where(pixel_mask(owned, image.shape[0], self.patch_size)[..., None], pixels, image)
        reference = self._store.add(namespace, shown, owned)
        if reference is None:
            return Match(Reference(pixels, owned, old.reference_id), fresh, staleness, refreshed=True)
        self._trackers[reference.reference_id] = tracker
        logger.info("background %d replaced by %d", old.reference_id, reference.reference_id)
        return Match(reference, fresh, staleness, refreshed=True)

    def _report(self, *values) -> None:
        if self.observer is not None:
            self.observer(MatchReport(*values))
