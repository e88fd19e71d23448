"""What an image processor holds beyond its options, and what of it a copy of the processor keeps."""

from .background_matching_backdrop import BackgroundMatcher
from .detector_source_backdrop import DetectorSource


class LiveState:
    """A processor's detector and matcher.

    A copied or pickled processor keeps the folder of its detector and starts with nothing in memory: transformers copies
    every attribute of a processor to print or save it.

    Args:
        detectors: where the detector comes from; None: nowhere yet.

    Attributes:
        detectors: as given.
        matcher: None while matching is off.
        noted_loss: whether the user was warned that images are cropped.
    """

    def __init__(self, detectors: DetectorSource | None = None):
        self.detectors = DetectorSource() if detectors is None else detectors
        self.matcher: BackgroundMatcher | None = None
        self.noted_loss = False

    def __deepcopy__(self, copied) -> "LiveState":
        return LiveState(DetectorSource(self.detectors.folder))

    def __reduce__(self):
        return _live_state_of_folder, (self.detectors.folder,)


def _live_state_of_folder(folder: str | None) -> LiveState:
    return LiveState(DetectorSource(folder))
