"""The result of a memory estimate: bytes by part at the moment of the peak."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "temporaries")
# What a CUDA process takes before its first tensor. transformers' "Model training anatomy" measures 1.3 GB
# with eagerly loaded kernels; since CUDA 11.7 modules load lazily and 0.3 to 0.6 GB are usual. cuBLAS adds 32 MiB.
CUDA_CONTEXT = 640 * 2**20
# Bytes that PyTorch's caching allocator reserves and cannot hand out (block splitting), as a share of what is allocated.
FRAGMENTATION = 0.04
# GB that a card is sold with -> GiB that CUDA offers of it (`torch.cuda.get_device_properties(0).total_memory`): the driver and
# error correction keep the rest. Of the cards of a size (RTX 3090 and 4090; A100; A100 and H100) the smallest.
CARDS = {24: 23.5, 40: 39.4, 80: 79.1}
# Share of the estimate that must be left free: runs on a GPU took up to 4% more, and a display or another program takes some.
MARGIN = 0.05


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the moment of the peak, by part.

    Attributes:
        weights: parameters and buffers as they are stored (packed, where quantised).
        gradients: those of trainable parameters that exist at the peak.
        optimizer: states of the optimizer (and float32 masters under ZeRO).
        activations: the batch, and what the forward kept for the backward and is not freed yet at the peak.
        temporaries: everything else alive at the peak: recomputation of a layer, logits tiles, casts, dequantised
            weights, kernels' workspace; buckets and gathered layers of several processes.
        overhead: CUDA context and fragmentation, an assumption (`CUDA_CONTEXT`, `FRAGMENTATION`).
        phase: the phase with the peak: "forward", "backward" or "optimizer step".
        peaks: highest total of each phase, without overhead.
        saved_for_backward: activations at the end of the forward.
        host: bytes of paged optimizer states, which live in the host's memory under pressure.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    overhead: int
    phase: str
    peaks: dict[str, int]
    saved_for_backward: int
    host: int = 0

    @property
    def allocated(self) -> int:
        """What PyTorch's allocator hands out at the peak (`torch.cuda.max_memory_allocated`)."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def total(self) -> int:
        """What the device must have: `allocated` and `overhead`."""
        return self.allocated + self.overhead

    def fits(self, gib: float) -> bool:
        """Whether the peak and a margin (`MARGIN`) are within so many GiB, such as the size of one of `CARDS`."""
        return with_margin(self.total) <= gib * GIB

    def table(self) -> list[dict]:
        """A dictionary for each part: name, bytes, GiB, share of the total."""
        rows = [(part, getattr(self, part)) for part in (*PARTS, "overhead")] + [("total", self.total)]
        return [
            {"part": part, "bytes": size, "gib": size / GIB, "share": size / self.total}
            for part, size in rows
        ]


def with_margin(size: float) -> float:
    """A peak and what must be left free beside it, in the same unit."""
    return size * (1 + MARGIN)


def print_memory(estimate: MemoryEstimate, cards: Mapping[int, float] = CARDS) -> None:
    """Prints the parts as a table, and on which cards (as `CARDS`) the run fits."""
    table = Table("part", "GiB", "share", title=f"Memory at the peak ({estimate.phase})")
    for row in estimate.table():
        table.add_row(
            row["part"],
            f"{row['gib']:.2f}",
            f"{row['share']:.1%}",
            style="bold" if row["part"] == "total" else None,
        )
    Console().print(table)
    verdicts = ", ".join(
        f"{gb} GB ({gib} GiB): {'yes' if estimate.fits(gib) else 'no'}" for gb, gib in cards.items()
    )
    Console().print(f"Fits a card of {verdicts}; {MARGIN:.0%} are left free", soft_wrap=True)
