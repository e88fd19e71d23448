"""An image processor's detector: loaded, handed over, found in the model's folder, saved."""

from collections.abc import Callable

from .detector_choice_backdrop import Detector
from .live_state_backdrop import LiveState


class DetectorAccess:
    """For an image processor with `detector`, `detector_device` and a `LiveState` in `_live`."""

    detector: str | None
    detector_device: str
    _live: LiveState
    _with_defaults: Callable[[dict], dict]

    def load_detector(self, **options) -> Detector:
        """The detector that splits ordinary images, loaded now unless it is in memory.

        Args:
            options: `detector` and `detector_device` of one call, if they differ from the processor's.

        Raises:
            ValueError: there is none, or it cannot be used.
            OSError: it cannot be read or downloaded.
            ImportError: ultralytics is not installed.
        """
        options = self._with_defaults(options)
        return self._live.detectors.load(options["detector"], options["detector_device"])

    @property
    def loaded_detector(self) -> Detector | None:
        """The detector in memory, None before one was needed."""
        return self._live.detectors.loaded

    @property
    def has_detector(self) -> bool:
        """Whether ordinary images can be split: a detector is named, saved in the model's folder, or in memory."""
        detectors = self._live.detectors
        return self.detector is not None or detectors.folder is not None or detectors.loaded is not None

    def set_detector(self, detector: Detector) -> None:
        """Splits with this detector, and writes its weights when the processor is saved.

        Args:
            detector: anything with `detect`, `names`, `source` and `save`.
        """
        self.detector = None
        self._live.detectors.use(detector, self.detector_device)

    def find_detector(self, pretrained_model_name_or_path, **hub_kwargs) -> None:
        """Looks for a detector saved beside a processor's configuration.

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the Hub or in its cache.
            hub_kwargs: those of `from_pretrained`; what does not concern the Hub is ignored.
        """
        self._live.detectors.find(pretrained_model_name_or_path, **hub_kwargs)

    def save_detector(self, folder) -> list[str]:
        """Writes the detector's weights into a folder if they are at hand.

        Returns:
            The names of the files that hold them there, [] where they are not at hand.
        """
        return self._live.detectors.save(self.detector, folder)
