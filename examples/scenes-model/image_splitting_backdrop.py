"""An image at the model's geometry to its patch groups: by the mask of its objects, or by a background that matches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .background_matching_backdrop import BackgroundMatcher
from .matches_backdrop import Match
from .patch_groups_backdrop import (
    BACKGROUND,
    OBJECT,
    PatchGroup,
    covered_patches,
    grow_patches,
    make_group,
    split_patches,
)


def whole_image_group(pixels: np.ndarray, patch_size: int) -> PatchGroup:
    """One background group that owns every patch of uint8 `[S, S, 3]`: the image as plain LLaVA takes it."""
    patches = (pixels.shape[0] // patch_size) ** 2
    return make_group(pixels, np.ones(patches, dtype=bool), BACKGROUND, patch_size)


@dataclass(frozen=True)
class ImageSplitter:
    """Splits images, uint8 `[S, S, 3]`, into a background group and an object group each, background first.

    Attributes:
        patch_size: pixels.
        margin: patches by which the object region grows.
        overlap: the background keeps the grown ring too.
        min_coverage: share of a patch that objects must cover for it to be an object patch, 0-1 (0: any part).
        find_objects: the detector: images `[S, S, 3]` to one mask each of the pixels of objects, bool `[S, S]`.
        finds_anything: False where the detector is a stand-in that never finds objects: the matcher then does not ask it.
    """

    patch_size: int
    margin: int
    overlap: bool
    min_coverage: float
    find_objects: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    finds_anything: bool = True

    def object_patches(self, mask: np.ndarray) -> np.ndarray:
        """Pixels of objects, bool `[S, S]`, to the patches that a split gives to the object group, bool `[P]`."""
        return grow_patches(covered_patches(mask, self.patch_size, self.min_coverage), self.margin)

    def split_by_mask(self, image: np.ndarray, mask: np.ndarray) -> list[PatchGroup]:
        """One or two groups of one image.

        Args:
            image: uint8 `[S, S, 3]`.
            mask: bool `[S, S]`, pixels of objects.
        """
        patches = covered_patches(mask, self.patch_size, self.min_coverage)
        background, objects = split_patches(patches, self.margin, self.overlap)
        kinds = ((background, BACKGROUND), (objects, OBJECT))
        return [make_group(image, owned, kind, self.patch_size) for owned, kind in kinds if owned.any()]

    def split(self, images: Sequence[np.ndarray]) -> list[list[PatchGroup]]:
        """The groups of each image, by what the detector finds in it."""
        if not images:
            return []
        masks = self.find_objects(images)
        return [self.split_by_mask(image, mask) for image, mask in zip(images, masks, strict=True)]

    def split_matched(
        self, images: Sequence[np.ndarray], matcher: BackgroundMatcher
    ) -> list[list[PatchGroup]]:
        """The groups of each image: on a match the reference's pixels stand for the background.

        The detector runs once over the images that match nothing (with `detect="always"` over all), and once more for an
        image where the matcher is about to make a layer anew or has no other explanation of a change.

        Raises:
            ValueError: the matcher was made for another patch size.
        """
        if matcher.patch_size != self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size}, but matching was enabled for {matcher.patch_size}."
            )
        matches = [matcher.find(image) for image in images]
        always = matcher.detect == "always"
        looks = [_Detection(self, image) for image in images]
        to_detect = [i for i, match in enumerate(matches) if match is None or always]
        if to_detect:
            masks = self.find_objects([images[i] for i in to_detect])
            for i, mask in zip(to_detect, masks, strict=True):
                looks[i].take(mask)
        result = []
        for i, image in enumerate(images):
            match = matches[i]
            if (
                match is None and i > 0
            ):  # an earlier image of this batch may have become a reference that matches
                match = matcher.find(image)
            if match is not None:
                objects = looks[i].object_patches() if always else None
                find_objects = looks[i].object_patches if self.finds_anything else None
                match = matcher.accept(image, match, objects, find_objects)
            result.append(
                self._split_missed(image, looks[i], matcher) if match is None else self._split_known(match)
            )
        return result

    def _split_missed(
        self, image: np.ndarray, look: "_Detection", matcher: BackgroundMatcher
    ) -> list[PatchGroup]:
        groups = self.split_by_mask(image, look.mask())
        owned = {group.kind: group.patch_mask for group in groups}
        matcher.miss(image, owned.get(BACKGROUND), owned.get(OBJECT), look.runs)
        return groups

    def _split_known(self, match: Match) -> list[PatchGroup]:
        groups = [PatchGroup(layer.pixels, layer.patch_mask, BACKGROUND) for layer in match.reference.layers]
        if match.fresh.any():
            groups.append(make_group(match.frame, match.fresh, OBJECT, self.patch_size))
        return groups


class _Detection:
    """What the detector finds in one image; it runs once at most."""

    def __init__(self, splitter: ImageSplitter, image: np.ndarray):
        self._splitter, self._image = splitter, image
        self._mask: np.ndarray | None = None
        self.runs = 0

    def take(self, mask: np.ndarray) -> None:
        """Notes what a run over several images found in this one, bool `[S, S]`."""
        self._mask, self.runs = mask, int(self._splitter.finds_anything)

    def mask(self) -> np.ndarray:
        """Pixels of objects, bool `[S, S]`."""
        mask = self._mask
        if mask is None:
            mask = self._splitter.find_objects([self._image])[0]
            self.take(mask)
        return mask

    def object_patches(self) -> np.ndarray:
        """The patches that a split gives to the object group, bool `[P]`."""
        return self._splitter.object_patches(self.mask())
