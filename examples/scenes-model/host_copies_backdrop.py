"""Tensors on the host, where Python reads them, at the price of few waits for a device.

Reading a value of a tensor on a GPU (`tolist`, `item`, `bool`) waits for everything that was queued there before. So what
Python decides by is copied at once, before anything is queued, and read from the copies.
"""

from collections.abc import Sequence

import torch

CPU = torch.device("cpu")


def host_copies(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The tensors on the CPU, by one copy from each device; what is there already, and None, as it is."""
    copies = list(tensors)
    away = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.device != CPU]
    for device in {tensors[i].device for i in away}:
        members = [i for i in away if tensors[i].device == device]
        # Each begins where its dtype may: the widest elements come first.
        members.sort(key=lambda i: -tensors[i].element_size())
        parts = [tensors[i].detach().contiguous().reshape(-1).view(torch.uint8) for i in members]
        together = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(CPU)
        for i, part in zip(members, together.split([part.numel() for part in parts]), strict=True):
            copies[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return copies


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor of the host on a device, without waiting for the device.

    The host's memory is read before the call returns, as it is not pinned.
    """
    return tensor.to(device, non_blocking=True)
