"""Where a benchmark runs, and whether a shape fits there."""

import psutil
import torch

from .shapes import SHAPES, needed_bytes


def is_cuda(device: str | torch.device) -> bool:
    """Whether the device is a GPU of CUDA."""
    return torch.device(device).type == "cuda"


def synchronize(device: str | torch.device) -> None:
    """Waits until a GPU has done what it was given; nothing on a CPU."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def check_memory(shape_name: str, device: str, dtype: torch.dtype, batch: int) -> None:
    """Compares what a run needs, roughly, with what is free.

    Raises:
        ValueError: it needs more.
    """
    needed = needed_bytes(SHAPES[shape_name], dtype, batch)
    free = torch.cuda.mem_get_info(device)[0] if is_cuda(device) else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"Shape {shape_name} in {str(dtype).removeprefix('torch.')} at batch {batch} needs about "
            f"{needed / 2**30:.1f} GiB on {device}, but {free / 2**30:.1f} GiB are free; wanted a smaller shape, batch "
            "or dtype, or another device."
        )
