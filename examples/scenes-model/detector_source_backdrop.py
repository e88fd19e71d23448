"""Where a processor's detector comes from: a name, the model's own folder, or one that was handed over; loaded once."""

import os
import threading
from pathlib import Path

from transformers.utils import cached_file, logging

from .detector_choice_backdrop import Detector, load_detector, load_saved_detector
from .detector_files_backdrop import DETECTOR_FILES, copy_detector

_HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "local_files_only",
    "subfolder",
)

logger = logging.get_logger(__name__)


class DetectorSource:
    """Loads a detector when it is first needed and keeps it. Loading is thread-safe.

    It may be needed at any moment of a training over several processes, in some of them only: loading waits for no other
    process. A process that was forked from this one, such as a worker of a data loader, cannot use its GPU: there the detector
    runs on the CPU.

    Args:
        folder: holds a saved detector, the model's own; None: there is none.
    """

    def __init__(self, folder: str | None = None):
        self._folder = folder
        self._loaded: Detector | None = None
        self._loaded_for: tuple | None = None  # name, device and folder of the loaded one
        self._handed_over: Detector | None = None
        self._lock = threading.Lock()
        self._process = os.getpid()  # a copy that was pickled for a new process is made anew there

    @property
    def folder(self) -> str | None:
        """Where the model's own detector is saved, None without one."""
        return self._folder

    @property
    def loaded(self) -> Detector | None:
        """The detector in memory, None before the first `load`."""
        return self._loaded

    def load(self, name: str | None, device: str) -> Detector:
        """The detector of a name or path, or, without one, of the model's own folder; loaded unless it is in memory.

        Raises:
            ValueError: there is neither, or it cannot be used.
            OSError: it cannot be downloaded, or a file of the folder has gone.
            ImportError: the package that it needs (ultralytics) is not installed.
        """
        if str(device).startswith("cuda") and os.getpid() != self._process:
            logger.warning_once(
                f"detector_device is {str(device)!r}, but this process, perhaps a worker of a data loader, was forked and "
                "cannot use the GPU of the one before: the detector runs on the CPU here. Ready-made groups need none."
            )
            device = "cpu"
        wanted = (name, device, self._folder)
        with self._lock:
            if self._loaded is None or self._loaded_for != wanted:
                if name is not None:
                    self._loaded = load_detector(name, device)
                elif self._handed_over is not None:
                    # A detector of someone else's, which may lack `on_device`, runs where it is.
                    move = getattr(self._handed_over, "on_device", None)
                    self._loaded = self._handed_over if move is None else move(device)
                elif self._folder is not None:
                    self._loaded = load_saved_detector(self._folder, device)
                else:
                    raise ValueError(
                        "An RGB image must be split, but the processor has no detector: the model's folder holds no "
                        f"{DETECTOR_FILES[0]}. Set `detector` to the name or path of an ultralytics model "
                        "(detector='yolov8n.pt') or of an object detector of transformers "
                        "(detector='PekingU/rtdetr_v2_r18vd'), pass split=False, or pass patch groups (RGBA)."
                    )
                self._loaded_for = wanted
            return self._loaded

    def use(self, detector: Detector, device: str) -> None:
        """Uses this detector for images without a detector's name, in place of the folder's own.

        Args:
            detector: anything with `detect`, `names`, `source` and `save`.
            device: the processor's `detector_device`, for which the detector counts as loaded.
        """
        with self._lock:
            self._folder = None  # else its weights would be used, and saved, instead
            self._loaded = detector
            self._handed_over = detector
            self._loaded_for = (None, device, None)

    def find(self, pretrained_model_name_or_path, **hub_kwargs) -> None:
        """Looks for a saved detector beside a processor's configuration: in a folder, on the Hub or in its cache.

        Args:
            pretrained_model_name_or_path: as in `from_pretrained`.
            hub_kwargs: those of `from_pretrained`; what does not concern the Hub is ignored.
        """
        hub_kwargs = {name: hub_kwargs[name] for name in _HUB_ARGUMENTS if hub_kwargs.get(name) is not None}
        files = [
            cached_file(
                str(pretrained_model_name_or_path),
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                **hub_kwargs,
            )
            for name in DETECTOR_FILES
        ]
        self._folder = None if None in files else str(Path(files[0]).parent)

    def save(self, name: str | None, folder) -> list[str]:
        """Writes the weights of the detector that `load(name, ...)` gives, if they are at hand.

        Args:
            name: as in `load`; the weights of a name that ultralytics or the Hub knows are not at hand.
            folder: where to.

        Returns:
            The names of the files that hold the weights in `folder`, [] where there are none.
        """
        if name is not None:
            return load_detector(name).save(folder) if Path(name).exists() else []
        if self._folder is not None:
            if Path(folder).resolve() != Path(self._folder).resolve():
                copy_detector(self._folder, folder)
            return list(DETECTOR_FILES)
        return [] if self._loaded is None else self._loaded.save(folder)

    def twin(self) -> "DetectorSource":
        """Another source that starts with this one's folder and loaded detector, and changes independently."""
        twin = DetectorSource(self._folder)
        twin._loaded, twin._loaded_for, twin._handed_over = self._loaded, self._loaded_for, self._handed_over
        return twin
