"""The options of the image processor beyond transformers' own, and their ranges."""

from typing import Any

from transformers.processing_utils import ImagesKwargs

from .option_checks_backdrop import check_flag, check_number, check_path, check_whole_number


class BackdropImagesKwargs(ImagesKwargs, total=False):
    """Options beyond transformers' own.

    fit: what becomes of an image that is not square. "crop": its sides are cut off; "pad": it gets bars of the mean colour;
        "stretch": it is distorted. It stands for do_pad, do_center_crop and the form of size; None: what these say.
    own_padding: False leaves patches of nothing but padding to no group; they cost no token and no computation.
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

    # Any: `check_options` looks at them. transformers' own check of these types takes several lines to say what is wrong, and
    # refuses confidence=1.
    fit: Any
    own_padding: Any
    patch_size: Any
    split: Any
    detector: Any
    detector_device: Any
    confidence: Any
    classes: Any
    objects: Any
    margin: Any
    overlap: Any
    min_coverage: Any
    background_first: Any


def check_options(confidence, objects, margin, min_coverage, patch_size, **others) -> None:
    """Checks the values of options; what needs no check is ignored, and None stands for the processor's own.

    Raises:
        ValueError: one is of the wrong type or out of its range.
    """
    check_number("confidence", confidence, "0 to 1", 0, 1)
    if objects not in ("all", "most_confident"):
        raise ValueError(f"objects is {objects!r}; wanted 'all' or 'most_confident'.")
    check_whole_number("margin", margin, "0 or more patches", 0)
    check_number("min_coverage", min_coverage, "0 to 1", 0, 1)
    check_whole_number("patch_size", patch_size, "1 or more pixels", 1)
    for name in ("split", "overlap", "background_first", "own_padding"):
        if others.get(name) is not None:
            check_flag(name, others[name])
    classes = others.get("classes")
    if classes is not None and (
        not isinstance(classes, list | tuple | set | frozenset)
        or not all(isinstance(entry, str | int) and not isinstance(entry, bool) for entry in classes)
    ):
        raise ValueError(f"classes is {classes!r}; wanted a list of class names or ids, or None for all.")
    if others.get("detector") is not None:
        check_path("detector", others["detector"], "the name or path of an ultralytics model, or None")
