"""What background matching reuses on a real recording, frame by frame, and how stale it is. No language model.

    backdrop bench camera RECORDING --json figures.json --maps maps.npz --plot plot.png

Every frame takes the production path, `BackdropImageProcessor.image_groups`. What happened to it comes from the matcher's
observer; staleness is measured here again, from the reference's pixels and the frame's.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backdrop.data.atomic import replacing
from backdrop.processing.detections_backdrop import Detections
from backdrop.processing.image_processing_backdrop import BackdropImageProcessor

from .camera_maps import MapsWriter
from .camera_plot import plot
from .camera_run import CameraRun
from .recordings import open_recording
from .report import pyplot


class NoDetector:
    """Stands in for a detector and finds nothing: a background that is not known is one group of all patches."""

    names: dict[int, str] = {}
    source = "no detector"

    def detect(
        self,
        images: Sequence[np.ndarray],
        *,
        confidence: float = 0.25,
        classes: Sequence[int | str] | None = None,
    ) -> list[Detections]:
        """No detections for each image."""
        nothing = Detections(
            xyxy=np.zeros((0, 4), dtype=np.float32),
            confidence=np.zeros(0, dtype=np.float32),
            class_id=np.zeros(0, dtype=np.int64),
            names=self.names,
        )
        return [nothing] * len(images)

    def save(self, folder: str | os.PathLike) -> list[str]:
        """It has no weights: writes nothing."""
        return []


def default_processor(size: int = 336, patch_size: int = 14) -> BackdropImageProcessor:
    """LLaVA-1.5's geometry (sides in pixels) and no detector."""
    processor = BackdropImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, patch_size=patch_size
    )
    # The processor asks for the class; it calls no more than what this one has.
    processor.set_detector(NoDetector())
    return processor


def run_camera(
    source: str | Path,
    *,
    processor: BackdropImageProcessor | None = None,
    tolerance: float,
    min_reuse: float = 0.2,
    matching: dict | None = None,
    references_path: str | Path | None = None,
    json_path: str | Path | None = None,
    maps_path: str | Path | None = None,
    plot_path: str | Path | None = None,
    max_frames: int | None = None,
    loops: int = 1,
) -> dict:
    """Plays a recording through matching; the figures.

    Args:
        source: a video file or a folder of images.
        processor: None: LLaVA-1.5's geometry and no detector. Matching is on during the run and off after it.
        tolerance: largest staleness that is reused, grey levels.
        min_reuse: smallest share of the image's patches that a match must reuse.
        matching: further options of `BackgroundMatcher`.
        references_path: folder for the references that are known at the end, as PNG with what they do not own hatched.
        json_path: file for the figures; written on Ctrl-C too, for the frames done, with `"complete": false`.
        maps_path: `.npz` file from which anyone can measure again, see `MapsWriter`.
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
    figures_file, maps_file, plot_file = (
        None if path is None else Path(path) for path in (json_path, maps_path, plot_path)
    )
    _check_targets(figures_file, maps_file, plot_file)
    recording = open_recording(source)
    processor = processor or default_processor()
    if not processor.has_detector:
        # The processor asks for the class; it calls no more than what this one has.
        processor.set_detector(NoDetector())
    run = CameraRun(recording, processor, tolerance, min_reuse, matching)
    try:
        with contextlib.ExitStack() as stack:
            maps = None if maps_file is None else stack.enter_context(MapsWriter.open(maps_file))
            run.play(max_frames, loops, maps)
            if maps is not None:
                maps.assemble()
        figures = run.figures(complete=True)
        if references_path is not None:
            run.matcher.save_pictures(Path(references_path))
    except KeyboardInterrupt:
        if figures_file is not None:
            _write_json(figures_file, run.figures(complete=False))
        raise
    finally:
        processor.disable_background_matching()
    if figures_file is not None:
        _write_json(figures_file, figures)
    if plot_file is not None:
        plot(run.table(), figures, plot_file)
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
        pyplot()


def _write_json(path: Path, figures: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")


def summary(figures: dict) -> str:
    """The figures in one line."""
    rest = "" if figures["complete"] else " (stopped early)"
    return (
        f"{figures['source']}: {figures['frames']} frames{rest}, {figures['hits']} hits, {figures['misses']} misses, "
        f"{figures['refreshes']} refreshes; {figures['share_reused']:.1%} of vision tokens reused, "
        f"{figures['stale_share']:.1%} stale in the prompt ({figures['hidden_share']:.1%} more hidden by the second layer), "
        f"{figures['disowned_share']:.1%} disowned, {figures['detector_runs']} detector runs; staleness at most "
        f"{figures['max_stale']:.2f} of {figures['tolerance']:g} grey levels, mean {figures['mean_stale']:.2f}; "
        f"{figures['references']} references, at most {_mebibytes(figures['peak_cache_bytes'])}; "
        f"{figures['frames_per_second']:.1f} frames/s"
    )


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"
