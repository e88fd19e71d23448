"""A cheap fingerprint of a model's weights and of the rest of its state, and a cheaper check that it still holds.

The fingerprint depends on where tensors lie and on sampled values; it is valid in this process only. Taking it reads every
module and tensor with several calls each. `WeightsFingerprints` remembers what it was taken from, and afterwards compares:
the same objects in the same places, the same addresses, versions and layouts, the same sampled values. That is a few calls
for all tensors together and one copy from each device.
"""

import hashlib
import operator
import threading
import weakref
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .module_state_backdrop import ModuleStates

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
_forward = operator.attrgetter("forward")


class WeightsFingerprints:
    """Fingerprints of the modules asked for most recently, taken anew only where something changed.

    A fingerprint is a digest that changes when a parameter, a buffer, another attribute, an adapter's state, the code of a
    forward or a hook changes. Of each tensor it knows the storage, version counter, shape, dtype, device and
    `SAMPLES_PER_TENSOR` evenly spaced values. The values are there because peft merges adapters through `.data`, which
    changes neither address nor counter. An edit through `.data` that misses every sampled element, and an edit of
    weights that accelerate keeps offloaded, are not seen: call `BackgroundCache.clear` after one.

    It holds the modules and the memory of their tensors until it is asked again or cleared. Thread-safe: snapshots are
    replaced, not changed.
    """

    def __init__(self):
        self._snapshots: dict[tuple[int, ...], WeightsSnapshot] = {}
        self._storages = _Storages()

    def of(self, *modules: nn.Module) -> "WeightsSnapshot":
        """What these modules are now."""
        name = tuple(map(id, modules))  # not reused for other modules while the snapshot holds these
        snapshot = self._snapshots.get(name)
        if snapshot is None or not snapshot.still_holds():
            snapshot = WeightsSnapshot(modules, self._storages)
            self._snapshots.pop(name, None)
            self._snapshots[name] = snapshot  # the last one now
            for other in list(self._snapshots)[:-MAX_REMEMBERED]:
                self._snapshots.pop(other, None)
        return snapshot

    def clear(self) -> None:
        """Forgets everything, and lets the modules go. What is as it was has the same fingerprint afterwards."""
        self._snapshots.clear()


class WeightsSnapshot:
    """What some modules were when their fingerprint was taken.

    Attributes:
        fingerprint: see `WeightsFingerprints`.
        unseen: what of the modules cannot be read, so that the fingerprint does not tell; None: everything was.
    """

    def __init__(self, modules: Sequence[nn.Module], storages: "_Storages"):
        self._states = states = ModuleStates(modules)
        self._attributes = [vars(module) for module in states.modules]
        contents = [getattr(module, name) for module in states.modules for name in COMPARED_CONTENTS]
        self._empty = [content for content in contents if not content]
        self._compared = self._attributes + [content for content in contents if content] + states.dicts
        self._keys = list(chain.from_iterable(states.dicts))
        self._classes = list({type(module) for module in states.modules})
        self._objects = list(self._present_objects())
        tensors = states.tensors
        self._unversioned = [tensor for tensor in tensors if tensor.is_inference()]
        self._versioned = [tensor for tensor in tensors if not tensor.is_inference()]
        self._layouts = self._present_layouts()
        self._samples = _Samples([tensor for tensor in tensors if not tensor.is_meta])
        self._values = self._samples.read()
        self.fingerprint = self._digest(storages)
        self.unseen = states.first_unseen(modules)

    def still_holds(self) -> bool:
        """Whether a fingerprint taken anew would be the same."""
        count = len(self._classes) + sum(map(len, self._compared)) + sum(map(len, self._states.sequences))
        return (
            not any(self._empty)
            and count == len(self._objects)
            and all(map(operator.is_, self._present_objects(), self._objects))
            and all(map(operator.eq, chain.from_iterable(self._states.dicts), self._keys))
            and self._states.volatile_unchanged()
            and self._present_layouts() == self._layouts
            and self._samples.read() == self._values
        )

    def _present_objects(self) -> Iterable[object]:
        """The forward of each class; every attribute; parameters, buffers, children, hooks, what containers hold."""
        return chain(
            map(_forward, self._classes),
            chain.from_iterable(map(dict.values, self._compared)),
            chain.from_iterable(self._states.sequences),
        )

    def _present_layouts(self) -> list:
        tensors = self._versioned + self._unversioned
        facts = chain.from_iterable(map(fact, tensors) for fact in LAYOUT_FACTS)
        return [*map(_version, self._versioned), *facts]

    def _digest(self, storages: "_Storages") -> bytes:
        digest = hashlib.blake2b(self._states.text.encode(), digest_size=DIGEST_BYTES)
        facts = [
            (
                storages.number(tensor),
                0 if tensor.is_meta else tensor.data_ptr(),
                -1 if tensor.is_inference() else tensor._version,
                tuple(tensor.shape),
                tensor.stride(),
                str(tensor.dtype),
                str(tensor.device),
            )
            for tensor in self._states.tensors
        ]
        digest.update(repr(facts).encode())
        digest.update(self._values)
        return digest.digest()


class _Storages:
    """Numbers of tensors' storages, none of them given twice: an address is free again when its tensor is gone."""

    def __init__(self):
        self._numbers: dict[int, tuple[object, int]] = {}
        self._next = 0
        self._kept = 1024  # entries after which expired ones are looked for
        self._lock = threading.Lock()

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage; of the tensor itself where it has none, as subclasses may."""
        try:
            storage = tensor.untyped_storage()
            address = storage._cdata
            reference = StorageWeakRef(storage)  # holds the place, not the memory
        except (RuntimeError, NotImplementedError, AttributeError):
            address, reference = -id(tensor), weakref.ref(tensor)
        with self._lock:
            known = self._numbers.get(address)
            if known is None or _is_gone(known[0]):
                self._numbers[address] = known = (reference, self._next)
                self._next += 1
            if len(self._numbers) > self._kept:
                self._numbers = {a: entry for a, entry in self._numbers.items() if not _is_gone(entry[0])}
                self._kept = max(1024, 2 * len(self._numbers))
            return known[1]


def _is_gone(reference) -> bool:
    return reference.expired() if isinstance(reference, StorageWeakRef) else reference() is None


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
