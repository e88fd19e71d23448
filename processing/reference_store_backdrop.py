"""The references of known backgrounds: a bounded number of them, by namespace; the least recently used are evicted.

Pixels lie in slots of memory-mapped files; in memory there is a descriptor for each, by which the references worth
comparing with an image are found.
"""

import time
from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np
from transformers.utils import logging

from .patch_groups_backdrop import grid_side, only_owned
from .reference_descriptors_backdrop import Candidate, DescriptorTable
from .reference_slots_backdrop import SlotFile

logger = logging.get_logger(__name__)

FIRST_SLOTS = 16  # slots of a file's first chunk; every further chunk doubles what there is


@dataclass(frozen=True, eq=False)
class Reference:
    """A background seen before. The store gives it with read-only arrays.

    Attributes:
        pixels: uint8 `[S, S, 3]`, 0 outside the owned patches.
        patch_mask: bool `[P]`, the patches it owns.
        reference_id: unique in its matcher, never given twice.
    """

    pixels: np.ndarray
    patch_mask: np.ndarray
    reference_id: int


@dataclass(frozen=True)
class KnownBackground:
    """What a list of references tells of one.

    Attributes:
        reference_id: its number.
        namespace: whose it is.
        age: seconds since it was added.
    """

    reference_id: int
    namespace: str
    age: float


@dataclass(frozen=True)
class _Entry:
    table: tuple[str, int]  # namespace and S: which table has its descriptor
    descriptor: int  # its number in the table
    slot: int  # in the file of this S
    created: float  # seconds, monotonic clock


class ReferenceStore:
    """References by namespace and image side, at most `max_references` in all. Not thread-safe.

    Evicted is the least recently used reference of the namespace that has most, so that a busy namespace does not
    empty the others.

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
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by id, least recently used first
        self._created: OrderedDict[int, float] = OrderedDict()  # by id, oldest first
        self._counts: Counter[str] = Counter()  # by namespace
        self._tables: dict[tuple[str, int], DescriptorTable] = {}  # by namespace and S
        self._files: dict[int, SlotFile] = {}  # by S
        self._next_id = 0

    def known(self) -> list[KnownBackground]:
        """All references, the least recently used first."""
        now = time.monotonic()
        return [
            KnownBackground(number, entry.table[0], now - entry.created)
            for number, entry in self._entries.items()
        ]

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, reference_id: int) -> bool:
        return reference_id in self._entries

    def add(self, namespace: str, image: np.ndarray, patch_mask: np.ndarray) -> Reference | None:
        """Keeps a background.

        Args:
            namespace: whose.
            image: uint8 `[S, S, 3]`, the whole frame; only its owned patches are kept.
            patch_mask: bool `[P]`, the patches that it owns.

        Returns:
            The new reference; None where there is no room for it (a full disk).
        """
        side = image.shape[0]
        while len(self._entries) >= self.max_references:
            self._evict(namespace)
        file = self._files.setdefault(side, SlotFile(side, len(patch_mask), self.folder))
        slot = self._acquire_slot(file, namespace)
        if slot is None:
            return None
        pixels = only_owned(image, patch_mask, self.patch_size)
        file.write(slot, pixels, patch_mask)
        table = self._tables.setdefault(
            (namespace, side), DescriptorTable(grid_side(patch_mask), self.patch_size)
        )
        reference_id = self._next_id
        self._next_id += 1
        descriptor = table.add(reference_id, image, patch_mask)
        created = time.monotonic()
        self._entries[reference_id] = _Entry((namespace, side), descriptor, slot, created)
        self._created[reference_id] = created
        self._counts[namespace] += 1
        return _read_only(Reference(pixels, patch_mask.copy(), reference_id))

    def of_namespace(self, namespace: str) -> list[int]:
        """The ids of a namespace's references, the least recently used first."""
        return [i for i, entry in self._entries.items() if entry.table[0] == namespace]

    def remove(self, reference_id: int) -> None:
        """Forgets one reference.

        Raises:
            KeyError: there is none with this id.
        """
        entry = self._entries.pop(reference_id)
        del self._created[reference_id]
        namespace, side = entry.table
        self._counts[namespace] -= 1
        if not self._counts[namespace]:
            del self._counts[namespace]
        table = self._tables[entry.table]
        renumbered = table.remove(entry.descriptor)
        if renumbered is not None:
            other = self._entries[renumbered]
            self._entries[renumbered] = _Entry(other.table, entry.descriptor, other.slot, other.created)
        self._files[side].release(entry.slot)
        if not table.count:
            del self._tables[entry.table]

    def remove_expired(self) -> int:
        """Forgets the references older than `ttl`; returns how many there were."""
        removed = 0
        while self.ttl is not None and self._created:
            reference_id, created = next(iter(self._created.items()))
            if time.monotonic() - created <= self.ttl:
                break
            self.remove(reference_id)
            removed += 1
        return removed

    def mark_used(self, reference_id: int) -> None:
        """Makes a reference the most recently used one. An unknown id is ignored."""
        if reference_id in self._entries:
            self._entries.move_to_end(reference_id)

    def candidates(self, namespace: str, image: np.ndarray, tolerance: float) -> list[Candidate]:
        """The references of a namespace to compare with an image, the most promising first.

        Args:
            namespace: whose.
            image: uint8 `[S, S, 3]`.
            tolerance: the largest staleness that is reused, grey levels.
        """
        table = self._tables.get((namespace, image.shape[0]))
        return [] if table is None else table.candidates(image, tolerance)

    def read(self, reference_id: int) -> Reference:
        """The reference, with a copy of its pixels: its slot may hold another reference later.

        Raises:
            KeyError: there is none with this id.
        """
        entry = self._entries[reference_id]
        pixels, patch_mask = self._files[entry.table[1]].read(entry.slot)
        return _read_only(Reference(pixels, patch_mask, reference_id))

    def clear(self) -> None:
        """Forgets everything and gives the files back."""
        self._entries.clear()
        self._created.clear()
        self._counts.clear()
        self._tables.clear()
        self._files.clear()

    def num_bytes(self) -> tuple[int, int]:
        """Bytes in memory (descriptors and their index), and bytes of the mapped files, both as allocated."""
        memory = sum(table.num_bytes for table in self._tables.values())
        return memory, sum(file.num_bytes for file in self._files.values())

    def _evict(self, namespace: str) -> None:
        """Forgets one reference to make room for one of `namespace`, counted as if it were there already.

        Where several namespaces have as many, `namespace` loses one of its own.
        """
        counts = self._counts + Counter([namespace])
        most = max(counts.values())
        fullest = {namespace} if counts[namespace] == most else {n for n in counts if counts[n] == most}
        self.remove(
            next((i for i, e in self._entries.items() if e.table[0] in fullest), next(iter(self._entries)))
        )

    def _acquire_slot(self, file: SlotFile, namespace: str) -> int | None:
        if not file.has_free_slot:
            wanted = max(FIRST_SLOTS, file.num_slots)
            try:
                file.grow(min(wanted, self.max_references - file.num_slots))
            except OSError as error:
                # A full disk costs references, never an answer.
                logger.warning_once(
                    f"There is no room for more background references ({error}); older ones are evicted."
                )
        while not file.has_free_slot and self._entries:
            self._evict(namespace)
        return file.acquire()


def _read_only(reference: Reference) -> Reference:
    reference.pixels.flags.writeable = reference.patch_mask.flags.writeable = False
    return reference
