"""Images to patch groups: LLaVA's geometry, a detector's split, or groups taken as they stand."""

import base64
import binascii
import contextlib
import os
import threading
from io import BytesIO
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageType,
    PILImageResampling,
    get_image_type,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import cached_file

from .background_matching_backdrop import BackgroundMatcher
from .detector_backdrop import ObjectDetector
from .patch_groups_backdrop import (
    BACKGROUND,
    METADATA_KEY,
    OBJECT,
    PatchGroup,
    covered_patches,
    grow_patches,
    looks_like_group,
    make_group,
    read_group,
    split_patches,
)

DETECTOR_FILES = ("detector.safetensors", "detector.json")
# Beyond this ratio of sides the whole resized image is never built: a 1 x 100,000 px image would take gigabytes.
EXTREME_ASPECT = 16


class BackdropImagesKwargs(ImagesKwargs, total=False):
    """Options beyond transformers' own.

    patch_size: patch side, pixels.
    split: False gives every ordinary image as one background group of all patches (plain LLaVA).
    detector: name or path of an ultralytics model; None: the weights in the model's own folder.
    detector_device: where the detector runs.
    confidence: smallest confidence of a detection, 0-1.
    classes: class names or ids that count as objects; None: all.
    objects: "all", or "most_confident" for just one object an image.
    margin: patches by which the object region grows.
    overlap: the background keeps the grown ring too.
    min_coverage: share of a patch that objects must cover for it to be an object patch, 0-1 (0: any part).
    background_first: False gives the object group of an image before its background (nothing before an object group's
        end can be reused by the language model).
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


class BackdropImageProcessor(PilBackend):
    """Takes ordinary images and patch groups, in any mix, and returns the groups of all of them in order.

    Output: `pixel_values [G, 3, S, S]` float32, `patch_mask [G, P]` bool, `group_kind [G]` int64 and
    `groups_per_image`, the number of groups that each item became.
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
        self._check_options(
            confidence=self.confidence,
            objects=self.objects,
            margin=self.margin,
            min_coverage=self.min_coverage,
            patch_size=self.patch_size,
        )

    # ---- what is on and off

    @property
    def background_matching(self) -> BackgroundMatcher | None:
        """The matcher, None while it is off."""
        return self._live.matcher

    def enable_background_matching(self, tolerance: float = 0.0, **options) -> BackgroundMatcher:
        """Recognises known backgrounds and substitutes their pixels; see `BackgroundMatcher` for the options."""
        self._live.matcher = BackgroundMatcher(self.patch_size, tolerance, **options)
        return self._live.matcher

    def disable_background_matching(self) -> None:
        """Forgets the references; every image is split by the detector again."""
        self._live.matcher = None

    # ---- preprocessing

    def fetch_images(self, image_url_or_urls):
        """URLs, paths and base64 become PIL images *with* their alpha (transformers' own loader drops it)."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str | os.PathLike):
            return _load_image(os.fspath(image_url_or_urls))
        return super().fetch_images(image_url_or_urls)

    def _preprocess_image_like_inputs(self, images, *args, return_tensors=None, **options) -> BatchFeature:
        self._check_options(**options)
        items = self._prepare_images_structure(images)
        groups_per_item = self.image_groups(items, **options)
        groups = [group for item_groups in groups_per_item for group in item_groups]
        data = {
            "pixel_values": [self._normalized(group.pixels, options) for group in groups],
            "patch_mask": [group.patch_mask for group in groups],
            "group_kind": [group.kind for group in groups],
            "groups_per_image": [len(item_groups) for item_groups in groups_per_item],
        }
        if return_tensors is not None:
            data = {name: np.stack(values) if groups else np.array(values) for name, values in data.items()}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def image_groups(self, images, **options) -> list[list[PatchGroup]]:
        """The groups of each image: a group as it stands, an ordinary image split (and matched, if that is on).

        Args:
            images: a flat list of PIL images, numpy arrays or torch tensors.
            options: any of the processor's own, for this call.
        """
        options = self._with_defaults(options)
        side, patch_size = self._side(options), options["patch_size"]
        result: list[list[PatchGroup] | None] = [None] * len(images)
        ordinary: dict[int, np.ndarray] = {}
        for i, image in enumerate(images):
            image = ImageOps.exif_transpose(image) if isinstance(image, Image.Image) else image
            rgba = _rgba_array(image)
            if rgba is not None and looks_like_group(rgba):
                metadata = image.info.get(METADATA_KEY) if isinstance(image, Image.Image) else None
                result[i] = [read_group(rgba, side, patch_size, self.geometry(options), metadata)]
            else:
                ordinary[i] = self._model_image(image, options)
        for i, groups in zip(ordinary, self._split(list(ordinary.values()), options), strict=True):
            result[i] = groups
        return result

    def model_images(self, images, **options) -> list[np.ndarray]:
        """Ordinary images as the model sees them, uint8 `[S, S, 3]`."""
        options = self._with_defaults(options)
        items = self._prepare_images_structure(images)
        return [
            self._model_image(
                ImageOps.exif_transpose(item) if isinstance(item, Image.Image) else item, options
            )
            for item in items
        ]

    def geometry(self, options: dict | None = None) -> str:
        """How an image of any size becomes S x S, in a word that travels with saved groups."""
        options = self._with_defaults(options or {})
        steps = (
            ("pad", options["do_pad"]),
            ("resize", options["do_resize"]),
            ("crop", options["do_center_crop"]),
        )
        return "+".join(name for name, on in steps if on)

    def detections(self, model_images: list[np.ndarray], **options):
        """What the detector finds in images at the model's geometry, one `Detections` each, after `objects`."""
        options = self._with_defaults(options)
        found = self._detector(options).detect(
            model_images, confidence=options["confidence"], classes=options["classes"]
        )
        return [item.most_confident() if options["objects"] == "most_confident" else item for item in found]

    def split_groups(self, pixels: np.ndarray, mask: np.ndarray, **options) -> list[PatchGroup]:
        """Groups of one image, background first.

        Args:
            pixels: uint8 `[S, S, 3]`.
            mask: bool `[S, S]`, pixels of objects.
        """
        options = self._with_defaults(options)
        patch_size = options["patch_size"]
        patches = covered_patches(mask, patch_size, options["min_coverage"])
        background, objects = split_patches(patches, options["margin"], options["overlap"])
        kinds = ((background, BACKGROUND), (objects, OBJECT))
        return [make_group(pixels, owned, kind, patch_size) for owned, kind in kinds if owned.any()]

    def _split(self, images: list[np.ndarray], options: dict) -> list[list[PatchGroup]]:
        patch_size = options["patch_size"]
        if not options["split"]:
            whole = np.ones((self._side(options) // patch_size) ** 2, dtype=bool)
            return [[make_group(image, whole, BACKGROUND, patch_size)] for image in images]
        matcher = self._live.matcher
        matcher = None if matcher is None or matcher.bypassed else matcher
        if matcher is not None and matcher.patch_size != patch_size:
            raise ValueError(
                f"patch_size is {patch_size}, but matching was enabled for {matcher.patch_size}."
            )
        matches = [matcher.find(image) if matcher else None for image in images]
        always = matcher is not None and matcher.detect == "always"
        to_detect = [i for i, match in enumerate(matches) if match is None or always]
        found = {}
        if to_detect:
            detections = self.detections([images[i] for i in to_detect], **options)
            found = dict(zip(to_detect, detections, strict=True))
        result = []
        for i, image in enumerate(images):
            # An image earlier in this batch may have become the reference of this one.
            match = matches[i] or (matcher.find(image) if matcher and i and i in found else None)
            mask = found[i].combined_mask(image.shape[0]) if i in found else None
            if match is None:
                groups = self.split_groups(image, mask, **options)
                if matcher:
                    owned = {group.kind: group.patch_mask for group in groups}
                    matcher.miss(image, owned.get(BACKGROUND), owned.get(OBJECT))
            else:
                objects = self._object_patches(mask, options) if always else None
                match = matcher.accept(
                    image,
                    match,
                    objects,
                    lambda image=image: self._object_patches(
                        self.detections([image], **options)[0].combined_mask(image.shape[0]), options
                    ),
                )
                reference = match.reference
                groups = [PatchGroup(reference.pixels, reference.patch_mask, BACKGROUND)]
                if match.fresh.any():
                    groups.append(make_group(image, match.fresh, OBJECT, patch_size))
            result.append(groups if options["background_first"] else groups[::-1])
        return result

    def _object_patches(self, mask: np.ndarray, options: dict) -> np.ndarray:
        """Pixels of objects `[S, S]` -> the patches that a split would give to them, `[P]` bool."""
        objects = covered_patches(mask, options["patch_size"], options["min_coverage"])
        return grow_patches(objects, options["margin"])

    def _model_image(self, image, options: dict) -> np.ndarray:
        """Any image as uint8 `[S, S, 3]`, through the same PIL steps as transformers' LLaVA processor."""
        rgb = _rgb_array(image, options.get("input_data_format"))
        array = np.moveaxis(rgb, -1, 0)  # [3, H, W]
        if options["do_pad"]:
            fill = tuple(int(value * 255) for value in options["image_mean"])
            array = _pad_to_square(array, fill)
        side = self._side(options)
        if options["do_resize"]:
            height, width = array.shape[1:]
            extreme = max(height, width) > EXTREME_ASPECT * min(height, width)
            if extreme and options["do_center_crop"] and options["size"].shortest_edge:
                array = self._resized_center(array, options)
            else:
                array = self.resize(array, size=options["size"], resample=options["resample"])
        if options["do_center_crop"]:
            array = self.center_crop(array, options["crop_size"])
        if array.shape != (3, side, side):
            raise ValueError(
                f"The image is {array.shape[2]} x {array.shape[1]} pixels; wanted {side} x {side}."
            )
        return np.ascontiguousarray(np.moveaxis(array, 0, -1))

    def _resized_center(self, array: np.ndarray, options: dict) -> np.ndarray:
        """Resizes just the part of a very long image that the centre crop keeps (with room for the filter)."""
        long_axis = 1 if array.shape[1] > array.shape[2] else 2
        short, long = min(array.shape[1:]), max(array.shape[1:])
        kept = short * (options["crop_size"].height / options["size"].shortest_edge)
        keep = min(long, int(np.ceil(kept)) + 8)
        start = (long - keep) // 2
        part = array.take(range(start, start + keep), axis=long_axis)
        return self.resize(part, size=options["size"], resample=options["resample"])

    def _normalized(self, pixels: np.ndarray, options: dict) -> np.ndarray:
        array = np.moveaxis(pixels, -1, 0)
        if options["do_rescale"]:
            array = self.rescale(array, options["rescale_factor"])
        if options["do_normalize"]:
            array = self.normalize(array, options["image_mean"], options["image_std"])
        return np.ascontiguousarray(array, dtype=np.float32)

    # ---- options

    def _with_defaults(self, options: dict) -> dict:
        if options.get("_complete"):
            return options
        complete = {name: getattr(self, name, None) for name in self._valid_kwargs_names}
        complete.update(
            {name: value for name, value in options.items() if value is not None or name == "classes"}
        )
        complete = self._standardize_kwargs(**complete)
        complete["_complete"] = True
        return complete

    def _side(self, options: dict) -> int:
        """S; the geometry must end in a square of one size."""
        size = options["crop_size"] if options["do_center_crop"] else options["size"]
        if not (size.height and size.height == size.width):
            raise ValueError(
                f"The image processor ends in size {dict(size)}; wanted one fixed square (crop_size, or size with equal "
                "height and width): patch groups need a fixed grid."
            )
        return size.height

    @staticmethod
    def _check_options(confidence, objects, margin, min_coverage, patch_size, **_) -> None:
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

    # ---- detector, saving, loading

    def _detector(self, options: dict) -> ObjectDetector:
        wanted = (options["detector"], options["detector_device"], self._live.folder)
        with self._live.lock:
            if self._live.detector is None or self._live.detector_key != wanted:
                name, device, folder = wanted
                if name is not None:
                    self._live.detector = ObjectDetector.from_name_or_path(name, device=device)
                elif folder is not None:
                    self._live.detector = ObjectDetector.from_folder(folder, device=device)
                else:
                    raise ValueError(
                        "An RGB image must be split, but the processor has no detector: the model's folder holds no "
                        f"{DETECTOR_FILES[0]}. Set `detector` to the name or path of an ultralytics model "
                        "(detector='yolov8n.pt'), pass split=False, or pass patch groups (RGBA)."
                    )
                self._live.detector_key = wanted
            return self._live.detector

    def set_detector(self, detector: ObjectDetector) -> None:
        """Uses this detector, and writes its weights when the processor is saved."""
        with self._live.lock:
            self.detector = None
            self._live.folder = None  # whose weights would be used, and written, again
            self._live.detector = detector
            self._live.detector_key = (None, self.detector_device, None)

    def save_detector(self, folder) -> list[str]:
        """Writes the detector's weights into a folder if they are at hand; the names of the files written."""
        if self.detector is None and self._live.folder is not None:
            if Path(folder).resolve() != Path(self._live.folder).resolve():
                ObjectDetector.copy(self._live.folder, folder)
            return list(DETECTOR_FILES)
        if self.detector is None and self._live.detector is not None:
            return self._live.detector.save(folder)
        if self.detector is not None and Path(self.detector).is_file():
            return ObjectDetector.from_name_or_path(self.detector).save(folder)
        return []

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As transformers', and the detector's weights with it."""
        os.makedirs(save_directory, exist_ok=True)
        self.save_detector(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def find_detector(self, pretrained_model_name_or_path, **hub_kwargs) -> None:
        """Looks for the detector's weights beside the processor's configuration (folder, Hub or its cache)."""
        names = (
            "cache_dir",
            "force_download",
            "proxies",
            "token",
            "revision",
            "local_files_only",
            "subfolder",
        )
        hub_kwargs = {name: hub_kwargs[name] for name in names if hub_kwargs.get(name) is not None}
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
        self._live.folder = None if None in files else str(Path(files[0]).parent)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As transformers'; finds the folder's own detector."""
        hub_kwargs = dict(kwargs)
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        found = processor[0] if isinstance(processor, tuple) else processor
        found.find_detector(pretrained_model_name_or_path, **hub_kwargs)
        return processor

    def to_dict(self) -> dict:
        """The options; never the live detector, references, or a path of this machine."""
        values = super().to_dict()
        values.pop("_live", None)
        if values.get("detector") is not None and Path(values["detector"]).is_file():
            values["detector"] = None  # its weights are written beside the configuration
        return values


class _LiveState:
    """What a processor holds beyond its options. A copied or pickled processor keeps the folder and starts afresh."""

    def __init__(self, folder: str | None = None):
        self.folder = folder
        self.detector: ObjectDetector | None = None
        self.detector_key: tuple | None = None
        self.matcher: BackgroundMatcher | None = None
        self.lock = threading.Lock()

    def __deepcopy__(self, memo) -> "_LiveState":
        return _LiveState(self.folder)

    def __reduce__(self):
        return _LiveState, (self.folder,)


def _load_image(source: str) -> Image.Image:
    """PIL image of a URL, a path or base64 text, its mode and alpha kept."""
    if source.startswith(("http://", "https://")):
        image = _open_url(source)
    elif os.path.isfile(source):
        image = source
    else:
        text = source.split(",", 1)[1] if source.startswith("data:image/") and "," in source else source
        try:
            image = BytesIO(base64.b64decode(text, validate=True))
        except (binascii.Error, ValueError):
            shown = source if len(source) <= 80 else "..." + source[-77:]
            raise ValueError(
                f"Incorrect image source {shown!r}; wanted a URL (http://, https://), the path of an image file, or base64."
            ) from None
    try:
        opened = Image.open(image)
        opened.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        shown = source if len(source) <= 80 else "..." + source[-77:]
        raise ValueError(f"The image {shown!r} cannot be read: {error}") from error
    return opened


def _open_url(url: str) -> BytesIO:
    try:
        with contextlib.closing(
            urlopen(Request(url, headers={"User-Agent": "backdrop"}), timeout=30)
        ) as answer:
            return BytesIO(answer.read())
    except OSError as error:
        raise ValueError(f"The image {url!r} cannot be fetched: {error}") from error


def _rgba_array(image) -> np.ndarray | None:
    """uint8 `[H, W, 4]` of an image that has four 8-bit channels, else None."""
    if isinstance(image, Image.Image):
        return np.asarray(image) if image.mode == "RGBA" else None
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3:
        return None
    if array.shape[-1] == 4:
        return array
    return np.moveaxis(array, 0, -1) if array.shape[0] == 4 else None


def _rgb_array(image, input_data_format=None) -> np.ndarray:
    """Any image as uint8 `[H, W, 3]`: transparency on white, 16-bit grey scaled, float arrays (0-1 or 0-255) rounded."""
    if not isinstance(image, Image.Image):
        image = _array_to_image(image, input_data_format)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    elif image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max(initial=0)))
        image = Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def _array_to_image(image, input_data_format=None) -> Image.Image:
    if get_image_type(image) == ImageType.TORCH:
        image = image.detach().cpu().numpy()
    array = np.asarray(image)
    if array.ndim not in (2, 3):
        raise ValueError(f"An image array has shape {array.shape}; wanted [H, W], [H, W, C] or [C, H, W].")
    if array.ndim == 3 and not {array.shape[0], array.shape[-1]} & {1, 3, 4}:
        raise ValueError(f"An image array has shape {array.shape}; wanted 1, 3 or 4 channels, first or last.")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype != np.uint8:
        if not np.isfinite(array).all():
            raise ValueError("An image array has values that are not finite; wanted 0 to 1, or 0 to 255.")
        low, high = array.min(), array.max()
        if low < 0 or high > 255:
            raise ValueError(
                f"An image array has values from {low:g} to {high:g}; wanted 0 to 1, or 0 to 255."
            )
        unit = np.issubdtype(array.dtype, np.floating) and high <= 1
        array = np.round(array * (255 if unit else 1)).astype(np.uint8)
    if array.ndim == 2:
        return Image.fromarray(array)
    # As transformers: where both ends could be channels, the first is taken.
    first = (
        array.shape[0] in (1, 3, 4)
        if input_data_format is None
        else input_data_format == ChannelDimension.FIRST
    )
    array = np.moveaxis(array, 0, -1) if first else array
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array))


def _pad_to_square(array: np.ndarray, fill: tuple[int, ...]) -> np.ndarray:
    """`[3, H, W]` -> `[3, M, M]`, M the longer side, the image in the middle (as LLaVA's `expand2square`)."""
    _, height, width = array.shape
    side = max(height, width)
    square = np.empty((3, side, side), dtype=array.dtype)
    square[:] = np.array(fill, dtype=array.dtype)[:, None, None]
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = array
    return square


__all__ = ["BackdropImageProcessor"]
