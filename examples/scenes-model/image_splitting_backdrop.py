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
    """

    patch_size: int
    margin: int
    overlap: bool
    min_coverage: float
    find_objects: Callable[[Sequence[np.ndarray]], list[np.ndarray]]

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

        The detector runs once over the images that match nothing (with `detect="always"` over all), and once more where
        the matcher is about to improve a reference.

        Raises:
            ValueError: the matcher was made for another patch size.
        """
        if matcher.patch_size != self.patch_size:
            raise ValueError(
                f"patch_size is {self.patch_size}, but matching was enabled for {matcher.patch_size}."
            )
        matches = [matcher.find(image) for image in images]
        always = matcher.detect == "always"
        to_detect = [i for i, match in enumerate(matches) if match is None or always]
        masks = {}
        if to_detect:
            masks = dict(zip(to_detect, self.find_objects([images[i] for i in to_detect]), strict=True))
        result = []
        for i, image in enumerate(images):
            match = matches[i]
            if (
                match is None and i > 0
            ):  # an earlier image of this batch may have become a reference that matches
                match = matcher.find(image)
            if match is None:
                result.append(self._split_missed(image, masks[i], matcher))
            else:
                objects = self.object_patches(masks[i]) if always else None
                result.append(self._split_known(image, match, objects, matcher))
        return result

    def _split_missed(
        self, image: np.ndarray, mask: np.ndarray, matcher: BackgroundMatcher
    ) -> list[PatchGroup]:
        groups = self.split_by_mask(image, mask)
        owned = {group.kind: group.patch_mask for group in groups}
        matcher.miss(image, owned.get(BACKGROUND), owned.get(OBJECT))
        return groups

    def _split_known(
        self, image: np.ndarray, match: Match, objects: np.ndarray | None, matcher: BackgroundMatcher
    ) -> list[PatchGroup]:
        def find_objects() -> np.ndarray:
            return self.object_patches(self.find_objects([image])[0])

        match = matcher.accept(image, match, objects, find_objects)
        reference = match.reference
        groups = [PatchGroup(reference.pixels, reference.patch_mask, BACKGROUND)]
        if match.fresh.any():
            groups.append(make_group(image, match.fresh, OBJECT, self.patch_size))
        return groups
