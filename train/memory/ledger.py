"""A dispatch mode that runs a training step without data and accounts for every storage that is alive.

Floating-point tensors are torch's `FakeTensor`s. Integers and booleans are real, so that everything that depends on
values (patch masks, placeholders, padding) takes the same branches as in training.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .kernels import workspace_bytes
from .result import PARTS

aten = torch.ops.aten
# Operations whose result's size may depend on the values of an index.
_INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Ledger(TorchDispatchMode):
    """Runs floating-point tensors as fakes and integers for real, and accounts for the storages that are alive.

    Attributes:
        live: bytes alive by part.
        peaks: for each phase the parts at its highest total.
        phase: the phase that is running, under whose name peaks are kept.
        saved_for_backward: bytes of activations at the end of the forward.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=False)
        self.live = dict.fromkeys(PARTS, 0)
        self.peaks: dict[str, dict[str, int]] = {}
        self.phase = "forward"
        self.saved_for_backward = 0
        self._block = block
        # Storages by id: part, bytes, and a weak reference whose callback removes the entry.
        self._known: dict[int, tuple[str, int, weakref.ref]] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # runs before nearly every operation
            return args[0].fake_device
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        if any(isinstance(value, FakeTensor) for value in given):
            result = self._run_fake(func, types, args, kwargs, given)
        else:
            result = self._run_real(func, types, args, kwargs, given)
        for value in _tensors((result,)):
            self._add(value)
        self._keep_peak(workspace_bytes(func, args))
        return result

    def _run_fake(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple,
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
    ) -> Any:
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        if func in _INDEXING or not all(isinstance(value, FakeTensor) for value in given):
            args, kwargs = tree_map_only(torch.Tensor, self._as_fake, (args, kwargs))
        return self.fakes.__torch_dispatch__(func, types, args, kwargs)

    def _run_real(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple,
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
    ) -> Any:
        if not given:
            made = self.fakes.__torch_dispatch__(func, types, args, kwargs)
            if isinstance(made, torch.Tensor) and _without_values(made):
                return made
        made = func(*args, **kwargs)
        return self._as_fake(made) if isinstance(made, torch.Tensor) and _without_values(made) else made

    def _as_fake(self, tensor: torch.Tensor) -> FakeTensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fakes.from_tensor(tensor)

    def assign(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Puts the tensors' storages under a part."""
        for tensor in tensors:
            key = self._add(tensor)
            old, size, reference = self._known[key]
            self.live[old] -= size
            self.live[part] += size
            self._known[key] = (part, size, reference)

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """Hook for the tensors that autograd saves: they are activations, unless they are weights or the like."""
        key = self._add(tensor)
        if self._known[key][0] == "temporaries":
            self.assign("activations", [tensor])
        return tensor

    def end_forward(self) -> None:
        """Counts what is alive now as activations: it was kept for the backward, be it by autograd, a context or a closure."""
        for key, (part, size, reference) in list(self._known.items()):
            if part == "temporaries":
                self._known[key] = ("activations", size, reference)
                self.live["temporaries"] -= size
                self.live["activations"] += size
        self.saved_for_backward = self.live["activations"]

    def _add(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = -(-storage.nbytes() // self._block) * self._block
            self._known[key] = ("temporaries", size, weakref.ref(storage, lambda _: self._remove(key)))
            self.live["temporaries"] += size
        return key

    def _remove(self, key: int) -> None:
        part, size, _ = self._known.pop(key)
        self.live[part] -= size

    def _keep_peak(self, workspace: int) -> None:
        now = sum(self.live.values()) + workspace
        if self.phase not in self.peaks or now > sum(self.peaks[self.phase].values()):
            self.peaks[self.phase] = {**self.live, "temporaries": self.live["temporaries"] + workspace}


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, those in lists included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _without_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor is run as a fake: floats are; integers and scalars (an optimizer's step count) are real."""
    return tensor.is_floating_point() and tensor.ndim > 0


def _positions(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Boolean indices turned into the positions they choose, so that the result's size is known without the values."""
    positions: list[torch.Tensor | None] = []
    for index in indices:
        if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
            positions.append(index)
        else:
            positions += index.nonzero().unbind(1)
    return positions
