"""One pass of a recording through background matching: what happened to each frame, and the figures of all.

`S` is the side of the image as the model sees it (pixels), `P` its number of patches, `F` the number of frames;
staleness is in grey levels 0-255.
"""

import itertools
import math
import time
from array import array

import numpy as np
from PIL import Image
from tqdm import tqdm

from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.matches_backdrop import MatchReport
from backdrop.processing.patch_groups_backdrop import BACKGROUND, PatchGroup
from backdrop.processing.staleness_backdrop import patch_staleness

from .camera_maps import MapsWriter
from .recordings import Recording

HIT, REFRESH, MISS = 0, 1, 2
COLUMNS = (
    "state",  # HIT, REFRESH or MISS
    "reused",  # patches
    "stale_sum",  # staleness summed over the reused patches, grey levels
    "stale_max",  # of the reused patches, grey levels
    "static",  # patches within the tolerance of the frame before; nan for the first frame
    "beyond",  # reused patches that break the bound
    "references",  # kept after the frame
    "bytes",  # everything kept by the matcher after the frame
    "match_ms",
    "encoded",  # patches
    "owned",  # patches that the reference owns
    "stale",  # patches that the reference owns and the fresh group overrides
    "hidden",  # patches that the second layer shows and the first one shows otherwise
    "disowned",  # patches that the reference does not own because they keep changing
    "looks",  # runs of the detector
)


class CameraRun:
    """One pass. Of each frame a row of numbers is kept and no image, so that memory stays flat.

    Attributes:
        side: `S`; 0 before the first frame.
        num_patches: `P`; 0 before the first frame.
        first_violation: what was wrong with the first reused patch that broke the bound; None: none did.
    """

    def __init__(
        self,
        recording: Recording,
        processor: BackdropImageProcessor,
        tolerance: float,
        min_reuse: float,
        matching: dict | None = None,
    ):
        self.recording = recording
        self.processor = processor
        self.tolerance = tolerance
        self.matcher = processor.enable_background_matching(
            tolerance=tolerance, min_reuse=min_reuse, **(matching or {})
        )
        self.matcher.observer = self._observe
        self.first_violation: str | None = None
        self.side = self.num_patches = 0
        # One flat buffer; a row is appended in one step, so that Ctrl-C finds whole rows.
        self._rows = array("d")
        self._reports: list[MatchReport] = []
        self._started = time.perf_counter()

    def _observe(self, report: MatchReport) -> None:
        self._reports.append(report)

    def play(self, max_frames: int | None, loops: int, maps: MapsWriter | None) -> None:
        """All frames, or the first `max_frames`, of so many loops."""
        known = self.recording.num_frames
        totals = [total for total in (max_frames, known and known * loops) if total]
        before = None
        played = itertools.chain.from_iterable(self.recording.frames() for _ in range(loops))
        frames = itertools.islice(played, max_frames)
        # None: silent where stderr is no terminal.
        with tqdm(
            total=min(totals, default=None), desc=self.recording.name, unit="frame", disable=None
        ) as bar:
            for index, frame in enumerate(frames):
                report = self._match(frame, index, before)
                if maps is not None:
                    maps.add(report)
                before = report.image
                bar.update()

    def _match(self, frame: Image.Image, index: int, before: np.ndarray | None) -> MatchReport:
        """One frame through the processor, measured; its report."""
        self._reports.clear()
        started = time.perf_counter()
        (groups,) = self.processor.image_groups([frame])
        match_ms = (time.perf_counter() - started) * 1000
        if len(self._reports) != 1:
            raise AssertionError(f"Frame {index}: {len(self._reports)} reports of the matcher; wanted 1.")
        (report,) = self._reports
        patch_size = self.processor.patch_size
        self.side, self.num_patches = report.image.shape[0], len(report.fresh)
        reused, stale_sum, stale_max, beyond = 0, 0.0, 0.0, 0
        if report.reference is not None:
            self._check_groups(groups, report, index)
            staleness = patch_staleness(report.reference.pixels, report.frame, patch_size)
            used = np.flatnonzero(~report.encoded)
            reused = len(used)
            if reused:
                stale_sum = float(staleness[used].sum(dtype=np.float64))
                stale_max = float(staleness[used].max())
            broken = used[(staleness[used] > self.tolerance) | ~report.reference.patch_mask[used]]
            beyond = len(broken)
            if beyond and self.first_violation is None:
                patch = int(broken[0])
                owned = "owns" if report.reference.patch_mask[patch] else "does not own"
                self.first_violation = (
                    f"frame {index}, patch {patch} has staleness {staleness[patch]:.4g} and the reference {owned} it; "
                    f"wanted at most {self.tolerance:g}, owned."
                )
        static = math.nan
        if before is not None:
            static = int((patch_staleness(before, report.image, patch_size) <= self.tolerance).sum())
        stats = self.matcher.stats()
        state = MISS if report.reference is None else REFRESH if report.refreshed else HIT
        row = (
            state,
            reused,
            stale_sum,
            stale_max,
            static,
            beyond,
            stats["references"],
            stats["bytes"],
            match_ms,
        )
        masks = (report.encoded, report.owned, report.stale, report.hidden, report.disowned)
        self._rows.extend(array("d", (*row, *(int(mask.sum()) for mask in masks), report.detector_runs)))
        return report

    def _check_groups(self, groups: list[PatchGroup], report: MatchReport, index: int) -> None:
        """Checks that what is measured is what the model gets: the reference's background and the fresh patches."""
        layers = () if report.reference is None else report.reference.layers
        fresh: np.ndarray = np.zeros(self.num_patches, dtype=bool)
        for group in groups[len(layers) :]:
            fresh |= group.patch_mask
        same = np.array_equal(fresh, report.fresh) and len(groups) >= len(layers)
        for group, layer in zip(groups, layers, strict=False):
            same &= group.kind == BACKGROUND and np.array_equal(group.patch_mask, layer.patch_mask)
            same &= np.array_equal(group.pixels, layer.pixels)
        if not same:
            raise AssertionError(f"Frame {index}: the groups are not those of the matcher's report.")

    def table(self) -> dict[str, np.ndarray]:
        """Column name -> float64 `[F]`."""
        rows = np.array(self._rows).reshape(-1, len(COLUMNS))
        return dict(zip(COLUMNS, rows.T, strict=True))

    def figures(self, complete: bool) -> dict:
        """The figures of the frames so far."""
        table, seconds = self.table(), time.perf_counter() - self._started
        frames, patches = len(table["state"]), self.num_patches
        hit, reused = table["state"] == HIT, table["reused"]
        stats = self.matcher.stats()
        shares = {
            f"{name}_share": float(table[name].sum() / (frames * patches)) if frames else 0.0
            for name in ("encoded", "owned", "stale", "hidden", "disowned")
        }
        static = table["static"][~np.isnan(table["static"])]
        return {
            "frames": frames,
            "hits": int(hit.sum()),
            "share_reused": float(reused.sum() / (frames * patches)) if frames else 0.0,
            **shares,
            "detector_runs": int(table["looks"].sum()),
            "restarts": stats["restarts"],
            "refused": stats["refused"],
            "max_stale": float(table["stale_max"].max(initial=0.0)),
            "mean_stale": float(table["stale_sum"].sum() / reused.sum()) if reused.any() else 0.0,
            "tolerance": self.tolerance,
            "references": int(table["references"][-1]) if frames else 0,
            "refreshes": int((table["state"] == REFRESH).sum()),
            "peak_cache_bytes": int(table["bytes"].max(initial=0)),
            "misses": int((table["state"] == MISS).sum()),
            "violations": int(table["beyond"].sum()),
            "static_share": float(static.mean() / patches) if len(static) else 0.0,
            "patches_per_frame": patches,
            "image_size": self.side,
            "patch_size": self.processor.patch_size,
            "source": self.recording.name,
            "seconds": seconds,
            "frames_per_second": frames / seconds,
            "match_ms_median": float(np.median(table["match_ms"])) if frames else 0.0,
            "complete": complete,
        }
