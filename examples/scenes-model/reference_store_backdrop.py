"""The references of known backgrounds: a bounded number of them, by namespace; the least recently used are evicted.

Pixels lie in slots of memory-mapped files; in memory there is a descriptor for each, by which the references worth
comparing with an image are found.
"""

import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace

import numpy as np
from transformers.utils import logging

from .background_layers_backdrop import Layer, read_only, stacked
from .patch_groups_backdrop import grid_side
from .patch_noise_backdrop import levels_from_bytes, levels_to_bytes
from .reference_descriptors_backdrop import Candidate, DescriptorTable
from .reference_slots_backdrop import SlotFile

logger = logging.get_logger(__name__)

MOST_LAYERS = 2  # of a background; each takes a slot
FIRST_SLOTS = 16  # slots of a file's first chunk; every further chunk doubles what there is


@dataclass(frozen=True, eq=False)
class Reference:
    """A background seen before. The store gives it with read-only arrays.

    Attributes:
        layers: one or two, what has stayed long before what has settled lately.
        pixels: uint8 `[S, S, 3]`, what the layers show together, 0 outside the owned patches.
        patch_mask: bool `[P]`, the patches that it owns.
        reference_id: unique in its matcher, never given twice; a layer made anew makes another reference.
        noise: float32 `[P, 4]`, what is known of the noise of its patches, see `patch_noise_backdrop`; 0: nothing.
    """

    layers: tuple[Layer, ...]
    pixels: np.ndarray
    patch_mask: np.ndarray
    reference_id: int
    noise: np.ndarray

    @classmethod
    def of_layers(
        cls, layers: tuple[Layer, ...], reference_id: int, noise: np.ndarray, patch_size: int
    ) -> "Reference":
        """The reference that these layers make."""
        together = stacked(layers, patch_size)
        return cls(layers, together.pixels, together.patch_mask, reference_id, noise)


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
    slots: tuple[int, ...]  # of its layers, in the file of this S
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

    def add(
        self,
        namespace: str,
        image: np.ndarray,
        layers: tuple[Layer, ...],
        noise: np.ndarray | None = None,
    ) -> Reference | None:
        """Keeps a background.

        Args:
            namespace: whose.
            image: uint8 `[S, S, 3]`, a whole frame of it, by which it is found.
            layers: one or two.
            noise: float32 `[P, 4]`, of its patches; None: not known.

        Returns:
            The new reference; None where there is no room for it (a full disk).
        """
        side, patches = image.shape[0], len(layers[0].patch_mask)
        while len(self._entries) >= self.max_references:
            self._evict(namespace)
        file = self._files.setdefault(side, SlotFile(side, patches, self.folder))
        slots: list[int] = []
        for layer in layers:
            slot = self._acquire_slot(file, namespace)
            if slot is None:
                for taken in slots:
                    file.release(taken)
                return None
            file.write(slot, layer.pixels, layer.patch_mask)
            slots.append(slot)
        noise = np.zeros((patches, 4), dtype=np.float32) if noise is None else noise
        file.write_noise(slots[0], levels_to_bytes(noise))
        reference_id = self._next_id
        self._next_id += 1
        reference = Reference.of_layers(layers, reference_id, noise, self.patch_size)
        table = self._tables.setdefault(
            (namespace, side), DescriptorTable(grid_side(reference.patch_mask), self.patch_size)
        )
        descriptor = table.add(reference_id, image, reference.patch_mask)
        created = time.monotonic()
        self._entries[reference_id] = _Entry((namespace, side), descriptor, tuple(slots), created)
        self._created[reference_id] = created
        self._counts[namespace] += 1
        return reference

    def write_noise(self, reference_id: int, noise: np.ndarray) -> None:
        """Keeps what is known by now of a reference's noise, float32 `[P, 4]`. An unknown id is ignored."""
        entry = self._entries.get(reference_id)
        if entry is not None:
            self._files[entry.table[1]].write_noise(entry.slots[0], levels_to_bytes(noise))

    @property
    def ids(self) -> list[int]:
        """The ids of all references, the least recently used first."""
        return list(self._entries)

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
            self._entries[renumbered] = replace(other, descriptor=entry.descriptor)
        for slot in entry.slots:
            self._files[side].release(slot)
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
        stored = [self._files[entry.table[1]].read(slot) for slot in entry.slots]
        layers = tuple(read_only(Layer(pixels, patch_mask)) for pixels, patch_mask, _ in stored)
        return Reference.of_layers(layers, reference_id, levels_from_bytes(stored[0][2]), self.patch_size)

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
                file.grow(min(wanted, MOST_LAYERS * self.max_references - file.num_slots))
            except OSError as error:
                # A full disk costs references, never an answer.
                logger.warning_once(
                    f"There is no room for more background references ({error}); older ones are evicted."
                )
        while not file.has_free_slot and self._entries:
            self._evict(namespace)
        return file.acquire()
