"""Optimizers whose states are counted: torch's own, and stand-ins for bitsandbytes' AdamW in 8 and 32 bits."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import Trainer
from trl import SFTConfig

_TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")
_BNB_OPTIMIZERS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


def check_optimizer(name: str) -> None:
    """Refuses an optimizer whose states are not known."""
    known = (*_TORCH_OPTIMIZERS, *_BNB_OPTIMIZERS)
    if str(getattr(name, "value", name)) not in known:
        raise ValueError(f"optim is {name!r}; memory is known of {', '.join(known)}.")


def build_optimizer(trained: list[nn.Parameter], training: SFTConfig, gpu: bool) -> torch.optim.Optimizer:
    """The optimizer of the recipe over the trained parameters, or its stand-in."""
    name = str(getattr(training.optim, "value", training.optim))
    if name in _BNB_OPTIMIZERS:
        return BlockwiseAdamW(trained, bits=8 if "8bit" in name else 32, paged="paged" in name)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
    if name in ("adamw_torch", "sgd") and gpu:
        settings = {**settings, "foreach": True}  # torch's default on CUDA, which it refuses to fakes
    return kind(trained, **settings)


class BlockwiseAdamW(torch.optim.Optimizer):
    """States of bitsandbytes' AdamW (`Optimizer2State.init_state`, bitsandbytes/optim/optimizer.py): two bytes a weight
    and two float32 for 256 of them; parameters of fewer than 4096 weights and the 32-bit form keep two float32. Paged
    states (of 100,000 weights and more) live in managed memory: the largest is on the device at a time.

    Attributes:
        host: bytes of paged states, in the host's memory.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bits: int, paged: bool) -> None:
        super().__init__(parameters, {})
        self.bits, self.paged, self.host = bits, paged, 0

    @torch.no_grad()
    def step(self) -> None:
        """Makes the states of every parameter as the first step does; the weights stay as they are."""
        paged = []
        for parameter in self.param_groups[0]["params"]:
            numel = parameter.numel()
            small = self.bits == 32 or numel < 4096
            size = 8 * numel if small else 2 * numel + 8 * math.ceil(numel / 256)
            if self.paged and numel >= 1e5:
                paged.append(size)
                continue
            if parameter not in self.state:
                self.state[parameter]["states"] = torch.empty(size // 4, dtype=torch.float32)
        self.host = sum(paged)
        if paged:
            torch.empty(max(paged) // 4, dtype=torch.float32)
