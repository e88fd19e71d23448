"""The image processor: images of any kind to patch groups, split by a detector or taken as they stand."""

import copy
import itertools
import os
from pathlib import Path

import numpy as np
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.utils import logging

from .background_matching_backdrop import BackgroundMatcher
from .call_arguments_backdrop import CONFIGURATION_FIELDS, LOADING_ARGUMENTS, refuse_arguments
from .detections_backdrop import Detections
from .detector_access_backdrop import DetectorAccess
from .image_geometry_backdrop import FIT_STEPS, ImageGeometry, settle_fit
from .image_loading_backdrop import load_image
from .image_options_backdrop import BackdropImagesKwargs, check_options
from .image_preparation_backdrop import crop_warning, placed_image, prepared_images
from .image_splitting_backdrop import ImageSplitter, whole_image_group
from .live_state_backdrop import LiveState
from .matching_presets_backdrop import matching_options
from .patch_groups_backdrop import PatchGroup, only_patches
from .picture_placement_backdrop import PicturePlacement
from .pixel_values_backdrop import pixel_values
from .processor_code_backdrop import save_processor_code

logger = logging.get_logger(__name__)


class BackdropImageProcessor(DetectorAccess, PilBackend):
    """Takes ordinary images and patch groups, in any mix, and returns the groups of all of them in order.

    Its output has `pixel_values [G, 3, S, S]` float32, `patch_mask [G, P]` bool, `group_kind [G]` int64 (0 background,
    1 object) and `groups_per_image`, the number of groups that each image became.
    """

    valid_kwargs = BackdropImagesKwargs
    model_input_names = ["pixel_values", "patch_mask", "group_kind"]

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 336}
    default_to_square = False
    crop_size = {"height": 336, "width": 336}
    do_resize = True
    do_center_crop = True
    do_pad = False
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    fit: str | None = None
    own_padding = True
    patch_size = 14
    split = True
    detector = None
    detector_device = "cpu"
    confidence = 0.25
    classes = None
    objects = "all"
    margin = 1
    overlap = False
    min_coverage = 0.0
    background_first = True

    def __init__(self, **kwargs):
        self._refuse_unknown(kwargs, CONFIGURATION_FIELDS)
        super().__init__(**kwargs)
        vars(self).update(settle_fit(vars(self), [n for n, value in kwargs.items() if value is not None]))
        self._live = LiveState()
        check_options(
            confidence=self.confidence,
            objects=self.objects,
            margin=self.margin,
            min_coverage=self.min_coverage,
            patch_size=self.patch_size,
            split=self.split,
            overlap=self.overlap,
            background_first=self.background_first,
            classes=self.classes,
            detector=self.detector,
        )

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if (name == "fit" or name in FIT_STEPS) and "_live" in vars(self):  # `fit` and its steps always agree
            own = {known: getattr(self, known, None) for known in self._valid_kwargs_names}
            vars(self).update(settle_fit(self._standardize_kwargs(**own), [name]))

    # ---- geometry

    @property
    def image_side(self) -> int:
        """`S`, the side in pixels of every image as the model sees it."""
        return ImageGeometry.from_options(self._with_defaults({})).side

    @property
    def num_patches(self) -> int:
        """`P`, the number of patches in the grid of an image as the model sees it."""
        return (self.image_side // self.patch_size) ** 2

    def geometry(self, **options) -> str:
        """How an image of any size becomes S x S, in a word that travels with saved groups, such as "resize+crop"."""
        return ImageGeometry.from_options(self._with_defaults(options)).name

    def model_images(self, images, **options) -> list[np.ndarray]:
        """Ordinary images as the model sees them, uint8 `[S, S, 3]`.

        Args:
            images: one or more, of any kind that the processor takes.
            options: any of the processor's own, for this call.
        """
        return [pixels for pixels, _ in self.placed_images(images, **options)]

    def placed_images(self, images, **options) -> list[tuple[np.ndarray, PicturePlacement]]:
        """Ordinary images as the model sees them, uint8 `[S, S, 3]`, each with where its picture lies in that square.

        Args:
            images: one or more, of any kind that the processor takes.
            options: any of the processor's own, for this call.
        """
        options = self._with_defaults(options)
        images = self._prepare_images_structure(images)
        return [placed_image(image, options, self) for image in images]

    def num_picture_patches(self, width: int, height: int, **options) -> int:
        """The patches that an image of some size may give to its groups: all, or those that are not only padding.

        Args:
            width, height: of the image, pixels.
            options: any of the processor's own, for this call.
        """
        options = self._with_defaults(options)
        geometry, patch_size = ImageGeometry.from_options(options), options["patch_size"]
        if options["own_padding"]:
            return (geometry.side // patch_size) ** 2
        return int(geometry.place(width, height, self).picture_patches(patch_size).sum())

    # ---- preprocessing

    def fetch_images(self, image_url_or_urls):
        """URLs, paths and base64 become PIL images with their alpha, which transformers' own loader drops.

        Raises:
            ValueError: a text is none of these, or its image cannot be fetched or read.
        """
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str | os.PathLike):
            return load_image(os.fspath(image_url_or_urls))
        return super().fetch_images(image_url_or_urls)

    def num_images(self, images) -> int:
        """How many images there are in a nested list of them, as the processor counts them; None has none."""
        return 0 if images is None else len(self._prepare_images_structure(images))

    def _preprocess_image_like_inputs(self, images, *args, return_tensors=None, **options) -> BatchFeature:
        images = self._prepare_images_structure(images)
        groups_per_image = self.image_groups(images, **options)
        groups = [group for image_groups in groups_per_image for group in image_groups]
        data = {
            "pixel_values": self._pixel_values(groups, options),
            "patch_mask": [group.patch_mask for group in groups],
            "group_kind": [group.kind for group in groups],
            "groups_per_image": [len(image_groups) for image_groups in groups_per_image],
        }
        if return_tensors is None:
            data["pixel_values"] = list(data["pixel_values"])
        else:
            # np.asarray leaves the pixels, which are one array already, where they are.
            data = {name: np.asarray(values) for name, values in data.items()}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _pixel_values(self, groups: list[PatchGroup], options: dict) -> np.ndarray | list:
        return pixel_values([group.pixels for group in groups], options, self) if groups else []

    # ---- patch groups

    def image_groups(self, images, **options) -> list[list[PatchGroup]]:
        """The groups of each image: a group as it stands, an ordinary image split (and matched, if that is on).

        Args:
            images: a flat list of PIL images, numpy arrays or torch tensors.
            options: any of the processor's own, for this call.

        Raises:
            ValueError: a patch group that does not fit this model, an image that is none, or no detector to split with.
        """
        options = self._with_defaults(options)
        prepared = prepared_images(images, options, self)
        self._note_loss([item[1] for item in prepared if isinstance(item, tuple)], options)
        split = iter(self._split([item for item in prepared if isinstance(item, tuple)], options))
        return [next(split) if isinstance(item, tuple) else [item] for item in prepared]

    def detections(
        self, model_images: list[np.ndarray], placements: list[PicturePlacement] | None = None, **options
    ) -> list[Detections]:
        """What the detector finds, after `confidence`, `classes` and `objects`, in pixels of the model's square.

        Args:
            model_images: uint8 `[S, S, 3]` each, see `model_images`.
            placements: where the pictures lie in them, see `placed_images`: the detector sees these parts alone, and
                undistorted. None: it sees the squares.
            options: any of the processor's own, for this call.
        """
        return self._detections(model_images, placements, self._with_defaults(options))

    def split_groups(
        self, pixels: np.ndarray, mask: np.ndarray, placement: PicturePlacement | None = None, **options
    ) -> list[PatchGroup]:
        """The groups of one image, background first.

        Args:
            pixels: uint8 `[S, S, 3]`.
            mask: bool `[S, S]`, pixels of objects.
            placement: where its picture lies in the square; with it `own_padding` is heeded.
            options: any of the processor's own, for this call.
        """
        options = self._with_defaults(options)
        groups = self._splitter(options).split_by_mask(pixels, mask)
        return groups if placement is None else _without_padding([groups], placement, options)[0]

    def _note_loss(self, placements: list[PicturePlacement], options: dict) -> None:
        """Warns, once in a processor's life, of an image that loses much of itself to the crop."""
        for placement in placements:
            warning = None if self._live.noted_loss else crop_warning(placement, options)
            if warning is not None:
                self._live.noted_loss = True
                logger.warning(warning)

    def _split(
        self, placed: list[tuple[np.ndarray, PicturePlacement]], options: dict
    ) -> list[list[PatchGroup]]:
        split: list[list[PatchGroup]] = []
        for placement, run in itertools.groupby(placed, key=lambda item: item[1]):
            split += self._split_alike([pixels for pixels, _ in run], placement, options)
        return split

    def _split_alike(
        self, images: list[np.ndarray], placement: PicturePlacement, options: dict
    ) -> list[list[PatchGroup]]:
        """The groups of images whose pictures lie alike in the square."""
        patch_size, matcher = options["patch_size"], self._live.matcher
        splitter = self._splitter(options, placement)
        if not options["split"]:
            split = [[whole_image_group(image, patch_size)] for image in images]
        elif matcher is None or matcher.bypassed:
            split = splitter.split(images)
        else:
            split = splitter.split_matched(images, matcher)
        if not options["background_first"]:
            split = [sorted(groups, key=lambda group: -group.kind) for groups in split]
        # Up to here padding is background like any other, so that the matcher needs to know nothing of it.
        return _without_padding(split, placement, options)

    def _splitter(self, options: dict, placement: PicturePlacement | None = None) -> ImageSplitter:
        def find_objects(images) -> list[np.ndarray]:
            placements = None if placement is None else [placement] * len(images)
            found = self._detections(images, placements, options)
            return [item.combined_mask(image.shape[0]) for item, image in zip(found, images, strict=True)]

        return ImageSplitter(
            patch_size=options["patch_size"],
            margin=options["margin"],
            overlap=options["overlap"],
            min_coverage=options["min_coverage"],
            find_objects=find_objects,
            finds_anything=self._finds_anything(options),
        )

    def _finds_anything(self, options: dict) -> bool:
        """Whether the detector can find objects: a stand-in that knows no class tells nothing about an image."""
        loaded = self._live.detectors.loaded
        return options["detector"] is not None or loaded is None or bool(loaded.names)

    def _detections(self, images, placements, options: dict) -> list[Detections]:
        detector = self._live.detectors.load(options["detector"], options["detector_device"])
        if placements is not None:
            images = [where.view(image) for where, image in zip(placements, images, strict=True)]
        found = detector.detect(images, confidence=options["confidence"], classes=options["classes"])
        if placements is not None:
            found = [where.to_square(item) for where, item in zip(placements, found, strict=True)]
        return [item.most_confident() if options["objects"] == "most_confident" else item for item in found]

    # ---- matching

    @property
    def background_matching(self) -> BackgroundMatcher | None:
        """The matcher, None while matching is off."""
        return self._live.matcher

    def enable_background_matching(
        self, preset: str | float | None = None, *, tolerance: float | None = None, **options
    ) -> BackgroundMatcher:
        """From now on known backgrounds are recognised and a reference's pixels stand for them.

        Args:
            preset: "screen" (tolerance 0) or "camera" (10, noise learned); a number is a tolerance.
            tolerance: largest staleness that is reused, grey levels 0-255; 0: pixels must be equal.
            options: see `BackgroundMatcher`; they take precedence over the preset's.

        Raises:
            ValueError: no such preset, or an option out of its range.
        """
        self._live.matcher = BackgroundMatcher(
            self.patch_size, **matching_options(preset, tolerance, options)
        )
        return self._live.matcher

    def disable_background_matching(self) -> None:
        """Switches matching off and forgets the references; every ordinary image is split by the detector."""
        self._live.matcher = None

    def twin(self) -> "BackdropImageProcessor":
        """A processor with the same options and the same detector in memory, whose matching is its own, and off."""
        twin = copy.copy(self)
        twin._live = LiveState(self._live.detectors.twin())
        return twin

    # ---- options

    def _with_defaults(self, options: dict) -> dict:
        """All options of one call, in transformers' standard form; what is None there is the processor's own.

        Raises:
            ValueError: one is of the wrong type or out of its range.
            TypeError: an option that the processor does not have.
        """
        self._refuse_unknown(options)
        complete = {name: getattr(self, name, None) for name in self._valid_kwargs_names}
        complete.update(
            {name: value for name, value in options.items() if value is not None or name == "classes"}
        )
        check_options(**complete)
        complete = self._standardize_kwargs(**complete)
        # transformers fills a call's options up with the processor's own: what differs from them was asked for.
        asked = [
            n for n in ("fit", *FIT_STEPS) if options.get(n) is not None and complete[n] != getattr(self, n)
        ]
        complete.update(settle_fit(complete, asked))
        return complete

    @classmethod
    def _refuse_unknown(cls, options, others=frozenset()) -> None:
        """Refuses what is no option and not among `others`; what begins with "_" is transformers' own."""
        unknown = {name for name in set(options) - others if not name.startswith("_")}
        refuse_arguments(
            cls.__name__, unknown - set(cls.valid_kwargs.__annotations__), "the options of its documentation"
        )

    # ---- saving and loading

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As transformers', and the detector's weights with it."""
        os.makedirs(save_directory, exist_ok=True)
        self.save_detector(save_directory)
        self.save_code(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def save_code(self, folder) -> dict[str, str] | None:
        """Writes the code that an `auto_map` names, as an exported folder has one; the map as it is then, or None."""
        auto_map = getattr(self, "auto_map", None)
        if auto_map:
            self.auto_map = save_processor_code(folder, auto_map)
        return auto_map and dict(self.auto_map)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As transformers'; finds the folder's own detector.

        Raises:
            TypeError: an argument that is neither an option nor one of loading.
        """
        cls._refuse_unknown(kwargs, LOADING_ARGUMENTS)
        hub_kwargs = dict(kwargs)
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        found = processor[0] if isinstance(processor, tuple) else processor
        found.find_detector(pretrained_model_name_or_path, **hub_kwargs)
        return processor

    @classmethod
    def from_dict(cls, image_processor_dict, **kwargs):
        """As transformers'; a `fit` among `kwargs` replaces the saved steps that it stands for, and they a saved `fit`."""
        asked = {name: kwargs[name] for name in ("fit", *FIT_STEPS) if kwargs.get(name) is not None}
        if asked:
            complete = cls(**image_processor_dict)._with_defaults(asked)
            image_processor_dict = image_processor_dict | {n: complete[n] for n in ("fit", *FIT_STEPS)}
        return super().from_dict(image_processor_dict, **kwargs)

    def to_dict(self) -> dict:
        """The options; never the detector in memory, references, or a path of this machine."""
        values = super().to_dict()
        values.pop("_live", None)
        if values.get("detector") is not None and Path(values["detector"]).exists():
            values["detector"] = None  # its weights are written beside the configuration
        return values


def _without_padding(
    split: list[list[PatchGroup]], placement: PicturePlacement, options: dict
) -> list[list[PatchGroup]]:
    """The groups of images, which own their padding only where that is wanted."""
    if options["own_padding"]:
        return split
    shown = placement.picture_patches(options["patch_size"])
    return [only_patches(groups, shown, options["patch_size"]) for groups in split]


__all__ = ["BackdropImageProcessor"]
