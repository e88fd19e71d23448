"""Finding the reference that matches an image, among those of a namespace; nothing is learned from the image yet.

Candidates come from the references' descriptors; at most a few are compared in full.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .background_tracking_backdrop import BackgroundTracker, Proposal
from .frame_corrections_backdrop import Correction
from .frame_corrector_backdrop import FrameCorrector
from .matches_backdrop import Match, MatchReport
from .matching_scope_backdrop import MatchingScope
from .option_checks_backdrop import check_flag, check_number, check_path, check_whole_number
from .patch_noise_backdrop import PatchNoise
from .reference_descriptors_backdrop import Candidate
from .reference_store_backdrop import Reference, ReferenceStore
from .staleness_backdrop import measured_patches, patch_staleness, reusable_patches

MAX_COMPARISONS = 4  # references whose pixels are compared with one image
SAMPLED_LINE = 4  # every fourth line of patches tells whether a full comparison can succeed


class BackgroundFinder(MatchingScope):
    """The options of matching, and the search for a reference among those of every namespace. Thread-safe.

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
        follow_exposure: undo a gain and an offset of each channel before an image is compared (`frame_corrections_backdrop`).
        align: undo a shift of the whole image by at most a few pixels before it is compared.
        folder: where the memory-mapped files live, None: the system's temporary folder.

    Attributes:
        observer: called with a `MatchReport` for every image, in the thread that asks; None: nobody is told.
        correct: brings an image closer to a reference before it is compared with it; None: images are compared as they are.

    Raises:
        ValueError: an option is out of its range.
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
        follow_exposure: bool = False,
        align: bool = False,
        folder: str | None = None,
    ):
        super().__init__(tolerance)
        check_number("min_reuse", min_reuse, "a share above 0, at most 1", 0, 1, above=True)
        check_number("max_overridden", max_overridden, "a share from 0 to 1", 0, 1)
        if detect not in ("on_miss", "always"):
            raise ValueError(f"detect is {detect!r}; wanted 'on_miss' or 'always'.")
        check_whole_number("max_references", max_references, "1 or more", 1)
        if ttl is not None:
            check_number("ttl", ttl, "seconds above 0, or None", 0, above=True)
        flags = {"refresh": refresh, "learn_noise": learn_noise, "strict": strict}
        for name, value in {**flags, "follow_exposure": follow_exposure, "align": align}.items():
            check_flag(name, value)
        if layers not in (1, 2):
            raise ValueError(f"layers is {layers!r}; wanted 1 or 2.")
        if folder is not None:
            check_path("folder", folder, "the path of a folder, or None for the system's temporary one")
        self.patch_size = patch_size
        self.min_reuse = min_reuse
        self.max_overridden = max_overridden
        self.detect = detect
        self.refresh = refresh
        self.layers = layers
        self.learn_noise = learn_noise
        self.strict = strict
        self.observer: Callable[[MatchReport], None] | None = None
        corrects = follow_exposure or align
        self.correct = FrameCorrector(patch_size, follow_exposure, align) if corrects else None
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

    @property
    def _noise_counts(self) -> bool:
        return self.learn_noise and self.tolerance > 0

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
        best, best_score, ruled_out = None, 0.0, 0
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
        estimate = None if self.correct is None else self.correct(reference, image)
        frame = image if estimate is None else estimate.frame
        sample_differs = self._sample_differs(reference, frame)
        found, change = None, None
        with self._lock:
            tracker = self._trackers.get(candidate.reference_id)
            noise = PatchNoise(reference.noise) if tracker is None else tracker.noise.copy()
            if tracker is not None and not sample_differs:
                change = tracker.look_at(frame)
        bounds = noise.bounds() if self._noise_counts else None
        if not sample_differs:
            found = self._compare(
                reference, frame, bounds, None if change is None else change.gradual, estimate
            )
        found = found or self._compare_improved(reference, frame, bounds, estimate)
        if found is None:
            if self._noise_counts and not sample_differs:
                self._learn_from_failure(reference, tracker, noise, frame)
            return None, sample_differs
        return replace(found, change=change), sample_differs

    def _compare(
        self,
        reference: Reference,
        frame: np.ndarray,
        bounds: np.ndarray | None,
        excused: np.ndarray | None = None,
        estimate: Correction | None = None,
    ) -> Match | None:
        """The match with a reference, None where it reuses too little."""
        fresh, staleness = self._fresh(reference, frame, bounds, excused, estimate)
        if 1 - fresh.mean() < self.min_reuse:
            return None
        return Match(reference, frame, fresh, staleness, encoded=fresh, estimate=estimate)

    def _fresh(
        self,
        reference: Reference,
        frame: np.ndarray,
        bounds: np.ndarray | None,
        excused: np.ndarray | None,
        estimate: Correction | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The patches of a frame that a reference may not stand for, bool `[P]`, and the staleness of all, float32 `[P]`."""
        same, staleness = reusable_patches(
            reference.pixels, frame, self.patch_size, self.tolerance, bounds, excused
        )
        fresh = ~(reference.patch_mask & same)
        if estimate is not None:
            fresh |= estimate.outside
        return fresh, staleness

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
        self,
        reference: Reference,
        frame: np.ndarray,
        bounds: np.ndarray | None,
        estimate: Correction | None,
    ) -> Match | None:
        """The match with what the frames of a reference show by now, where the reference itself is too stale."""
        with self._lock:
            tracker = self._trackers.get(reference.reference_id) if self.refresh else None
            proposal = None if tracker is None else tracker.propose(0)
            if tracker is None or proposal is None:
                return None
            noise = tracker.noise.levels.copy()
        improved = Reference.of_layers(proposal.layers, reference.reference_id, noise, self.patch_size)
        match = self._compare(improved, frame, bounds, estimate=estimate)
        return None if match is None else self._renewed(match, proposal)

    @staticmethod
    def _renewed(match: Match, proposal: Proposal) -> Match:
        """The match with layers that are encoded for it."""
        new = proposal.layers if proposal.first_is_new else proposal.layers[1:]
        encoded = np.logical_or.reduce([match.fresh, *(layer.patch_mask for layer in new)])
        return replace(match, encoded=encoded, refreshed=True)


def _costs(match: Match) -> tuple[int, int, int]:
    """Sorts matches: the fewest fresh patches; then one whose second layer may take up what changes; then the latest."""
    return int(match.fresh.sum()), -len(match.reference.layers), -match.reference.reference_id
