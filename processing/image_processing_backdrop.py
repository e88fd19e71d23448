"""The image processor: images of any kind to patch groups, split by a detector or taken as they stand."""

import copy
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from .background_matching_backdrop import BackgroundMatcher
from .detections_backdrop import Detections
from .detector_backdrop import ObjectDetector
from .detector_source_backdrop import DetectorSource
from .image_geometry_backdrop import ImageGeometry
from .image_loading_backdrop import load_image, rgb_picture, rgba_array, upright
from .image_options_backdrop import BackdropImagesKwargs, check_options
from .image_splitting_backdrop import ImageSplitter, whole_image_group
from .matching_presets_backdrop import matching_options
from .patch_groups_backdrop import METADATA_KEY, PatchGroup, looks_like_group, read_group
from .pixel_values_backdrop import pixel_values

MAX_THREADS = 4  # that prepare the images of one call


class BackdropImageProcessor(PilBackend):
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
        super().__init__(**kwargs)
        self._live = _LiveState()
        check_options(
            confidence=self.confidence,
            objects=self.objects,
            margin=self.margin,
            min_coverage=self.min_coverage,
            patch_size=self.patch_size,
        )

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
        options = self._with_defaults(options)
        geometry = ImageGeometry.from_options(options)
        images = self._prepare_images_structure(images)
        return [self._model_image(upright(image), geometry, options) for image in images]

    def _model_image(self, image, geometry: ImageGeometry, options: dict) -> np.ndarray:
        return geometry.apply(rgb_picture(image, options.get("input_data_format")), self)

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
        check_options(**options)
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
        prepared = self._prepared(images, options)
        split = iter(self._split([image for image in prepared if isinstance(image, np.ndarray)], options))
        return [next(split) if isinstance(image, np.ndarray) else [image] for image in prepared]

    def _prepared(self, images, options: dict) -> list[PatchGroup | np.ndarray]:
        """Each image as the group that it is, or as the model sees it, uint8 `[S, S, 3]`."""
        geometry, patch_size = ImageGeometry.from_options(options), options["patch_size"]

        def prepare(image) -> PatchGroup | np.ndarray:
            image = upright(image)
            rgba = rgba_array(image)
            if rgba is None or not looks_like_group(rgba):
                return self._model_image(image, geometry, options)
            metadata = image.info.get(METADATA_KEY) if isinstance(image, Image.Image) else None
            return read_group(rgba, geometry.side, patch_size, geometry.name, metadata)

        if len(images) < 2:
            return [prepare(image) for image in images]
        with ThreadPoolExecutor(
            min(MAX_THREADS, len(images))
        ) as pool:  # PIL resizes without the interpreter's lock
            return list(pool.map(prepare, images))

    def detections(self, model_images: list[np.ndarray], **options) -> list[Detections]:
        """What the detector finds, after `confidence`, `classes` and `objects`.

        Args:
            model_images: uint8 `[S, S, 3]` each, see `model_images`.
            options: any of the processor's own, for this call.
        """
        return self._detections(model_images, self._with_defaults(options))

    def split_groups(self, pixels: np.ndarray, mask: np.ndarray, **options) -> list[PatchGroup]:
        """The groups of one image, background first.

        Args:
            pixels: uint8 `[S, S, 3]`.
            mask: bool `[S, S]`, pixels of objects.
            options: any of the processor's own, for this call.
        """
        return self._splitter(self._with_defaults(options)).split_by_mask(pixels, mask)

    def _split(self, images: list[np.ndarray], options: dict) -> list[list[PatchGroup]]:
        if not options["split"]:
            return [[whole_image_group(image, options["patch_size"])] for image in images]
        splitter, matcher = self._splitter(options), self._live.matcher
        if matcher is None or matcher.bypassed:
            split = splitter.split(images)
        else:
            split = splitter.split_matched(images, matcher)
        if options["background_first"]:
            return split
        return [sorted(groups, key=lambda group: -group.kind) for groups in split]

    def _splitter(self, options: dict) -> ImageSplitter:
        def find_objects(images) -> list[np.ndarray]:
            found = self._detections(images, options)
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

    def _detections(self, images, options: dict) -> list[Detections]:
        detector = self._live.detectors.load(options["detector"], options["detector_device"])
        found = detector.detect(images, confidence=options["confidence"], classes=options["classes"])
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
        twin._live = _LiveState(self._live.detectors.twin())
        return twin

    # ---- options

    def _with_defaults(self, options: dict) -> dict:
        """All options of one call, in transformers' standard form; what is None there is the processor's own."""
        complete = {name: getattr(self, name, None) for name in self._valid_kwargs_names}
        complete.update(
            {name: value for name, value in options.items() if value is not None or name == "classes"}
        )
        return self._standardize_kwargs(**complete)

    # ---- detector

    def load_detector(self, **options) -> ObjectDetector:
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
    def loaded_detector(self) -> ObjectDetector | None:
        """The detector in memory, None before one was needed."""
        return self._live.detectors.loaded

    @property
    def has_detector(self) -> bool:
        """Whether ordinary images can be split: a detector is named, saved in the model's folder, or in memory."""
        detectors = self._live.detectors
        return self.detector is not None or detectors.folder is not None or detectors.loaded is not None

    def set_detector(self, detector: ObjectDetector) -> None:
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

    # ---- saving and loading

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As transformers', and the detector's weights with it."""
        os.makedirs(save_directory, exist_ok=True)
        self.save_detector(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As transformers'; finds the folder's own detector."""
        hub_kwargs = dict(kwargs)
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        found = processor[0] if isinstance(processor, tuple) else processor
        found.find_detector(pretrained_model_name_or_path, **hub_kwargs)
        return processor

    def to_dict(self) -> dict:
        """The options; never the detector in memory, references, or a path of this machine."""
        values = super().to_dict()
        values.pop("_live", None)
        if values.get("detector") is not None and Path(values["detector"]).is_file():
            values["detector"] = None  # its weights are written beside the configuration
        return values


class _LiveState:
    """What a processor holds beyond its options.

    A copied or pickled processor keeps the folder of its detector and starts with nothing in memory: transformers copies
    every attribute of a processor to print or save it.
    """

    def __init__(self, detectors: DetectorSource | None = None):
        self.detectors = DetectorSource() if detectors is None else detectors
        self.matcher: BackgroundMatcher | None = None

    def __deepcopy__(self, copied) -> "_LiveState":
        return _LiveState(DetectorSource(self.detectors.folder))

    def __reduce__(self):
        return _live_state_of_folder, (self.detectors.folder,)


def _live_state_of_folder(folder: str | None) -> _LiveState:
    return _LiveState(DetectorSource(folder))


__all__ = ["BackdropImageProcessor"]
