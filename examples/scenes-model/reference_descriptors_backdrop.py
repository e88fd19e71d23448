"""Which references are worth comparing with an image, found without touching their pixels.

A reference's descriptor is the mean colours of a coarse grid of regions. The distance of two descriptors bounds from
below how many patches a full comparison can find changed, so most references are ruled out without one. The bound is
the triangle inequality, |mean(a) - mean(b)| <= mean(|a - b|). Ruling out by a bound that never overestimates loses no
match: the lower-bounding lemma (Faloutsos, Ranganathan and Manolopoulos, "Fast subsequence matching in time-series
databases", 1994).

Beyond `EXHAUSTIVE_LIMIT` references only the nearest descriptors are looked at. They are found by one matrix-vector
product, which is exact and takes some milliseconds for 100,000 references, or, beyond `INDEX_FROM`, by an index
(usearch, optional).
"""

from typing import NamedTuple

import numpy as np

from .patch_groups_backdrop import grid_side

try:
    from usearch.index import Index
except ImportError:
    Index = None

REGIONS_PER_SIDE = 6
EXHAUSTIVE_LIMIT = 4096  # descriptors that are compared one by one in about a millisecond
# Below this number the exact product is as fast as a graph index of equal recall (`backdrop bench matching`).
INDEX_FROM = 262_144
NEAREST = 64  # descriptors that are looked at beyond the limit
# A region whose mean is off by this many grey levels beyond the tolerance is taken to show something else.
CHANGED_LEVELS = 8.0
# A patch that seems to have changed speaks for another background; one that the reference does not own does not.
CHANGED_WEIGHT = 3.0
FIRST_CAPACITY = 16  # descriptors; the arrays double as they fill


class Candidate(NamedTuple):
    """A reference that may match an image.

    Attributes:
        score: the lower, the more likely to match; in patches, weighted.
        min_fresh: lower bound of the patches that are fresh if it matches.
        reference_id: whose.
    """

    score: float
    min_fresh: int
    reference_id: int


class DescriptorTable:
    """Descriptors of one namespace and image side, in arrays without holes. Not thread-safe.

    A descriptor is known by its number, the place in these arrays; removing one renumbers the last.

    Args:
        grid: patches along a side of the image.
        patch_size: pixels.
    """

    def __init__(self, grid: int, patch_size: int):
        self.count = 0
        self._patch_size = patch_size
        regions = len(_region_starts(grid)) ** 2
        self._patches_in_region = _patches_in_region(grid)
        self._means = np.empty((FIRST_CAPACITY, 3, regions), dtype=np.float32)
        self._owned = np.empty((FIRST_CAPACITY, regions), dtype=bool)  # regions owned whole
        self._norms = np.empty(FIRST_CAPACITY, dtype=np.float32)  # squared, of the means
        self._unowned_patches = np.empty(FIRST_CAPACITY, dtype=np.int32)
        self._ids = np.empty(FIRST_CAPACITY, dtype=np.int64)
        self._index = None
        self._numbers: dict[int, int] | None = None  # by reference id, kept along with the index

    @property
    def num_bytes(self) -> int:
        """Bytes of memory as allocated, the index included."""
        index = 0 if self._index is None else self._index.memory_usage
        return index + sum(array.nbytes for array in self._arrays())

    def add(self, reference_id: int, image: np.ndarray, patch_mask: np.ndarray) -> int:
        """Adds the descriptor of a reference; returns its number.

        Args:
            reference_id: whose.
            image: uint8 `[S, S, 3]`, the whole frame.
            patch_mask: bool `[P]`, the patches that the reference owns.
        """
        number = self.count
        if number == len(self._ids):
            self._double()
        means = region_means(image, self._patch_size)
        self._means[number], self._ids[number] = means, reference_id
        self._owned[number] = regions_owned(patch_mask)
        self._norms[number] = np.square(means).sum()
        self._unowned_patches[number] = int((~patch_mask).sum())
        self.count += 1
        if self._index is not None:
            self._index.add(reference_id, means.reshape(-1))
            self._numbers[reference_id] = number
        elif self.count > INDEX_FROM and Index is not None:
            self._build_index()
        return number

    def remove(self, number: int) -> int | None:
        """Removes a descriptor; the last one gets its number.

        Returns:
            The reference id of the one that was the last, None where that is the removed one.
        """
        last = self.count - 1
        removed, moved = int(self._ids[number]), int(self._ids[last])
        for array in self._arrays():
            array[number] = array[last]
        self.count = last
        if self._index is not None:
            self._index.remove(removed)
            del self._numbers[removed]
            if removed != moved:
                self._numbers[moved] = number
        return moved if removed != moved else None

    def candidates(self, image: np.ndarray, tolerance: float) -> list[Candidate]:
        """The references to compare with an image, the most promising first.

        `min_fresh` counts patches that are fresh for certain: those that the reference does not own, and of each region
        that it owns whole as many as must have changed for its mean colour to be off by more than the tolerance. This
        bound is weak: by it alone, other backgrounds with larger masks come first. So the score takes a region whose mean
        is off by `CHANGED_LEVELS` for changed, and counts a changed patch `CHANGED_WEIGHT` times.

        Args:
            image: uint8 `[S, S, 3]`.
            tolerance: the largest staleness that is reused, grey levels.
        """
        query = region_means(image, self._patch_size)
        numbers = self._nearest(query)
        distance = np.abs(self._means[numbers] - query).sum(axis=1)  # [n, regions]
        distance /= 3
        # A region's mean is off by the mean of what its patches changed. None changes by more than 255 levels, so what
        # exceeds the tolerance tells how many changed at least. The 0.01 allows for rounding.
        excess = np.maximum(distance - (tolerance + 1e-2), 0) * self._owned[numbers]
        changed = np.ceil(excess * (self._patches_in_region / max(255 - tolerance, 1)))
        bounds = self._unowned_patches[numbers] + changed.sum(axis=1).astype(np.int32)
        likely = np.maximum(changed, np.minimum(excess / CHANGED_LEVELS, 1) * self._patches_in_region)
        scores = self._unowned_patches[numbers] + CHANGED_WEIGHT * likely.sum(axis=1)
        # Equal scores are ordered by the distance of all regions, each capped: an object in front must not outweigh all.
        closeness = np.minimum(distance, 32.0).sum(axis=1)
        if len(bounds) > NEAREST:
            best = np.argpartition(scores, NEAREST)[:NEAREST]
            order = best[np.lexsort((closeness[best], scores[best]))]
        else:
            order = np.lexsort((closeness, scores))
        ids = self._ids[numbers]
        return [Candidate(float(scores[i]), int(bounds[i]), int(ids[i])) for i in order]

    def _nearest(self, query: np.ndarray) -> np.ndarray | slice:
        """The numbers of the descriptors to look at: all, or the nearest to `query [3, regions]`."""
        if self.count <= EXHAUSTIVE_LIMIT:
            return slice(0, self.count)
        if self._index is not None:
            ids = self._index.search(query.reshape(-1), NEAREST).keys
            return np.array([self._numbers[int(i)] for i in ids if int(i) in self._numbers], dtype=np.int64)
        means = self._means[: self.count].reshape(self.count, -1)
        # Squared Euclidean distance without the query's own norm, which is the same for all.
        distances = self._norms[: self.count] - 2 * (means @ query.reshape(-1))
        return np.argpartition(distances, NEAREST)[:NEAREST]

    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self._means, self._owned, self._norms, self._unowned_patches, self._ids

    def _double(self) -> None:
        doubled = [np.concatenate([array, np.empty_like(array)]) for array in self._arrays()]
        self._means, self._owned, self._norms, self._unowned_patches, self._ids = doubled

    def _build_index(self) -> None:
        # A denser graph and a wider search than the defaults, which miss three of ten among 100,000.
        self._index = Index(
            ndim=self._means[0].size,
            metric="l2sq",
            dtype="f32",
            connectivity=32,
            expansion_add=256,
            expansion_search=256,
        )
        self._index.add(self._ids[: self.count], self._means[: self.count].reshape(self.count, -1))
        self._numbers = {int(i): number for number, i in enumerate(self._ids[: self.count])}


def region_means(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Mean colours of a coarse grid whose regions are whole patches: uint8 `[S, S, 3]` -> float32 `[3, regions]`."""
    grid = image.shape[0] // patch_size
    starts = _region_starts(grid) * patch_size
    inner = image[: grid * patch_size, : grid * patch_size]
    sizes = np.diff([*starts, grid * patch_size])
    if (
        len(set(sizes)) == 1 and sizes[0] <= 257
    ):  # 257 * 255 fits uint16, and equal regions need no slow `reduceat`
        regions, size = len(starts), sizes[0]
        lines = inner.reshape(regions, size, -1).sum(axis=1, dtype=np.uint16)
        sums = lines.reshape(regions, regions, size, 3).sum(axis=2, dtype=np.uint32)  # [R, R, 3]
    else:
        lines = np.add.reduceat(inner.reshape(inner.shape[0], -1), starts, axis=0, dtype=np.uint32)
        sums = np.add.reduceat(lines.reshape(len(starts), -1, 3), starts, axis=1)
    means = (sums / (sizes[:, None] * sizes[None, :])[..., None]).astype(np.float32)
    return np.ascontiguousarray(means.reshape(-1, 3).T)


def regions_owned(patch_mask: np.ndarray) -> np.ndarray:
    """Regions of which every patch is owned: bool `[P]` -> bool `[regions]`."""
    grid = grid_side(patch_mask)
    starts = _region_starts(grid)
    lines = np.logical_and.reduceat(patch_mask.reshape(grid, grid), starts, axis=0)
    return np.logical_and.reduceat(lines, starts, axis=1).reshape(-1)


def _region_starts(grid: int) -> np.ndarray:
    """The first patch of each region along a side."""
    regions = min(grid, REGIONS_PER_SIDE)
    return np.arange(regions) * grid // regions


def _patches_in_region(grid: int) -> np.ndarray:
    """The number of patches in each region, `[regions]`."""
    sizes = np.diff([*_region_starts(grid), grid])
    return (sizes[:, None] * sizes[None, :]).reshape(-1)
