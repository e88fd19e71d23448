"""How a picture of any size becomes the model's square: padding, resizing and cropping, as LLaVA's processors do."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict

from .picture_placement_backdrop import PicturePlacement

# What becomes of a picture that is not square: its sides are cut off, it gets bars, or it is distorted.
FITS = ("crop", "pad", "stretch")
# The options of an image processor that `fit` stands for.
FIT_STEPS = ("do_pad", "do_resize", "size", "do_center_crop", "crop_size")
# Beyond this ratio of sides, only the part that the crop keeps is resized: a 1 x 100,000 px image, resized whole,
# would take gigabytes.
EXTREME_ASPECT = 16
LARGE_SQUARE = (
    8192  # pixels; padded to a larger square than this, a very long picture is resized in two steps
)


@dataclass(frozen=True)
class ImageGeometry:
    """The steps from an RGB picture to `S x S` pixels: pad to a square, resize, crop the centre; each may be off.

    Attributes:
        do_pad: pads the shorter side, half on each end, as the original LLaVA does.
        do_resize, size, resample: as in transformers' image processors.
        do_center_crop, crop_size: as in transformers' image processors.
        pad_colour: RGB grey levels 0-255 of the padding; () without it.
    """

    do_pad: bool
    do_resize: bool
    size: SizeDict
    resample: PILImageResampling | int
    do_center_crop: bool
    crop_size: SizeDict
    pad_colour: tuple[int, ...]

    @classmethod
    def from_options(cls, options: dict) -> "ImageGeometry":
        """The geometry that a complete set of an image processor's options describes."""
        return cls(
            do_pad=options["do_pad"],
            do_resize=options["do_resize"],
            size=options["size"],
            resample=options["resample"],
            do_center_crop=options["do_center_crop"],
            crop_size=options["crop_size"],
            pad_colour=_pad_colour(options["image_mean"]) if options["do_pad"] else (),
        )

    @property
    def fit(self) -> str:
        """What becomes of a picture that is not square, one of `FITS`."""
        if self.do_pad:
            return "pad"
        fixed = self.do_resize and self.size.height and self.size.width and not self.size.shortest_edge
        return "stretch" if fixed or not self.do_center_crop else "crop"

    def fitted(self, fit: str) -> "ImageGeometry":
        """The same steps for a square picture, with another `fit` for the others; the pad colour stays to be chosen.

        Raises:
            ValueError: `fit` is none of `FITS`, or the steps do not resize to one fixed size.
        """
        if fit not in FITS:
            raise ValueError(f"fit is {fit!r}; wanted one of {', '.join(FITS)}.")
        if fit == self.fit:
            return self
        resized = self.size.shortest_edge or (self.size.height == self.size.width and self.size.height)
        if not self.do_resize or not resized:
            raise ValueError(
                f"fit is {fit!r}, but the image processor has do_resize {self.do_resize} and size {dict(self.size)}; wanted "
                "images resized to one fixed size."
            )
        if fit == "pad":
            return replace(self, do_pad=True)
        square = SizeDict(height=self.side, width=self.side)
        if fit == "stretch":
            size = SizeDict(height=resized, width=resized)
            return replace(self, do_pad=False, size=size, pad_colour=())
        size = SizeDict(shortest_edge=resized)
        return replace(self, do_pad=False, size=size, do_center_crop=True, crop_size=square, pad_colour=())

    @property
    def name(self) -> str:
        """The steps in a word that travels with saved groups, such as "resize+crop"; each `fit` has words of its own."""
        # A plain "resize" distorts anyway.
        resize = "stretch" if self.fit == "stretch" and self.do_center_crop else "resize"
        steps = (("pad", self.do_pad), (resize, self.do_resize), ("crop", self.do_center_crop))
        return "+".join(name for name, on in steps if on)

    @property
    def side(self) -> int:
        """`S`, the side of the result in pixels.

        Raises:
            ValueError: the steps do not end in a square of one fixed size.
        """
        size = self.crop_size if self.do_center_crop else self.size
        if not (size.height and size.height == size.width):
            raise ValueError(
                f"The image processor ends in size {dict(size)}; wanted one fixed square (crop_size, or size with equal "
                "height and width): patch groups need a fixed grid."
            )
        return size.height

    def apply(self, picture: Image.Image, backend: PilBackend) -> np.ndarray:
        """The picture as the model sees it; the pixels equal those of transformers' LLaVA processor.

        Args:
            picture: in mode RGB.
            backend: whose `resize` is used for sizes of rarer forms, and whose `center_crop`.

        Returns:
            uint8 `[S, S, 3]`, contiguous.

        Raises:
            ValueError: a picture that no step resizes has another size.
        """
        if self.do_pad:
            picture = self._padded(picture)
        side = self.side
        if self.do_resize:
            width, height = picture.size
            extreme = max(height, width) > EXTREME_ASPECT * min(height, width)
            if extreme and self.do_center_crop and self.size.shortest_edge:
                picture = self._cropped_for_resize(picture)
            array = self._resized(picture, backend)
        else:
            array = np.asarray(picture)
        if self.do_center_crop:
            channels_first = backend.center_crop(np.moveaxis(array, -1, 0), self.crop_size)
            array = np.moveaxis(channels_first, 0, -1)
        if array.shape != (side, side, 3):
            raise ValueError(
                f"The image is {array.shape[1]} x {array.shape[0]} pixels; wanted {side} x {side}."
            )
        return np.ascontiguousarray(array)

    def place(self, width: int, height: int, backend: PilBackend) -> PicturePlacement:
        """Where a picture of some size lies in the square that `apply` makes of it.

        Args:
            width, height: of the picture, pixels.
            backend: as in `apply`.
        """
        side = self.side
        padded = (max(width, height),) * 2 if self.do_pad else (width, height)
        resized = self._resized_size(*padded, backend) if self.do_resize else padded
        edges = []
        for length, whole, result in zip((width, height), padded, resized, strict=True):
            scale = Fraction(result, whole)
            # The offsets are whole pixels, rounded as in `pad_to_square` and transformers' `center_crop`.
            cut = (result - side) // 2 if self.do_center_crop else 0
            start = (whole - length) // 2 * scale - cut
            edges.append((start, start + length * scale))
        (left, right), (top, bottom) = edges
        return PicturePlacement(width, height, side, left, top, right, bottom)

    def _padded(self, picture: Image.Image) -> Image.Image:
        """The picture padded to a square; of a very long one first what is left of its longer side is resized.

        transformers' square of a picture of 1 x 100,000 px would take 30 GB.
        """
        width, height = picture.size
        edge = self.size.shortest_edge or (self.size.height == self.size.width and self.size.height)
        if (
            not (self.do_resize and edge)
            or max(width, height) <= max(LARGE_SQUARE, edge)
            or max(width, height) <= EXTREME_ASPECT * min(width, height)
        ):
            return pad_to_square(picture, self.pad_colour)
        # Padding is the same along the longer side, and PIL resizes one axis after the other.
        side = max(width, height)
        if width > height:
            band = Image.new("RGB", (edge, side), self.pad_colour)
            band.paste(picture.resize((edge, height), resample=self.resample), (0, (side - height) // 2))
        else:
            band = Image.new("RGB", (side, edge), self.pad_colour)
            band.paste(picture.resize((width, edge), resample=self.resample), ((side - width) // 2, 0))
        return band.resize((edge, edge), resample=self.resample)

    def _resized_size(self, width: int, height: int, backend: PilBackend) -> tuple[int, int]:
        """Width and height of what `_resized` makes of a picture of some size."""
        size = self.size
        if any((size.longest_edge, size.max_height, size.max_width)) or not (
            size.shortest_edge or (size.height and size.width)
        ):
            shape = backend.resize(np.zeros((3, height, width), dtype=np.uint8), size=size, resample=0).shape
            return shape[2], shape[1]
        if not size.shortest_edge:
            return size.width, size.height
        # Only the shape of the array is looked at.
        shape = np.broadcast_to(np.uint8(0), (3, height, width))
        resized = get_resize_output_image_size(
            shape, size=size.shortest_edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
        )
        return resized[1], resized[0]

    def _resized(self, picture: Image.Image, backend: PilBackend) -> np.ndarray:
        """Uint8 `[H, W, 3]`, as `backend.resize` would make it; the common sizes without its copies of the picture."""
        size, resample = self.size, self.resample
        edges = (size.longest_edge, size.max_height, size.max_width)
        if (
            any(edges)
            or not isinstance(resample, int)
            or not (size.shortest_edge or (size.height and size.width))
        ):
            array = np.moveaxis(np.asarray(picture), -1, 0)
            return np.moveaxis(backend.resize(array, size=size, resample=resample), 0, -1)
        width, height = self._resized_size(*picture.size, backend)
        return np.asarray(picture.resize((width, height), resample=resample))

    def _cropped_for_resize(self, picture: Image.Image) -> Image.Image:
        """The part of a very long picture that the centre crop keeps once it is resized.

        Some pixels more are taken, since the resampling filter reads beyond the crop's edge.
        """
        width, height = picture.size
        short, long = min(height, width), max(height, width)
        kept = short * (self.crop_size.height / self.size.shortest_edge)
        keep = min(long, int(np.ceil(kept)) + 8)
        start = (long - keep) // 2
        if height > width:
            return picture.crop((0, start, width, start + keep))
        return picture.crop((start, 0, start + keep, height))


def pad_to_square(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """A square of the longer side with the picture in its middle (LLaVA's `expand2square`)."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def settle_fit(options: dict, asked: Collection[str]) -> dict:
    """What must change in a complete set of options so that `fit` and the steps that it stands for agree.

    `fit` decides where it is asked for; else it follows from the steps.

    Args:
        options: a complete set of an image processor's options, in transformers' standard form.
        asked: the names of those that were given just now; the others are a saved processor's or defaults.

    Raises:
        ValueError: `fit` is none of `FITS`, does not go with a step that is asked for too, or is not possible with these
            steps.
    """
    geometry = ImageGeometry.from_options(options)
    if "fit" not in asked or options.get("fit") is None:
        return {"fit": geometry.fit}
    fit = options["fit"]
    fitted = geometry.fitted(fit)
    changes = {name: getattr(fitted, name) for name in FIT_STEPS}
    for name in ("do_pad", "do_center_crop"):
        if name in asked and changes[name] != options[name]:
            raise ValueError(
                f"fit is {fit!r} and {name} is {options[name]}; wanted {name} {changes[name]}, or only one of the two."
            )
    return changes


def _pad_colour(mean: float | tuple[float, ...] | None) -> tuple[int, ...]:
    """The colour that LLaVA pads with: the mean that normalising subtracts, so that padding becomes nearly 0."""
    if mean is None:
        return (0, 0, 0)
    values = (mean,) * 3 if isinstance(mean, int | float) else mean
    return tuple(int(value * 255) for value in values)
