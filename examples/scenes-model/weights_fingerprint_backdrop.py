"""A cheap fingerprint of a model's weights, and a cheaper check that it still holds.

The fingerprint depends on addresses and sampled values; it is valid in this process only. Taking it reads every module and
tensor with several calls each. `WeightsFingerprints` remembers what it was taken from, and afterwards compares: the same
objects in the same places, the same addresses, versions and layouts, the same sampled values. That is a few calls for
all tensors together and one copy from each device.
"""

import array
import hashlib
import operator
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import nn

DIGEST_BYTES = 20  # 160 bits: accidental collisions are out of reach
SAMPLES_PER_TENSOR = 16
MAX_REMEMBERED = 2  # sets of modules: those of the vision tokens, and those of the prefix
# Integers of the size of a tensor's elements.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The dictionaries of a module whose values are compared one by one, beside all of its attributes.
COMPARED_CONTENTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")

# What must be equal for a tensor to be where and what it was. One call of `map` for each is faster than tuples of all.
# The device is that of the address.
LAYOUT_FACTS = (
    operator.attrgetter("shape"),
    operator.attrgetter("dtype"),
    operator.methodcaller("stride"),
    operator.methodcaller("data_ptr"),
)
_version = operator.attrgetter("_version")


def weights_fingerprint(*modules: nn.Module) -> bytes:
    """Digest that changes when a parameter, a buffer, an adapter's state or a hook changes; valid in this process only.

    Per tensor: address, version counter, shape, dtype, device and `SAMPLES_PER_TENSOR` evenly spaced values. The
    values are there because peft merges adapters through `.data`, which changes neither address nor counter. An edit
    through `.data` that misses every sampled element, and an edit of weights that accelerate keeps offloaded, are not
    seen: call `BackgroundCache.clear` after one.
    """
    return WeightsSnapshot(modules).fingerprint


class WeightsFingerprints:
    """`weights_fingerprint` of the modules asked for most recently, taken anew only where something changed.

    It holds these modules and the memory of their tensors until it is asked again or cleared. Thread-safe: snapshots are
    replaced, not changed.
    """

    def __init__(self):
        self._snapshots: dict[tuple[int, ...], WeightsSnapshot] = {}

    def of(self, *modules: nn.Module) -> bytes:
        """`weights_fingerprint(*modules)`."""
        name = tuple(map(id, modules))  # not reused for other modules while the snapshot holds these
        snapshot = self._snapshots.get(name)
        if snapshot is None or not snapshot.still_holds():
            snapshot = WeightsSnapshot(modules)
            self._snapshots.pop(name, None)
            self._snapshots[name] = snapshot  # the last one now
            for other in list(self._snapshots)[:-MAX_REMEMBERED]:
                self._snapshots.pop(other, None)
        return snapshot.fingerprint

    def clear(self) -> None:
        """Forgets everything, and lets the modules go."""
        self._snapshots.clear()


class WeightsSnapshot:
    """What some modules were when their fingerprint was taken.

    Attributes:
        fingerprint: see `weights_fingerprint`.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self._modules = tuple(walk(modules))
        self._attributes = [vars(module) for module in self._modules]
        contents = [getattr(module, name) for module in self._modules for name in COMPARED_CONTENTS]
        self._empty = [content for content in contents if not content]
        self._compared = self._attributes + [content for content in contents if content]
        self._objects = list(self._present_objects())
        self._adapted = [module for module in self._modules if "_active_adapter" in vars(module)]
        self._adapter_states = self._present_adapter_states()
        tensors = [
            tensor
            for module in self._modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        self._unversioned = [tensor for tensor in tensors if tensor.is_inference()]
        self._versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        self._layouts = self._present_layouts()
        self._samples = _Samples([tensor for tensor in tensors if not tensor.is_meta])
        self._values = self._samples.read()
        self.fingerprint = self._digest(tensors)

    def still_holds(self) -> bool:
        """Whether `weights_fingerprint` would see no change."""
        return (
            not any(self._empty)
            and sum(map(len, self._compared)) + len(self._attributes) == len(self._objects)
            and all(map(operator.is_, self._present_objects(), self._objects))
            and self._present_adapter_states() == self._adapter_states
            and self._present_layouts() == self._layouts
            and self._samples.read() == self._values
        )

    def _present_objects(self) -> Iterable[object]:
        """Which modules have their own `forward`; every attribute; their parameters, buffers, children and hooks."""
        own_forwards = ("forward" in attributes for attributes in self._attributes)
        return chain(own_forwards, chain.from_iterable(map(dict.values, self._compared)))

    def _present_adapter_states(self) -> list[str]:
        """Lists and dictionaries inside adapters change in place, so that they are read, not compared as objects."""
        return [adapter_state(module) for module in self._adapted]

    def _present_layouts(self) -> list:
        tensors = self._versioned + self._unversioned
        facts = chain.from_iterable(map(fact, tensors) for fact in LAYOUT_FACTS)
        return [*map(_version, self._versioned), *facts]

    def _digest(self, tensors: Sequence[torch.Tensor]) -> bytes:
        facts: list[int] = []
        for module in self._modules:
            if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
                facts += [*module._forward_hooks, *module._forward_pre_hooks, id(vars(module).get("forward"))]
        layouts = []
        for tensor in tensors:
            if tensor.is_meta:
                facts += (id(tensor), tensor.numel())
                continue
            version = -1 if tensor.is_inference() else tensor._version
            facts += (tensor.data_ptr(), version, tensor.numel())
            layouts.append((tensor.shape, str(tensor.dtype), str(tensor.device)))
        facts.append(hash(tuple(layouts)))
        digest = hashlib.blake2b(array.array("q", facts).tobytes(), digest_size=DIGEST_BYTES)
        digest.update("|".join(self._adapter_states).encode())
        digest.update(self._values)
        return digest.digest()


class _Samples:
    """Up to `SAMPLES_PER_TENSOR` evenly spaced values of each tensor, read by one copy from each device.

    It keeps views, and with them the memory of the tensors.
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._arrays: dict[np.dtype, list[np.ndarray]] = {}
        self._views: dict[torch.device, dict[torch.dtype, list[torch.Tensor]]] = {}
        self._scattered: list[torch.Tensor] = []
        for tensor in tensors:
            size, bits = tensor.numel(), BITS.get(tensor.element_size())
            count = min(size, SAMPLES_PER_TENSOR)
            if not size:
                continue
            if not tensor.is_contiguous():
                self._scattered.append(tensor)
                continue
            view = tensor.as_strided((count,), (size // count,))
            if tensor.device.type == "cpu" and bits is not None and type(view) is torch.Tensor:
                # numpy gathers from many arrays in a quarter of torch's time, and has no bfloat16.
                values = np.from_dlpack(view.view(bits))
                self._arrays.setdefault(values.dtype, []).append(values)
            else:
                self._views.setdefault(tensor.device, {}).setdefault(tensor.dtype, []).append(view)

    @torch.no_grad()
    def read(self) -> bytes:
        """The values as bytes."""
        found = [np.concatenate(arrays).tobytes() for arrays in self._arrays.values()]
        for by_dtype in self._views.values():
            gathered = [torch.cat(views).view(torch.uint8) for views in by_dtype.values()]
            found.append(torch.cat(gathered).cpu().numpy().tobytes())
        for tensor in self._scattered:
            size = tensor.numel()
            count = min(size, SAMPLES_PER_TENSOR)
            values = tensor.flatten()[:: size // count][:count].contiguous()
            found.append(values.view(torch.uint8).cpu().numpy().tobytes())
        return b"".join(found)


def walk(modules: Sequence[nn.Module]) -> Iterable[nn.Module]:
    """Every module once, in a fixed order. Faster than `nn.Module.modules`, which builds names too."""
    stack, seen = list(reversed(modules)), set()
    while stack:
        module = stack.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack.extend(child for child in reversed(module._modules.values()) if child is not None)


def adapter_state(module: nn.Module) -> str:
    """State of a peft tuner layer that its tensors do not show: which adapters act, and how strongly."""
    attributes = vars(module)
    names = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
    return "|".join(f"{name}={attributes.get(name)}" for name in names)
