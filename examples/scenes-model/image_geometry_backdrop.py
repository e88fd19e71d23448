"""How a picture of any size becomes the model's square: padding, resizing and cropping, as LLaVA's processors do."""

from dataclasses import dataclass

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict

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

    def apply(self, rgb: np.ndarray, backend: PilBackend) -> np.ndarray:
        """The picture as the model sees it.

        Args:
            rgb: uint8 `[H, W, 3]`.
            backend: whose `resize` and `center_crop` are used, so that the pixels equal transformers' LLaVA processor's.

        Returns:
            uint8 `[S, S, 3]`, contiguous.

        Raises:
            ValueError: a picture that no step resizes has another size.
        """
        array = np.moveaxis(rgb, -1, 0)  # [3, H, W]
        if self.do_pad:
            array = pad_to_square(array, self.pad_colour)
        side = self.side
        if self.do_resize:
            height, width = array.shape[1:]
            extreme = max(height, width) > EXTREME_ASPECT * min(height, width)
            if extreme and self.do_center_crop and self.size.shortest_edge:
                array = self._resized_centre(array, backend)
            else:
                array = backend.resize(array, size=self.size, resample=self.resample)
        if self.do_center_crop:
            array = backend.center_crop(array, self.crop_size)
        if array.shape != (3, side, side):
            raise ValueError(
                f"The image is {array.shape[2]} x {array.shape[1]} pixels; wanted {side} x {side}."
            )
        return np.ascontiguousarray(np.moveaxis(array, 0, -1))

    def _resized_centre(self, array: np.ndarray, backend: PilBackend) -> np.ndarray:
        """Resizes just the part of a very long picture that the centre crop keeps.

        Some pixels more are taken, since the resampling filter reads beyond the crop's edge.
        """
        long_axis = 1 if array.shape[1] > array.shape[2] else 2
        short, long = min(array.shape[1:]), max(array.shape[1:])
        kept = short * (self.crop_size.height / self.size.shortest_edge)
        keep = min(long, int(np.ceil(kept)) + 8)
        start = (long - keep) // 2
        part = array.take(range(start, start + keep), axis=long_axis)
        return backend.resize(part, size=self.size, resample=self.resample)


def pad_to_square(array: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """`[3, H, W]` -> `[3, M, M]`, M the longer side, the picture in the middle (LLaVA's `expand2square`)."""
    _, height, width = array.shape
    side = max(height, width)
    square = np.empty((3, side, side), dtype=array.dtype)
    square[:] = np.array(colour, dtype=array.dtype)[:, None, None]
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = array
    return square
