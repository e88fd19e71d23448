"""The maps of a recording: arrays from which anyone can measure again what was reused and how stale it was."""

import contextlib
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from backdrop.data.atomic import replacing
from backdrop.processing.matches_backdrop import MatchReport


class MapsWriter:
    """Writes the arrays from which every reused patch's staleness can be measured again, in flat memory.

    `frames` uint8 `[F, S, S, 3]` as the model sees them, `corrected` uint8 `[F, S, S, 3]`, what staleness is measured on (the same,
    unless corrections are on), `references` uint8 `[R, S, S, 3]`, the pictures that stood for a background (all its layers together, 0
    outside the owned patches; a layer made anew makes a new picture; in order of first use), `owned` bool `[R, P]`, their patches,
    `reference` int64 `[F]` (which of them, -1: a miss), `fresh` bool `[F, P]` (patches of the fresh group; all True on a miss),
    `encoded` bool `[F, P]` (all that were encoded in that frame: fresh ones, and layers made anew; what is not, is reused),
    `refreshed` bool `[F]` (a layer was made anew for this frame).

    The lengths are known only at the end, so raw bytes are spooled beside the target (twice its size on the disk for
    a moment) and copied under their headers into the zip by `assemble`.
    """

    def __init__(self, path: Path, spools: dict[str, BinaryIO]):
        self.path = path
        self._spools = spools
        self._reference_index: dict[int, int] = {}  # reference_id -> row of `references`
        self._num_frames = 0
        self._side = self._num_patches = 0

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator["MapsWriter"]:
        """A writer whose spools are gone when the block ends, however it ends."""
        names = ("frames", "corrected", "references", "owned", "reference", "fresh", "encoded", "refreshed")
        with (
            tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder,
            contextlib.ExitStack() as stack,
        ):
            yield cls(path, {name: stack.enter_context(open(Path(folder, name), "w+b")) for name in names})

    def add(self, report: MatchReport) -> None:
        """One more frame."""
        self._side, self._num_patches = report.image.shape[0], len(report.fresh)
        row = -1
        if report.reference is not None:
            reference_id = report.reference.reference_id
            if reference_id not in self._reference_index:
                self._reference_index[reference_id] = len(self._reference_index)
                self._spools["references"].write(report.reference.pixels.tobytes())
                self._spools["owned"].write(report.reference.patch_mask.tobytes())
            row = self._reference_index[reference_id]
        self._spools["frames"].write(report.image.tobytes())
        self._spools["corrected"].write(report.frame.tobytes())
        self._spools["reference"].write(np.int64(row).tobytes())
        self._spools["fresh"].write(report.fresh.tobytes())
        self._spools["encoded"].write(report.encoded.tobytes())
        self._spools["refreshed"].write(np.bool_(report.refreshed).tobytes())
        self._num_frames += 1

    def assemble(self) -> None:
        """Puts the file in its place."""
        frames, pixels = self._num_frames, (self._side, self._side, 3)
        arrays = {
            "frames": (np.uint8, (frames, *pixels)),
            "corrected": (np.uint8, (frames, *pixels)),
            "references": (np.uint8, (len(self._reference_index), *pixels)),
            "owned": (np.bool_, (len(self._reference_index), self._num_patches)),
            "reference": (np.int64, (frames,)),
            "fresh": (np.bool_, (frames, self._num_patches)),
            "encoded": (np.bool_, (frames, self._num_patches)),
            "refreshed": (np.bool_, (frames,)),
        }
        with (
            replacing(self.path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        ):
            for name, (dtype, shape) in arrays.items():
                descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                spool = self._spools[name]
                spool.seek(0)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    shutil.copyfileobj(spool, member, 2**18)
