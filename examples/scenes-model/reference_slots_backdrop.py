"""Where the pixels of references lie: fixed-size slots in memory-mapped temporary files that are already unlinked.

Nothing is left to clean up when the process ends, and the operating system decides which of them it keeps in memory.
"""

import os
import tempfile

import numpy as np


class SlotFile:
    """Slots for pixels `[S, S, 3]`, masks `[P]` and noise `[4 P]`. It only grows. Not thread-safe.

    Args:
        side: `S`, pixels.
        patches: `P`.
        folder: where the files are made, None: the system's temporary folder.
    """

    def __init__(self, side: int, patches: int, folder: str | None):
        self.side, self.patches, self.folder = side, patches, folder
        self.num_slots = 0
        self._slot_bytes = side * side * 3 + 5 * patches
        self._chunks: list[np.ndarray] = []  # one mapped file each
        self._first_slots: list[int] = []  # of each chunk
        self._free: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.num_slots * self._slot_bytes

    @property
    def has_free_slot(self) -> bool:
        """Whether `acquire` would give a slot."""
        return bool(self._free)

    def acquire(self) -> int | None:
        """A slot that nothing uses, None where there is none."""
        return self._free.pop() if self._free else None

    def release(self, slot: int) -> None:
        """Makes a slot free again; its content may be overwritten from now on."""
        self._free.append(slot)

    def grow(self, slots: int) -> None:
        """Adds slots.

        Raises:
            OSError: there is no room for them on the disk.
        """
        if slots <= 0:
            return
        size = slots * self._slot_bytes
        with tempfile.TemporaryFile(dir=self.folder, prefix="backdrop-references-") as file:
            if hasattr(os, "posix_fallocate"):
                # The disk's blocks are reserved now: writing to a mapped file on a full disk kills the process.
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            chunk = np.memmap(file, dtype=np.uint8, mode="r+", shape=(slots, self._slot_bytes))
        self._chunks.append(chunk)
        self._first_slots.append(self.num_slots)
        self._free.extend(range(self.num_slots + slots - 1, self.num_slots - 1, -1))
        self.num_slots += slots

    def write(self, slot: int, pixels: np.ndarray, patch_mask: np.ndarray) -> None:
        """Fills a slot with uint8 `[S, S, 3]` and bool `[P]`; nothing is known of its noise."""
        content = self._content(slot)
        content[: pixels.size] = pixels.reshape(-1)
        content[pixels.size : pixels.size + self.patches] = patch_mask
        content[pixels.size + self.patches :] = 0

    def write_noise(self, slot: int, noise: np.ndarray) -> None:
        """Adds uint8 `[4 P]` to a slot, see `patch_noise_backdrop`."""
        self._content(slot)[-4 * self.patches :] = noise

    def read(self, slot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A copy of a slot's pixels, uint8 `[S, S, 3]`, mask, bool `[P]`, and noise, uint8 `[4 P]`."""
        content = np.array(self._content(slot))
        pixels, mask, noise = np.split(
            content, (content.size - 5 * self.patches, content.size - 4 * self.patches)
        )
        return pixels.reshape(self.side, self.side, 3), mask.view(bool), noise

    def _content(self, slot: int) -> np.ndarray:
        """The mapped bytes of a slot."""
        chunk = int(np.searchsorted(self._first_slots, slot, side="right")) - 1
        return self._chunks[chunk][slot - self._first_slots[chunk]]
