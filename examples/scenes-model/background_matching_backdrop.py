"""Recognising a known background, so that a reference's pixels can replace it and the model's background cache hits.

The promise: every patch of a new image is either reused with staleness <= tolerance, or freshly encoded. Staleness is
the largest, over a patch's four quarter blocks, of the mean absolute RGB difference in grey levels. With tolerance 0
the reused pixels are equal. `reusable_patches` is stricter than the promise: it sees thin lines and small lamps too, and what stands
out of the noise of a patch.

A background is what stays. `BackgroundTracker` says when a layer of it is made anew, `ChangeWatch` when it is another background.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from transformers.utils import logging

from .background_finding_backdrop import BackgroundFinder
from .background_layers_backdrop import make_layer, put_patches
from .background_tracking_backdrop import BackgroundTracker, Proposal
from .matches_backdrop import Match, MatchReport
from .patch_groups_backdrop import grow_patches
from .reference_pictures_backdrop import reference_picture
from .reference_store_backdrop import KnownBackground, Reference

logger = logging.get_logger(__name__)

UNASKED = 3  # times `max_overridden` may be unexplained where there is no detector to ask
TRACKED_REFERENCES = 16  # this many, the most recently matched, can improve


class BackgroundMatcher(BackgroundFinder):
    """Finds the reference that matches an image, learns from it, and keeps the references of every namespace. Thread-safe.

    Args: see `BackgroundFinder`.
    """

    def match(self, image: np.ndarray) -> Match | None:
        """`find`, and `accept` what it found: the reference to use for uint8 `[S, S, 3]`, or None."""
        match = self.find(image)
        return None if match is None else self.accept(image, match)

    # ---- what becomes of a match

    def accept(
        self,
        image: np.ndarray,
        match: Match,
        objects: np.ndarray | None = None,
        find_objects: Callable[[], np.ndarray] | None = None,
    ) -> Match | None:
        """Counts a match, learns from the image, and makes what should change of the background by now.

        Args:
            image: uint8 `[S, S, 3]`, the one that was matched.
            match: what `find` gave for it.
            objects: bool `[P]`, detected objects, which are fresh whatever the reference shows.
            find_objects: gives the patches of detected objects, bool `[P]`. It is called at most once, where a layer is about to be
                made anew (a parked object is still an object; without this the running mean absorbs it), or where a change
                has no other explanation.

        Returns:
            The match to use: the given one, or one with a reference made anew. None: too much of the image differs from the
            reference for no known reason, so it is to be treated as a new background.
        """
        look = _Look(objects, find_objects)
        with self._lock:
            self._store.mark_used(match.reference.reference_id)
            tracker = self._tracker_of(match)
            stale = match.reference.patch_mask & match.fresh
            unexplained = stale
            if tracker is not None:
                unexplained = tracker.update(match.frame, ~match.fresh, match.change, objects)
        changed = np.zeros_like(stale)
        if tracker is not None and unexplained.any():
            changed = self._standing_changes(match, tracker, unexplained)
        excessive = self._is_excessive(match, unexplained, look)
        if changed.any() or (excessive and (tracker is None or tracker.looks_due())):
            found = look()
            if found is not None and found.any():
                unexplained, changed = unexplained & ~found, changed & ~found
            excessive = self._is_excessive(match, unexplained, look)
            if tracker is not None:
                with self._lock:
                    tracker.note_look(found, explained=not unexplained.any())
        elif excessive:
            excessive = False  # the last looks found objects; this one is spared
        if excessive:
            with self._lock:
                self._counts["refused"] += 1
                self._counts["detector_runs"] += look.runs
            return None
        if tracker is not None:
            match = self._improve(match, tracker, unexplained, changed, look)
        return self._finish(image, match, tracker, unexplained, objects, look.runs)

    def _is_excessive(self, match: Match, unexplained: np.ndarray, look: "_Look") -> bool:
        """Whether too much differs from the reference for no known reason; where no detector can tell, more is allowed."""
        limit = self.max_overridden * (1 if look.possible else UNASKED)
        return bool(unexplained.sum() > limit * match.reference.patch_mask.sum())

    def _tracker_of(self, match: Match) -> BackgroundTracker | None:
        """The tracker of a match's reference, made if need be; None where nothing is learned of it. The lock is held."""
        reference_id = match.reference.reference_id
        if not self.refresh or reference_id not in self._store:
            return None  # evicted or replaced by another thread meanwhile; the match holds all the same
        tracker = self._trackers.pop(reference_id, None)
        if tracker is None:
            reference = self._store.read(reference_id)
            tracker = self._track(
                reference, put_patches(match.frame, reference.pixels, reference.patch_mask, self.patch_size)
            )
        self._trackers[reference_id] = tracker
        return tracker

    def _track(
        self, reference: Reference, image: np.ndarray, near: threading.local | None = None
    ) -> BackgroundTracker:
        """A tracker for a reference, kept; it knows what is known of a place that looked much the same. The lock is held."""
        tracker = BackgroundTracker(
            image, reference.layers, self.patch_size, self.tolerance, reference.noise, self.layers
        )
        noise, before = getattr(near, "noise", None), getattr(near, "tracker", None)
        if before is not None and len(before.age) == len(tracker.age):
            before.update(image, np.zeros(len(tracker.age), dtype=bool))
            tracker = before.branch(Proposal(reference.layers, True))
        if noise is not None and len(noise.levels) == len(tracker.age):
            tracker.noise = noise
        self._keep_tracker(reference.reference_id, tracker)
        return tracker

    def _keep_tracker(self, reference_id: int, tracker: BackgroundTracker) -> None:
        """Keeps a tracker as the most recently used one, and no more than are allowed. The lock is held."""
        self._trackers[reference_id] = tracker
        for known in [known for known in self._trackers if known not in self._store]:
            del self._trackers[known]
        while len(self._trackers) > TRACKED_REFERENCES:
            known, oldest = self._trackers.popitem(last=False)
            self._store.write_noise(known, oldest.noise.levels)

    def _standing_changes(
        self, match: Match, tracker: BackgroundTracker, unexplained: np.ndarray
    ) -> np.ndarray:
        """Unexplained patches that speak of another background, bool `[P]`; the others are remembered."""
        with self._lock:
            if self.strict:
                return unexplained
            changed = tracker.watch.stays(match.frame, unexplained, self.tolerance)
            tracker.watch.remember(match.frame, unexplained & ~changed)
            return changed

    def _improve(
        self,
        match: Match,
        tracker: BackgroundTracker,
        unexplained: np.ndarray,
        changed: np.ndarray,
        look: "_Look",
    ) -> Match:
        """The match with another background's reference, with one whose layers are better, or as it is."""
        if changed.any():
            around = grow_patches(changed, 1) & (changed | ~match.fresh)
            with self._lock:
                proposal = tracker.with_change(match.frame, around, ~match.fresh)
                self._counts["restarts"] += 1
                return self._adopt(match, tracker, proposal, keep=True)
        with self._lock:
            due = 0 if match.refreshed else tracker.due
        if due is None:
            return match
        parked = look()  # the lock is not held while a detector runs
        with self._lock:
            if look.ran:
                tracker.note_objects(parked)
            if match.reference.reference_id not in self._store:
                return match
            if not match.refreshed and tracker.due is None:
                tracker.reset_waste(due)
                return match  # the patches that were encoded freshly time after time were parked objects
            proposal = tracker.propose(due)
            if proposal is None:
                tracker.reset_waste(due)
                return match
            return self._adopt(match, tracker, proposal, keep=False)

    def _adopt(self, match: Match, tracker: BackgroundTracker, proposal: Proposal, keep: bool) -> Match:
        """Stores new layers, of the same background or (`keep`) of another one, and matches with them. The lock is held."""
        old_id, noise = match.reference.reference_id, tracker.noise.levels.copy()
        reference = Reference.of_layers(proposal.layers, old_id, noise, self.patch_size)
        frame = match.frame
        shown = put_patches(frame, reference.pixels, reference.patch_mask, self.patch_size)
        if not keep:
            self._store.remove(old_id)
            self._trackers.pop(
                old_id, None
            )  # other references may have pushed it out while a detector looked
            tracker.adopt(proposal)
        stored = self._store.add(self.namespace, shown, proposal.layers, noise)
        if stored is not None:
            reference = stored
            self._keep_tracker(stored.reference_id, tracker.branch(proposal) if keep else tracker)
            logger.info("background %d: made %d of it", old_id, stored.reference_id)
        bounds = tracker.noise.bounds() if self._noise_counts else None
        fresh, staleness = self._fresh(reference, frame, bounds, ~match.fresh, match.estimate)
        return self._renewed(replace(match, reference=reference, fresh=fresh, staleness=staleness), proposal)

    def _finish(
        self,
        image: np.ndarray,
        match: Match,
        tracker: BackgroundTracker | None,
        unexplained: np.ndarray,
        objects: np.ndarray | None,
        detector_runs: int,
    ) -> Match:
        """Counts and reports a match; the detected objects are fresh too."""
        owned = match.reference.patch_mask
        nothing = np.zeros_like(owned)
        stale = match.fresh & owned
        objects = nothing if objects is None else objects
        match = replace(match, fresh=match.fresh | objects, encoded=match.encoded | objects)
        hidden = disowned = nothing
        with self._lock:
            if tracker is not None:
                hidden, disowned = tracker.hidden & ~match.fresh, tracker.disowned & ~owned
            self._counts["matches"] += 1
            self._counts["refreshes"] += match.refreshed
            self._counts["detector_runs"] += detector_runs
            self._counts["patches_reused"] += int((~match.encoded).sum())
            self._counts["patches_fresh"] += int(match.encoded.sum())
            self._counts["patches_stale"] += int((owned & match.fresh).sum())
        logger.debug(
            "background %d: %d of %d patches reused%s",
            match.reference.reference_id,
            (~match.encoded).sum(),
            len(match.fresh),
            ", refreshed" if match.refreshed else "",
        )
        if self.observer is not None:
            self.observer(
                MatchReport(
                    image=image,
                    frame=match.frame,
                    reference=match.reference,
                    fresh=match.fresh,
                    encoded=match.encoded,
                    unseen=~owned,
                    stale=stale,
                    hidden=hidden,
                    disowned=disowned,
                    objects=objects,
                    unexplained=unexplained & stale,
                    refreshed=match.refreshed,
                    detector_runs=detector_runs,
                    estimate=match.estimate,
                )
            )
        return match

    def miss(
        self,
        image: np.ndarray,
        patch_mask: np.ndarray | None,
        objects: np.ndarray | None = None,
        detector_runs: int = 0,
    ) -> None:
        """Counts an image that matched nothing, and remembers the background found in it.

        Args:
            image: uint8 `[S, S, 3]`.
            patch_mask: bool `[P]`, the patches of its background; None: it has none.
            objects: bool `[P]`, the patches of its objects.
            detector_runs: how often the detector looked at it.
        """
        if patch_mask is not None:
            self.add(image, patch_mask, objects)
        patches = (image.shape[0] // self.patch_size) ** 2
        with self._lock:
            self._counts["misses"] += 1
            self._counts["detector_runs"] += detector_runs
            self._counts["patches_fresh"] += patches
        if self.observer is None:
            return
        everything, nothing = np.ones(patches, dtype=bool), np.zeros(patches, dtype=bool)
        self.observer(
            MatchReport(
                image=image,
                frame=image,
                reference=None,
                fresh=everything,
                encoded=everything,
                unseen=everything,
                stale=nothing,
                hidden=nothing,
                disowned=nothing,
                objects=nothing if objects is None else objects,
                unexplained=nothing,
                refreshed=False,
                detector_runs=detector_runs,
            )
        )

    def add(self, image: np.ndarray, patch_mask: np.ndarray, objects: np.ndarray | None = None) -> None:
        """Remembers a background.

        Args:
            image: uint8 `[S, S, 3]`, a frame of it.
            patch_mask: bool `[P]`, the patches of the frame that are background.
            objects: bool `[P]`, the patches of detected objects, if a detector looked.
        """
        with self._lock:
            layers = (make_layer(image, patch_mask, self.patch_size),)
            reference = self._store.add(self.namespace, image, layers)
            if reference is not None and self.refresh:
                tracker = self._track(reference, image, near=self._near)
                if objects is not None:
                    tracker.note_objects(objects)

    def save_pictures(self, folder: str | os.PathLike) -> list[str]:
        """Writes every reference as a PNG in which what it does not own is hatched.

        Args:
            folder: made if need be.

        Returns:
            The names of the files, in the order in which the references were made.
        """
        with self._lock:
            references = [self._store.read(reference_id) for reference_id in sorted(self._store.ids)]
        os.makedirs(folder, exist_ok=True)
        names = []
        for reference in references:
            names.append(f"reference-{reference.reference_id:06d}.png")
            reference_picture(reference, self.patch_size).save(os.path.join(folder, names[-1]))
        return names

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


class _Look:
    """What the detector sees in one image; it looks once at most, and not at all where that is known."""

    def __init__(self, objects: np.ndarray | None, find_objects: Callable[[], np.ndarray] | None):
        self._objects, self._find = objects, find_objects
        self.runs = 0

    @property
    def possible(self) -> bool:
        """Whether there is a detector, or has been."""
        return self._objects is not None or self._find is not None

    @property
    def ran(self) -> bool:
        """Whether it is known where objects are."""
        return self._objects is not None

    def __call__(self) -> np.ndarray | None:
        """Bool `[P]`, the patches of detected objects; None without a detector."""
        if self._objects is None and self._find is not None:
            self.runs += 1
            self._objects = self._find()
        return self._objects
