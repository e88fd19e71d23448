"""Recognising a known background, so that a reference's pixels can replace it and the model's background cache hits.

The promise: every patch of a new image is either reused with staleness <= tolerance, or freshly encoded. Staleness is
the largest, over a patch's four quarter blocks, of the mean absolute RGB difference in grey levels. With tolerance 0
the reused pixels are equal. `reusable_patches` is stricter than the promise: it sees thin lines and small lamps too, and what stands
out of the noise of a patch.

A background is what stays. `BackgroundTracker` says when a layer of it is made anew, `ChangeWatch` when it is another background.
"""

import contextlib
import contextvars
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from transformers.utils import logging

from .background_layers_backdrop import make_layer, put_patches
from .background_tracking_backdrop import BackgroundTracker, Proposal
from .matches_backdrop import Match, MatchReport
from .option_checks_backdrop import check_flag, check_number, check_path, check_whole_number
from .patch_groups_backdrop import grow_patches
from .patch_noise_backdrop import PatchNoise
from .reference_descriptors_backdrop import Candidate
from .reference_pictures_backdrop import reference_picture
from .reference_store_backdrop import KnownBackground, Reference, ReferenceStore
from .staleness_backdrop import measured_patches, patch_staleness, reusable_patches

logger = logging.get_logger(__name__)

MAX_COMPARISONS = 4  # references whose pixels are compared with one image
SAMPLED_LINE = 4  # every fourth line of patches tells whether a full comparison can succeed
UNASKED = 3  # times `max_overridden` may be unexplained where there is no detector to ask
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
        max_overridden: largest share of the reference's own patches that may be stale for no known reason: neither is an
            object there, nor does something come and go. Beyond it the match is refused.
        detect: "on_miss" runs the detector only where no background matches, where a layer is about to be made anew, and
            where a change has no other explanation; "always" adds its objects to the fresh patches of every match.
        max_references: references kept over all namespaces; the least recently matched one of the namespace that has
            most is evicted first. It bounds the bytes: each takes `S * S * 3 + 5 * P` for every layer in a memory-mapped file, and
            some 500 bytes of memory.
        ttl: seconds after which a reference is forgotten, None: never.
        refresh: make layers anew, once that pays.
        layers: 2 keeps what has settled lately in a second layer, 1 in the one there is.
        learn_noise: where the tolerance is above 0, call fresh what stands out of a patch's own noise, though it is within it.
        strict: a change that nothing explains starts another reference in the frame in which it is first seen; else in the
            second that shows it, so that something that merely passes costs no encoding of the background.
        folder: where the memory-mapped files live, None: the system's temporary folder.

    Attributes:
        observer: called with a `MatchReport` for every image, in the thread that asks; None: nobody is told.
        correct: `(reference, image) -> (frame, estimate)`, uint8 `[S, S, 3]` both times: brings an image closer to a reference before
            it is compared with it; None: images are compared as they are.

    Raises:
        ValueError: an option is of the wrong type or out of its range.
    """

    def __init__(
        self,
        patch_size: int,
        tolerance: float = 0.0,
        min_reuse: float = 0.2,
        max_overridden: float = 0.1,
        detect: str = "on_miss",
        max_references: int = 256,
        ttl: float | None = None,
        refresh: bool = True,
        layers: int = 2,
        learn_noise: bool = True,
        strict: bool = False,
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
        for name, value in (("refresh", refresh), ("learn_noise", learn_noise), ("strict", strict)):
            check_flag(name, value)
        if layers not in (1, 2):
            raise ValueError(f"layers is {layers!r}; wanted 1 or 2.")
        if folder is not None:
            check_path("folder", folder, "the path of a folder, or None for the system's temporary one")
        self.patch_size = patch_size
        self._tolerance = tolerance
        self.min_reuse = min_reuse
        self.max_overridden = max_overridden
        self.detect = detect
        self.refresh = refresh
        self.layers = layers
        self.learn_noise = learn_noise
        self.strict = strict
        self.observer: Callable[[MatchReport], None] | None = None
        self.correct: Callable[[Reference, np.ndarray], tuple[np.ndarray, object]] | None = None
        self._store = ReferenceStore(patch_size, max_references, ttl, folder)
        self._trackers: OrderedDict[int, BackgroundTracker] = OrderedDict()
        self._counts = dict.fromkeys(
            (
                "matches",
                "misses",
                "refused",
                "refreshes",
                "restarts",
                "expired",
                "detector_runs",
                "patches_reused",
                "patches_fresh",
                "patches_stale",
            ),
            0,
        )
        self._lock = threading.Lock()
        # Noise and tracker of the reference that the latest image of this thread just failed to match.
        self._near = threading.local()
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

    @property
    def _noise_counts(self) -> bool:
        return self.learn_noise and self.tolerance > 0

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
        self._near.noise = self._near.tracker = None
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
            if found is not None and (best is None or _costs(found) < _costs(best)):
                best, best_score = found, candidate.score
        return best

    def _compare_candidate(self, candidate: Candidate, image: np.ndarray) -> tuple[Match | None, bool]:
        """The match with a candidate, if it is one, and whether a sample of its patches ruled it out as it stands."""
        with self._lock:
            if candidate.reference_id not in self._store:  # evicted by another thread meanwhile
                return None, False
            reference = self._store.read(candidate.reference_id)
        # The one place where a frame is corrected: staleness, what is fresh and what is learned are about the result.
        frame, estimate = (image, None) if self.correct is None else self.correct(reference, image)
        sample_differs = self._sample_differs(reference, frame)
        found, change = None, None
        with self._lock:
            tracker = self._trackers.get(candidate.reference_id)
            noise = PatchNoise(reference.noise) if tracker is None else tracker.noise.copy()
            if tracker is not None and not sample_differs:
                change = tracker.look_at(frame)
        bounds = noise.bounds() if self._noise_counts else None
        if not sample_differs:
            found = self._compare(reference, frame, bounds, None if change is None else change.gradual)
        found = found or self._compare_improved(reference, frame, bounds)
        if found is None:
            if self._noise_counts and not sample_differs:
                self._learn_from_failure(reference, tracker, noise, frame)
            return None, sample_differs
        return replace(found, estimate=estimate, change=change), sample_differs

    def _compare(
        self,
        reference: Reference,
        frame: np.ndarray,
        bounds: np.ndarray | None,
        excused: np.ndarray | None = None,
    ) -> Match | None:
        """The match with a reference, None where it reuses too little."""
        same, staleness = reusable_patches(
            reference.pixels, frame, self.patch_size, self.tolerance, bounds, excused
        )
        fresh = ~(reference.patch_mask & same)
        if 1 - fresh.mean() < self.min_reuse:
            return None
        return Match(reference, frame, fresh, staleness, encoded=fresh)

    def _learn_from_failure(
        self, reference: Reference, tracker: BackgroundTracker | None, noise: PatchNoise, frame: np.ndarray
    ) -> None:
        """Keeps what is known of a place for the reference that this frame may become, where the frame just failed to match.

        Of a scene that never rests nothing is reused before it is known that its edges mean nothing.
        """
        same, structure = measured_patches(reference.pixels, frame, self.patch_size, self.tolerance)
        same &= reference.patch_mask
        if same.mean() < 0.5 * self.min_reuse or (self._near.noise and noise.known <= self._near.noise.known):
            return
        noise.observe(structure, same)
        self._near.noise, self._near.tracker = noise, tracker

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
        return bool(fitting < 0.5 * self.min_reuse * owned.size)

    def _compare_improved(
        self, reference: Reference, frame: np.ndarray, bounds: np.ndarray | None
    ) -> Match | None:
        """The match with what the frames of a reference show by now, where the reference itself is too stale."""
        with self._lock:
            tracker = self._trackers.get(reference.reference_id) if self.refresh else None
            proposal = None if tracker is None else tracker.propose(0)
            if tracker is None or proposal is None:
                return None
            noise = tracker.noise.levels.copy()
        improved = Reference.of_layers(proposal.layers, reference.reference_id, noise, self.patch_size)
        match = self._compare(improved, frame, bounds)
        return None if match is None else self._renewed(match, proposal)

    @staticmethod
    def _renewed(match: Match, proposal: Proposal) -> Match:
        """The match with layers that are encoded for it."""
        new = proposal.layers if proposal.first_is_new else proposal.layers[1:]
        encoded = np.logical_or.reduce([match.fresh, *(layer.patch_mask for layer in new)])
        return replace(match, encoded=encoded, refreshed=True)

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
            del self._trackers[old_id]
            tracker.adopt(proposal)
        stored = self._store.add(self.namespace, shown, proposal.layers, noise)
        if stored is not None:
            reference = stored
            self._keep_tracker(stored.reference_id, tracker.branch(proposal) if keep else tracker)
            logger.info("background %d: made %d of it", old_id, stored.reference_id)
        bounds = tracker.noise.bounds() if self._noise_counts else None
        same, staleness = reusable_patches(
            reference.pixels, frame, self.patch_size, self.tolerance, bounds, ~match.fresh
        )
        fresh = ~(same & reference.patch_mask)
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


def _costs(match: Match) -> tuple[int, int, int]:
    """Sorts matches: the fewest fresh patches; then one whose second layer may take up what changes; then the latest."""
    return int(match.fresh.sum()), -len(match.reference.layers), -match.reference.reference_id


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
