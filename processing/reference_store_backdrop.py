"""Where references of known backgrounds are kept, and which of them are worth comparing with an image.

Pixels lie in slots of files that are mapped and have no name (nothing to clean up); in memory there is one descriptor
a reference: the mean colours of a coarse grid of regions. A descriptor bounds from below how many patches a full
comparison can find changed, so most references are ruled out without touching their pixels. Beyond
`EXHAUSTIVE_LIMIT` references of one namespace that bound is taken of the nearest descriptors only: by one
matrix-vector product, exact and milliseconds for 100,000, or, beyond `INDEX_FROM`, by an index (usearch, optional).

Not thread-safe: the matcher holds its lock around every call.
"""

import os
import tempfile
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np
from transformers.utils import logging

from .patch_groups_backdrop import grid_side, pixel_mask

try:
    from usearch.index import Index
except ImportError:
    Index = None

logger = logging.get_logger(__name__)

REGIONS_PER_SIDE = 6
EXHAUSTIVE_LIMIT = 4096  # descriptors that are compared one by one in about a millisecond
INDEX_FROM = (
    262_144  # below, the exact product is as fast as a graph index of equal recall (benchmarks/matching.py)
)
PROPOSALS = 64  # nearest descriptors that are looked at beyond the limit
CHANGED = 8.0  # grey levels beyond the tolerance by which a region's mean tells that it shows something else
UNLIKE = 3.0  # a changed patch tells of another background, one that is not owned does not
FIRST_CHUNK = 16  # slots; every further chunk doubles what there is


@dataclass(frozen=True, eq=False)
class Reference:
    """A background seen before.

    Attributes:
        pixels: uint8 `[S, S, 3]`, 0 outside the owned patches.
        patch_mask: bool `[P]`, the patches it owns.
        reference_id: unique in its matcher, never given twice.
    """

    pixels: np.ndarray
    patch_mask: np.ndarray
    reference_id: int


@dataclass(frozen=True)
class _Entry:
    shelf: tuple[str, int]  # namespace and S
    row: int  # in the shelf's arrays
    slot: int  # in the shelf's file
    created: float  # seconds, monotonic


class ReferenceStore:
    """References by namespace and image side, at most `max_references` in all.

    What gives way is the least recently used of the namespace that has most: a busy one does not empty the others.

    Args:
        patch_size: pixels.
        max_references: over all namespaces.
        ttl: seconds after which a reference is forgotten, None: never.
        folder: where the mapped files live, None: the system's temporary folder.
    """

    def __init__(
        self, patch_size: int, max_references: int, ttl: float | None = None, folder: str | None = None
    ):
        self.patch_size = patch_size
        self.max_references = max_references
        self.ttl = ttl
        self.folder = folder
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # least recently used first
        self._born: OrderedDict[int, float] = OrderedDict()  # oldest first
        self._counts: Counter[str] = Counter()  # by namespace
        self._shelves: dict[tuple[str, int], _Shelf] = {}
        self._files: dict[int, _SlotFile] = {}  # by S
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, reference_id: int) -> bool:
        return reference_id in self._entries

    def add(self, namespace: str, image: np.ndarray, patch_mask: np.ndarray) -> Reference | None:
        """Keeps a background, or None where no room can be had for it (a full disk).

        Args:
            image: uint8 `[S, S, 3]`, the whole frame; only its owned patches are kept.
            patch_mask: bool `[P]`.
        """
        side = image.shape[0]
        while len(self._entries) >= self.max_references:
            self._give_way(namespace)
        file = self._files.setdefault(side, _SlotFile(side, len(patch_mask), self.folder))
        slot = self._free_slot(file, namespace)
        if slot is None:
            return None
        owned = pixel_mask(patch_mask, side, self.patch_size)
        pixels = np.where(owned[..., None], image, np.uint8(0))
        file.write(slot, pixels, patch_mask)
        shelf = self._shelves.setdefault((namespace, side), _Shelf(grid_side(patch_mask)))
        reference_id = self._next_id
        self._next_id += 1
        row = shelf.add(
            reference_id, region_means(image, self.patch_size), region_owned(patch_mask), patch_mask
        )
        created = time.monotonic()
        self._entries[reference_id] = _Entry((namespace, side), row, slot, created)
        self._born[reference_id] = created
        self._counts[namespace] += 1
        return _frozen(Reference(pixels, patch_mask.copy(), reference_id))

    def of_namespace(self, namespace: str) -> list[int]:
        """The ids of a namespace's references."""
        return [i for i, entry in self._entries.items() if entry.shelf[0] == namespace]

    def remove(self, reference_id: int) -> None:
        """Forgets one reference."""
        entry = self._entries.pop(reference_id)
        del self._born[reference_id]
        self._counts[entry.shelf[0]] -= 1
        if not self._counts[entry.shelf[0]]:
            del self._counts[entry.shelf[0]]
        shelf = self._shelves[entry.shelf]
        moved = shelf.remove(entry.row)
        if moved is not None:  # the last row took the place of the removed one
            other = self._entries[moved]
            self._entries[moved] = _Entry(other.shelf, entry.row, other.slot, other.created)
        self._files[entry.shelf[1]].free.append(entry.slot)
        if not shelf.count:
            del self._shelves[entry.shelf]

    def forget_expired(self) -> int:
        """Drops the references older than `ttl`; how many there were."""
        dropped = 0
        while self.ttl is not None and self._born:
            reference_id, created = next(iter(self._born.items()))
            if time.monotonic() - created <= self.ttl:
                break
            self.remove(reference_id)
            dropped += 1
        return dropped

    def touch(self, reference_id: int) -> None:
        """Marks a reference as just used."""
        if reference_id in self._entries:
            self._entries.move_to_end(reference_id)

    def worth_trying(
        self, namespace: str, image: np.ndarray, tolerance: float
    ) -> list[tuple[float, int, int]]:
        """`(score, lower bound, reference id)`, the lowest score first.

        The lower bound counts patches that are fresh for certain: those that the reference does not own, and so many
        of each region that it owns whole as must have changed for its mean colour to be off by more than the
        tolerance (the mean of absolute differences is no smaller than the difference of means). It is a weak one, which
        other backgrounds with larger masks beat; the score takes a region whose mean is off by `CHANGED` for changed, and
        counts `UNLIKE` times what is changed against what is not owned.
        """
        shelf = self._shelves.get((namespace, image.shape[0]))
        if shelf is None:
            return []
        return shelf.worth_trying(region_means(image, self.patch_size), tolerance)

    def read(self, reference_id: int) -> Reference:
        """The reference, its pixels copied out of the file: the slot may serve another one later."""
        entry = self._entries[reference_id]
        pixels, patch_mask = self._files[entry.shelf[1]].read(entry.slot)
        return _frozen(Reference(pixels, patch_mask, reference_id))

    def clear(self) -> None:
        """Forgets everything and gives the files back."""
        self._entries.clear()
        self._born.clear()
        self._counts.clear()
        self._shelves.clear()
        self._files.clear()

    def num_bytes(self) -> tuple[int, int]:
        """(bytes in memory: descriptors and index; bytes of the mapped files), as allocated."""
        memory = sum(shelf.num_bytes for shelf in self._shelves.values())
        return memory, sum(file.num_bytes for file in self._files.values())

    def _give_way(self, namespace: str) -> None:
        """Forgets one reference, to make room for one of `namespace`, which gives way itself where others have as many."""
        counts = self._counts + Counter([namespace])
        most = max(counts.values())
        fullest = {namespace} if counts[namespace] == most else {n for n in counts if counts[n] == most}
        self.remove(
            next((i for i, e in self._entries.items() if e.shelf[0] in fullest), next(iter(self._entries)))
        )

    def _free_slot(self, file: "_SlotFile", namespace: str) -> int | None:
        if not file.free:
            wanted = max(FIRST_CHUNK, file.slots)
            try:
                file.grow(min(wanted, self.max_references - file.slots))
            except OSError as error:
                # A full disk costs references, never an answer.
                logger.warning_once(f"No room for more background references ({error}); older ones give way.")
        while not file.free and self._entries:
            self._give_way(namespace)
        return file.free.pop() if file.free else None


class _Shelf:
    """Descriptors of one namespace in arrays without holes."""

    def __init__(self, grid: int):
        self.count = 0
        self.grid = grid
        regions = len(_region_starts(grid)) ** 2
        self.means = np.empty((FIRST_CHUNK, 3, regions), dtype=np.float32)
        self.patches_in_region = _region_patches(grid)
        self.owned = np.empty((FIRST_CHUNK, regions), dtype=bool)
        self.norms = np.empty(FIRST_CHUNK, dtype=np.float32)
        self.unowned_patches = np.empty(FIRST_CHUNK, dtype=np.int32)
        self.ids = np.empty(FIRST_CHUNK, dtype=np.int64)
        self.rows: dict[int, int] | None = None  # id -> row, kept with the index
        self.index = None

    @property
    def num_bytes(self) -> int:
        arrays = (self.means, self.norms, self.owned, self.unowned_patches, self.ids)
        return sum(array.nbytes for array in arrays) + (
            self.index.memory_usage if self.index is not None else 0
        )

    def add(self, reference_id: int, means: np.ndarray, owned: np.ndarray, patch_mask: np.ndarray) -> int:
        row = self.count
        if row == len(self.ids):
            for name in ("means", "norms", "owned", "unowned_patches", "ids"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.empty_like(array)]))
        self.means[row], self.owned[row], self.ids[row] = means, owned, reference_id
        self.norms[row] = np.square(means).sum()
        self.unowned_patches[row] = int((~patch_mask).sum())
        self.count += 1
        if self.index is not None:
            self.index.add(reference_id, means.reshape(-1))
            self.rows[reference_id] = row
        elif self.count > INDEX_FROM and Index is not None:
            # Denser and searched wider than the defaults, which miss three of ten among 100,000.
            self.index = Index(
                ndim=means.size,
                metric="l2sq",
                dtype="f32",
                connectivity=32,
                expansion_add=256,
                expansion_search=256,
            )
            self.index.add(self.ids[: self.count], self.means[: self.count].reshape(self.count, -1))
            self.rows = {int(i): r for r, i in enumerate(self.ids[: self.count])}
        return row

    def remove(self, row: int) -> int | None:
        """Fills the hole with the last row; the id that moved, None if the hole was the last row."""
        last = self.count - 1
        removed, moved = int(self.ids[row]), int(self.ids[last])
        for array in (self.means, self.norms, self.owned, self.unowned_patches, self.ids):
            array[row] = array[last]
        self.count = last
        if self.index is not None:
            self.index.remove(removed)
            del self.rows[removed]
            if removed != moved:
                self.rows[moved] = row
        return moved if removed != moved else None

    def worth_trying(self, query: np.ndarray, tolerance: float) -> list[tuple[float, int, int]]:
        rows = self._proposals(query)
        distance = np.abs(self.means[rows] - query).sum(axis=1)  # [n, regions]
        distance /= 3
        # A region whose mean moved by d has patches that did; none moves by more than 255. The slack is rounding.
        excess = np.maximum(distance - (tolerance + 1e-2), 0) * self.owned[rows]
        changed = np.ceil(excess * (self.patches_in_region / max(255 - tolerance, 1)))
        bounds = self.unowned_patches[rows] + changed.sum(axis=1).astype(np.int32)
        unlike = np.maximum(changed, np.minimum(excess / CHANGED, 1) * self.patches_in_region)
        scores = self.unowned_patches[rows] + UNLIKE * unlike.sum(axis=1)
        # Among equal scores the one that is closer on the whole; an object's region counts as far, not as infinitely far.
        closeness = np.minimum(distance, 32.0).sum(axis=1)
        if len(bounds) > PROPOSALS:
            likely = np.argpartition(scores, PROPOSALS)[:PROPOSALS]
            best = likely[np.lexsort((closeness[likely], scores[likely]))]
        else:
            best = np.lexsort((closeness, scores))
        ids = self.ids[rows]
        return [(float(scores[i]), int(bounds[i]), int(ids[i])) for i in best]

    def _proposals(self, query: np.ndarray) -> np.ndarray | slice:
        if self.count <= EXHAUSTIVE_LIMIT:
            return slice(0, self.count)
        if self.index is not None:
            keys = self.index.search(query.reshape(-1), PROPOSALS).keys
            return np.array([self.rows[int(key)] for key in keys if int(key) in self.rows], dtype=np.int64)
        means = self.means[: self.count].reshape(self.count, -1)
        distances = self.norms[: self.count] - 2 * (means @ query.reshape(-1))
        return np.argpartition(distances, PROPOSALS)[:PROPOSALS]


class _SlotFile:
    """Fixed-size slots of pixels `[S, S, 3]` and masks `[P]` in unnamed files that are mapped."""

    def __init__(self, side: int, patches: int, folder: str | None):
        self.side, self.patches, self.folder = side, patches, folder
        self.slot_bytes = side * side * 3 + patches
        self.chunks: list[np.ndarray] = []
        self.firsts: list[int] = []  # first slot of each chunk
        self.slots = 0
        self.free: list[int] = []

    @property
    def num_bytes(self) -> int:
        return self.slots * self.slot_bytes

    def grow(self, slots: int) -> None:
        if slots <= 0:
            return
        size = slots * self.slot_bytes
        with tempfile.TemporaryFile(dir=self.folder, prefix="backdrop-references-") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a signal later
            else:
                file.truncate(size)
            chunk = np.memmap(file, dtype=np.uint8, mode="r+", shape=(slots, self.slot_bytes))
        self.chunks.append(chunk)
        self.firsts.append(self.slots)
        self.free.extend(range(self.slots + slots - 1, self.slots - 1, -1))
        self.slots += slots

    def write(self, slot: int, pixels: np.ndarray, patch_mask: np.ndarray) -> None:
        row = self._row(slot)
        row[: pixels.size] = pixels.reshape(-1)
        row[pixels.size :] = patch_mask

    def read(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        row = np.array(self._row(slot))
        pixels = row[: -self.patches].reshape(self.side, self.side, 3)
        return pixels, row[-self.patches :].view(bool)

    def _row(self, slot: int) -> np.ndarray:
        chunk = int(np.searchsorted(self.firsts, slot, side="right")) - 1
        return self.chunks[chunk][slot - self.firsts[chunk]]


def region_means(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Mean colours of a coarse grid whose cells are whole patches: uint8 `[S, S, 3]` -> float32 `[3, regions]`."""
    grid = image.shape[0] // patch_size
    starts = _region_starts(grid) * patch_size
    inner = image[: grid * patch_size, : grid * patch_size]
    rows = np.add.reduceat(inner.reshape(inner.shape[0], -1), starts, axis=0, dtype=np.uint32)
    sums = np.add.reduceat(rows.reshape(len(starts), -1, 3), starts, axis=1)  # [R, R, 3]
    sizes = np.diff([*starts, grid * patch_size])
    means = (sums / (sizes[:, None] * sizes[None, :])[..., None]).astype(np.float32)
    return np.ascontiguousarray(means.reshape(-1, 3).T)


def region_owned(patch_mask: np.ndarray) -> np.ndarray:
    """Regions of which every patch is owned: bool `[P]` -> bool `[regions]`."""
    grid = grid_side(patch_mask)
    starts = _region_starts(grid)
    rows = np.logical_and.reduceat(patch_mask.reshape(grid, grid), starts, axis=0)
    return np.logical_and.reduceat(rows, starts, axis=1).reshape(-1)


def _region_starts(grid: int) -> np.ndarray:
    regions = min(grid, REGIONS_PER_SIDE)
    return np.arange(regions) * grid // regions


def _region_patches(grid: int) -> np.ndarray:
    """Patches in each region, `[regions]`."""
    sizes = np.diff([*_region_starts(grid), grid])
    return (sizes[:, None] * sizes[None, :]).reshape(-1)


def _frozen(reference: Reference) -> Reference:
    reference.pixels.flags.writeable = reference.patch_mask.flags.writeable = False
    return reference
