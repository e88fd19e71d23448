"""What background matching reuses on a real recording, frame by frame, and how stale it is. No language model.

Every frame takes the production path, `BackdropImageProcessor.image_groups`; what happened to it comes from the
matcher's observer, and staleness is measured here again, from the reference's pixels and the frame's.
`S` is the side of the image as the model sees it (pixels), `P` its number of patches, `F` the number of frames, `R`
the number of references; staleness is in grey levels 0-255.
"""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import time
import zipfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from backdrop.processing.background_matching_backdrop import MatchReport
from backdrop.processing.detector_backdrop import Detections
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
from backdrop.processing.patch_groups_backdrop import BACKGROUND, looks_like_group, patch_staleness

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HIT, REFRESH, MISS = 0, 1, 2
_COLUMNS = (
    "state",  # HIT, REFRESH or MISS
    "reused",  # patches
    "stale_sum",  # staleness summed over the reused patches
    "stale_max",
    "static",  # patches within the tolerance of the frame before; nan for the first frame
    "beyond",  # reused patches that break the bound
    "references",  # kept after the frame
    "bytes",  # everything kept by the matcher after the frame
    "match_ms",
)


class NoDetector:
    """Stands in for a detector and finds nothing: a background that is not known is one group of all patches."""

    names: dict[int, str] = {}
    source = "no detector"

    def detect(self, images, *, confidence=0.25, classes=None) -> list[Detections]:
        """No detections for each image."""
        nothing = Detections(
            xyxy=np.zeros((0, 4), dtype=np.float32),
            confidence=np.zeros(0, dtype=np.float32),
            class_id=np.zeros(0, dtype=np.int64),
            names=self.names,
        )
        return [nothing] * len(images)

    def save(self, folder) -> list[str]:
        """It has no weights: writes nothing."""
        return []


def default_processor(size: int = 336, patch_size: int = 14) -> BackdropImageProcessor:
    """LLaVA-1.5's geometry (sides in pixels) and no detector."""
    processor = BackdropImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, patch_size=patch_size
    )
    processor.set_detector(NoDetector())
    return processor


# ---- reading


@dataclass(frozen=True)
class Recording:
    """A folder of images or a video file: `path`, the images' names in order (None: a video), frames if known."""

    path: Path
    names: tuple[str, ...] | None
    num_frames: int | None

    @property
    def name(self) -> str:
        """File name without the path."""
        return self.path.resolve().name

    def frames(self) -> Iterator[Image.Image]:
        """The frames in order, one at a time.

        Raises:
            ValueError: a frame that cannot be read, or a patch group in place of an ordinary image.
        """
        return _video_frames(self.path) if self.names is None else _folder_frames(self.path, self.names)


def open_recording(source) -> Recording:
    """The recording at a path.

    Raises:
        ValueError: nothing there, a folder without images, or a file that OpenCV cannot read as a video.
    """
    path = Path(source)
    if path.is_dir():
        names = [
            entry.name
            for entry in os.scandir(path)
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(".")
        ]
        if not names:
            raise ValueError(f"The folder {path} holds no images; wanted {', '.join(IMAGE_SUFFIXES)} files.")
        return Recording(path, tuple(sorted(names, key=_natural)), len(names))
    if not path.exists():
        raise ValueError(f"The recording {path} does not exist; wanted a video file or a folder of images.")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        # OpenCV would take it, and every file numbered like it, for a video.
        raise ValueError(f"The recording {path} is one image; wanted a video file or a folder of images.")
    with _capture(path) as (cv2, capture):
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return Recording(path, None, count if count > 0 else None)


def _natural(name: str) -> tuple:
    """Sort key that puts frame2 before frame10."""
    parts = re.split(r"([0-9]+)", name.lower())
    return (*(int(part) if i % 2 else part for i, part in enumerate(parts)), name)


def _folder_frames(folder: Path, names: tuple[str, ...]) -> Iterator[Image.Image]:
    for name in names:
        try:
            with Image.open(folder / name) as image:
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"The frame {folder / name} cannot be read: {error}") from error
        if image.mode == "RGBA" and looks_like_group(np.asarray(image)):
            raise ValueError(f"The frame {folder / name} is a patch group; wanted an ordinary image.")
        yield image


def _video_frames(path: Path) -> Iterator[Image.Image]:
    with _capture(path) as (cv2, capture):
        count = 0
        while True:
            read, frame = capture.read()
            if not read:
                break
            count += 1
            yield Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        if count == 0:
            raise ValueError(f"The video {path} holds no frames that OpenCV can decode; wanted one or more.")


@contextlib.contextmanager
def _capture(path: Path) -> Iterator[tuple]:
    """(cv2, an open `cv2.VideoCapture`), released at the end."""
    # FFmpeg's own remarks about a broken file; ours says it in one line.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            f"Reading the video {path} needs OpenCV, which is not installed: `pip install opencv-python`, or give a "
            "folder of images."
        ) from error
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise ValueError(f"The file {path} cannot be read as a video; wanted one that OpenCV decodes.")
        yield cv2, capture
    finally:
        capture.release()


# ---- running


def run_camera(
    source,
    *,
    processor: BackdropImageProcessor | None = None,
    tolerance: float,
    min_reuse: float = 0.3,
    json_path=None,
    maps_path=None,
    plot_path=None,
    max_frames: int | None = None,
    loops: int = 1,
) -> dict:
    """Plays a recording through matching; the figures.

    Args:
        source: a video file or a folder of images.
        processor: None: LLaVA-1.5's geometry and no detector. Matching is on during the run and off after it.
        tolerance: largest staleness that is reused.
        min_reuse: smallest share of the image's patches that a match must reuse.
        json_path: file for the figures; written on Ctrl-C too, for the frames done, with `"complete": false`.
        maps_path: `.npz` file from which anyone can measure again, see `_MapsWriter`.
        plot_path: PNG of the figures over time.
        max_frames: stop after so many frames, None: all.
        loops: how often the recording is played.

    Raises:
        ValueError: a source, frame, option or target that is not as wanted.
        RuntimeError: after the files are written: a reused patch broke the bound.
    """
    for name, value in (("loops", loops), ("max_frames", max_frames)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; wanted 1 or more.")
    json_path, maps_path, plot_path = (
        None if path is None else Path(path) for path in (json_path, maps_path, plot_path)
    )
    _check_targets(json_path, maps_path, plot_path)
    recording = open_recording(source)
    processor = processor or default_processor()
    if not _has_detector(processor):
        processor.set_detector(NoDetector())
    run = _Run(recording, processor, tolerance, min_reuse)
    try:
        with contextlib.ExitStack() as stack:
            maps = None if maps_path is None else stack.enter_context(_MapsWriter.open(maps_path))
            run.play(max_frames, loops, maps)
            if maps is not None:
                maps.assemble()
        figures = run.figures(complete=True)
    except KeyboardInterrupt:
        if json_path is not None:
            _write_json(json_path, run.figures(complete=False))
        raise
    finally:
        processor.disable_background_matching()
    if json_path is not None:
        _write_json(json_path, figures)
    if plot_path is not None:
        plot(run.table(), figures, plot_path)
    if run.first_violation is not None:
        raise RuntimeError(f"{figures['violations']} reused patches break the bound: {run.first_violation}")
    return figures


def _check_targets(json_path: Path | None, maps_path: Path | None, plot_path: Path | None) -> None:
    """Finds what would fail after the last frame before the first one."""
    targets = {"json": json_path, "maps": maps_path, "plot": plot_path}
    for name, path in targets.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(
                f"The {name} file's folder {path.parent} does not exist; wanted an existing one."
            )
        if path.is_dir():
            raise ValueError(f"The {name} file {path} is a folder; wanted a file.")
    if plot_path is not None:
        _pyplot()


def _has_detector(processor: BackdropImageProcessor) -> bool:
    live = processor._live
    return processor.detector is not None or live.folder is not None or live.detector is not None


class _Run:
    """One pass: a row of numbers a frame and no image is kept, so that memory stays flat."""

    def __init__(
        self, recording: Recording, processor: BackdropImageProcessor, tolerance: float, min_reuse: float
    ):
        self.recording = recording
        self.processor = processor
        self.tolerance = tolerance
        self.matcher = processor.enable_background_matching(tolerance=tolerance, min_reuse=min_reuse)
        self.matcher.observer = self._observe
        self.first_violation: str | None = None
        self.side = self.num_patches = 0
        # One flat buffer: a row is appended in one step, so that Ctrl-C finds whole rows, and it is 72 bytes.
        self._rows = array("d")
        self._reports: list[MatchReport] = []
        self._started = time.perf_counter()

    def _observe(self, report: MatchReport) -> None:
        self._reports.append(report)

    def play(self, max_frames: int | None, loops: int, maps: "_MapsWriter | None") -> None:
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
            staleness = patch_staleness(report.reference.pixels, report.image, patch_size)
            used = np.flatnonzero(~report.fresh)
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
        row = (state, reused, stale_sum, stale_max, static, beyond, stats["references"], stats["bytes"])
        self._rows.extend(array("d", (*row, match_ms)))
        return report

    def _check_groups(self, groups, report: MatchReport, index: int) -> None:
        """What is measured must be what the model gets: the reference's background and the fresh patches."""
        reference = report.reference
        background, fresh = groups[0], np.zeros(self.num_patches, dtype=bool)
        for group in groups[1:]:
            fresh |= group.patch_mask
        same = (
            background.kind == BACKGROUND
            and np.array_equal(background.patch_mask, reference.patch_mask)
            and np.array_equal(background.pixels, reference.pixels)
            and np.array_equal(fresh, report.fresh)
        )
        if not same:
            raise AssertionError(f"Frame {index}: the groups are not those of the matcher's report.")

    def table(self) -> dict[str, np.ndarray]:
        """Column name -> float64 `[F]`."""
        rows = np.array(self._rows).reshape(-1, len(_COLUMNS))
        return dict(zip(_COLUMNS, rows.T, strict=True))

    def figures(self, complete: bool) -> dict:
        """The figures of the frames so far."""
        table, seconds = self.table(), time.perf_counter() - self._started
        frames, patches = len(table["state"]), self.num_patches
        hit, reused = table["state"] == HIT, table["reused"]
        static = table["static"][~np.isnan(table["static"])]
        return {
            "frames": frames,
            "hits": int(hit.sum()),
            "share_reused": float(reused[hit].sum() / (frames * patches)) if frames else 0.0,
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


def summary(figures: dict) -> str:
    """The figures in one line."""
    rest = "" if figures["complete"] else " (stopped early)"
    return (
        f"{figures['source']}: {figures['frames']} frames{rest}, {figures['hits']} hits, {figures['misses']} misses, "
        f"{figures['refreshes']} refreshes; {figures['share_reused']:.1%} of vision tokens reused; staleness at most "
        f"{figures['max_stale']:.2f} of {figures['tolerance']:g} grey levels, mean {figures['mean_stale']:.2f}; "
        f"{figures['references']} references, at most {_mebibytes(figures['peak_cache_bytes'])}; "
        f"{figures['frames_per_second']:.1f} frames/s"
    )


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


# ---- writing


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well and is gone otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, figures: dict) -> None:
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")


class _MapsWriter:
    """Writes the arrays from which every reused patch's staleness can be measured again, in flat memory.

    `frames` uint8 `[F, S, S, 3]`, `references` uint8 `[R, S, S, 3]` (in order of first use, 0 outside the owned
    patches), `reference` int64 `[F]` (which of them, -1: a miss), `fresh` bool `[F, P]` (encoded freshly; all True on
    a miss), `refreshed` bool `[F]` (the reference was made anew for this frame: nothing was saved).

    The lengths are known only at the end, so raw bytes are spooled beside the target (twice its size on the disk for
    a moment) and copied under their headers into the zip by `assemble`.
    """

    def __init__(self, path: Path, spools: dict[str, BinaryIO]):
        self.path = path
        self._spools = spools
        self._reference_index: dict[int, int] = {}  # reference_id -> row of `references`
        self._num_frames = 0
        self._side = self._num_patches = 0

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator["_MapsWriter"]:
        """A writer whose spools are gone when the block ends, however it ends."""
        names = ("frames", "references", "reference", "fresh", "refreshed")
        with (
            tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
            contextlib.ExitStack() as stack,
        ):
            yield cls(path, {name: stack.enter_context(open(Path(folder, name), "w+b")) for name in names})

    def add(self, report: MatchReport) -> None:
        """One more frame."""
        self._side, self._num_patches = report.image.shape[0], len(report.fresh)
        row = -1
        if report.reference is not None:
            reference_id = report.reference.reference_id
            if reference_id not in self._reference_index:
                self._reference_index[reference_id] = len(self._reference_index)
                self._spools["references"].write(report.reference.pixels.tobytes())
            row = self._reference_index[reference_id]
        self._spools["frames"].write(report.image.tobytes())
        self._spools["reference"].write(np.int64(row).tobytes())
        self._spools["fresh"].write(report.fresh.tobytes())
        self._spools["refreshed"].write(np.bool_(report.refreshed).tobytes())
        self._num_frames += 1

    def assemble(self) -> None:
        """Puts the file in its place."""
        frames, pixels = self._num_frames, (self._side, self._side, 3)
        arrays = {
            "frames": (np.uint8, (frames, *pixels)),
            "references": (np.uint8, (len(self._reference_index), *pixels)),
            "reference": (np.int64, (frames,)),
            "fresh": (np.bool_, (frames, self._num_patches)),
            "refreshed": (np.bool_, (frames,)),
        }
        with (
            _replacing(self.path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        ):
            for name, (dtype, shape) in arrays.items():
                descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                spool = self._spools[name]
                spool.seek(0)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    shutil.copyfileobj(spool, member, 2**18)


# ---- drawing

_MOST_BINS = 600  # more points than pixels only make a solid block
# Blue is what is reused of the background, orange what is fresh, as in the pictures of `backdrop split` and `backdrop ask`.
_REUSED, _RENEWED, _NEW = "#2e6fbe", "#96bae2", "#f0841e"
_STALE, _TOLERANCE, _REFERENCES = "#5a5f66", "#b3123f", "#7d3fb5"
_BYTES = "#3f7f4f"


def _pyplot():
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as pyplot
    except ImportError as error:
        raise ValueError(
            "A plot needs matplotlib, which is not installed: `pip install matplotlib`, or leave the plot out."
        ) from error
    return pyplot


def plot(table: dict[str, np.ndarray], figures: dict, path: Path) -> None:
    """Draws reuse, staleness and what is kept over the frames as PNG; long recordings in bins of frames."""
    pyplot = _pyplot()
    frames, patches = figures["frames"], figures["patches_per_frame"]
    hit, refresh, miss = (table["state"] == state for state in (HIT, REFRESH, MISS))
    index = np.arange(frames)
    starts = np.unique(np.linspace(0, frames, min(frames, _MOST_BINS), endpoint=False).astype(int))
    sizes = np.diff([*starts, frames])
    middle = starts + (sizes - 1) / 2
    binned = sizes.max() > 1
    marker = {"marker": ".", "markersize": 4} if frames <= 120 else {}

    figure, (reuse, stale, kept) = pyplot.subplots(
        3, 1, sharex=True, figsize=(11, 8.5), height_ratios=(3, 3, 2), layout="constrained"
    )
    figure.suptitle(
        f"{figures['source']}: {frames:,} frames, {figures['share_reused']:.1%} of vision tokens reused, "
        f"staleness at most {figures['max_stale']:.2f} grey levels",
        fontsize=13,
    )

    # A frame at which the reference is renewed matched all the same: it has a mark of its own, no dip in the line.
    share = np.where(hit | refresh, table["reused"] / patches, 0.0) * 100
    counted = (~refresh).astype(float)
    frames_in_line = np.add.reduceat(counted, starts)
    mean = np.add.reduceat(share * counted, starts) / np.where(frames_in_line, frames_in_line, np.nan)
    if binned:
        shown = np.where(refresh, np.nan, share)
        low, high = np.fmin.reduceat(shown, starts), np.fmax.reduceat(shown, starts)
        reuse.fill_between(middle, low, high, color=_REUSED, alpha=0.2, linewidth=0, label="least to most")
    label = f"mean of {round(sizes.mean())} frames" if binned else "reused"
    reuse.plot(middle, mean, color=_REUSED, linewidth=1.3, label=label, **marker)
    renewed = {"markerfacecolor": _RENEWED, "markeredgecolor": _REUSED, "markersize": 7, "linestyle": "none"}
    label = f"matched, reference renewed:\nencoded once more ({refresh.sum()})"
    reuse.plot(index[refresh], share[refresh], "D", label=label, **renewed)
    label = f"new background ({miss.sum()})"
    reuse.plot(index[miss], np.full(miss.sum(), -6), "|", color=_NEW, markersize=9, label=label)
    reuse.set(ylim=(-11, 104), ylabel="vision tokens reused (%)", yticks=range(0, 101, 20))

    count = np.add.reduceat(table["reused"], starts)
    used = count > 0
    worst = np.where(used, np.maximum.reduceat(table["stale_max"], starts), np.nan)
    average = np.where(used, np.add.reduceat(table["stale_sum"], starts) / np.maximum(count, 1), np.nan)
    stale.plot(middle, worst, color=_STALE, linewidth=1.1, label="largest of the reused patches", **marker)
    stale.plot(middle, average, color=_REUSED, linewidth=1.3, label="mean of the reused patches", **marker)
    tolerance = figures["tolerance"]
    stale.axhline(tolerance, color=_TOLERANCE, linestyle="--", linewidth=1, label=f"tolerance {tolerance:g}")
    top = max(tolerance, figures["max_stale"]) * 1.12 or 1.0
    stale.set(ylim=(-0.03 * top, top), ylabel="staleness (grey levels)")

    last = [*(starts[1:] - 1), frames - 1]
    size = kept.twinx()
    mebibytes = np.maximum.reduceat(table["bytes"], starts) / 2**20
    size.fill_between(middle, mebibytes, step="mid", color=_BYTES, alpha=0.3, linewidth=0)
    size.set_ylabel("kept (MiB, area)", color=_BYTES)
    # More headroom than for the count: both often grow together, and would cover each other.
    size.set_ylim(0, max(mebibytes.max() * 1.7, 0.01))
    kept.step(middle, table["references"][last], where="mid", color=_REFERENCES, linewidth=1.4)
    kept.set(ylim=(0, max(table["references"].max() * 1.2, 1)), xlabel="frame")
    kept.set_ylabel("references (line)", color=_REFERENCES)
    kept.yaxis.get_major_locator().set_params(integer=True)
    kept.set_zorder(size.get_zorder() + 1)
    kept.patch.set_visible(False)
    for axes in (reuse, stale, kept, size):
        axes.spines["top"].set_visible(False)
    for axes in (reuse, stale):
        axes.spines["right"].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, fontsize=9)
    for axes in (reuse, stale, kept):
        axes.grid(axis="y", color="#e3e5e8", linewidth=0.7)
        axes.set_axisbelow(True)
    margin = max(frames * 0.01, 0.5)
    kept.set_xlim(-margin, frames - 1 + margin)
    kept.xaxis.get_major_locator().set_params(integer=True)
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
