"""How a picture of any size becomes the model's square: padding, resizing and cropping, as LLaVA's processors do."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict

# Beyond this ratio of sides, only the part that the crop keeps is resized: a 1 x 100,000 px image, resized whole,
# would take gigabytes.
EXTREME_ASPECT = 16


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
            pad_colour=tuple(int(value * 255) for value in options["image_mean"])
            if options["do_pad"]
            else (),
        )

    @property
    def name(self) -> str:
        """The steps in a word that travels with saved groups, such as "resize+crop"."""
        steps = (("pad", self.do_pad), ("resize", self.do_resize), ("crop", self.do_center_crop))
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
            picture = pad_to_square(picture, self.pad_colour)
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
        height, width = size.height, size.width
        if size.shortest_edge:
            # Only the shape of the array is looked at.
            shape = np.broadcast_to(np.uint8(0), (3, picture.height, picture.width))
            height, width = get_resize_output_image_size(
                shape,
                size=size.shortest_edge,
                default_to_square=False,
                input_data_format=ChannelDimension.FIRST,
            )
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
