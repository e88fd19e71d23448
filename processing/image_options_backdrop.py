"""The options of the image processor beyond transformers' own, and their ranges."""

from transformers.processing_utils import ImagesKwargs


class BackdropImagesKwargs(ImagesKwargs, total=False):
    """Options beyond transformers' own.

    patch_size: patch side, pixels.
    split: False gives every ordinary image as one background group of all patches (plain LLaVA).
    detector: name or path of an ultralytics model or of an object detector of transformers; None: the detector saved in
        the model's own folder.
    detector_device: where the detector runs.
    confidence: smallest confidence of a detection, 0-1.
    classes: class names or ids that count as objects; None: all.
    objects: "all", or "most_confident" for the most confident detection of each image alone.
    margin: patches by which the object region grows.
    overlap: the background keeps the grown ring too.
    min_coverage: share of a patch that objects must cover for it to be an object patch, 0-1 (0: any part).
    background_first: False gives the object group of an image before its background. The language model can then
        reuse nothing of the background, which follows what changes.
    """

    patch_size: int
    split: bool
    detector: str | None
    detector_device: str
    confidence: float
    classes: list[str | int] | None
    objects: str
    margin: int
    overlap: bool
    min_coverage: float
    background_first: bool


def check_options(confidence, objects, margin, min_coverage, patch_size, **_) -> None:
    """Checks the values of options; what needs no check is ignored.

    Raises:
        ValueError: one is out of its range.
    """
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence is {confidence}; wanted 0 to 1.")
    if objects not in ("all", "most_confident"):
        raise ValueError(f"objects is {objects!r}; wanted 'all' or 'most_confident'.")
    if margin < 0:
        raise ValueError(f"margin is {margin}; wanted 0 or more patches.")
    if not 0 <= min_coverage <= 1:
        raise ValueError(f"min_coverage is {min_coverage}; wanted 0 to 1.")
    if patch_size < 1:
        raise ValueError(f"patch_size is {patch_size}; wanted 1 or more pixels.")
