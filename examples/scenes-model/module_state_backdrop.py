"""What of a module its tensors do not show: plain attributes, the code of its forward, and hooks.

A stored value depends on all of it: a norm's eps, an attention's scaling, an adapter's strength. What can be read is
described in a text that is equal in every process. What cannot be read (a hook of somebody else's, a replaced
`forward`, an object written in C) is named instead, and what it concerns is not kept in the background cache.
"""

import builtins
import enum
import functools
import hashlib
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import PurePath

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .adapter_rows_backdrop import is_adapter_hook

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
PRINTED = (
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    *(enum.Enum, slice, range, np.generic, np.dtype, PurePath),
)
MAX_ARRAY_BYTES = 2**16  # of a numpy array among a module's attributes, which is read in full at every call

# Attributes that are bookkeeping of torch, transformers, accelerate and of this model: no forward reads them.
IGNORED = frozenset(vars(nn.Module())) - {"training"}
IGNORED |= {
    "forward",
    "_compiled_call_impl",
    "_hf_hook",
    "_old_forward",
    "_background_cache",
    "_compiled_reuse",
}
IGNORED |= {
    "_is_hf_initialized",
    "_output_capturing_hooks_installed",
    "_ep_plan",
    "_fsdp_plan",
    "_pp_plan",
    "_tp_plan",
}
IGNORED |= {"_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_keys_to_ignore_on_load_missing"}
IGNORED |= {"_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_save", "_no_split_modules"}
IGNORED |= {"_skip_keys_device_placement", "all_tied_weights_keys", "generation_config", "hf_device_map"}
IGNORED |= {"hf_quantizer", "loss_type", "name_or_path", "warnings_issued", "_hf_peft_config_loaded"}
# The same of a configuration.
IGNORED |= {"_name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map"}

# Whose hooks change no value, or are described by tensors and attributes alone. Of peft's own hooks most depend on a
# call's arguments; those for the adapters of single rows are handled (`adapter_rows_backdrop`).
HOOK_LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "peft.peft_model",
    "peft.mixed_model",
    "peft.utils",
)
LIBRARIES = frozenset({"torch", "transformers", "accelerate", "bitsandbytes", "peft"})
GLOBAL_HOOKS = (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)


class ModuleStates:
    """The states of some modules and of everything below them.

    Attributes:
        modules: every module once, in a fixed order.
        tensors: parameters, buffers and tensors among other attributes.
        text: what was read beside them, equal in every process for equal modules.
        unseen: (module, what) for everything that cannot be read; the module is None for global hooks.
        dicts, sequences: containers found among the attributes, whose contents may change in place.
    """

    def __init__(self, roots: Sequence[nn.Module]):
        self.modules: list[nn.Module] = []
        self.tensors: list[torch.Tensor] = []
        self.unseen: list[tuple[nn.Module | None, str]] = []
        self.dicts: list[dict] = list(GLOBAL_HOOKS)
        self.sequences: list[Collection] = []
        self._volatile: list[object] = []  # read again at every call
        self._numbers: dict[int, int] = {}  # by id of what was described, all of it held by `_held`
        self._held: list[object] = []
        self._classes: dict[type, str] = {}
        self._owner: nn.Module | None = None
        texts: list[str] = []
        for hooks in GLOBAL_HOOKS:
            self._check_hooks(None, hooks.values(), "global forward hook")
        for module in self._walk(roots):
            self._owner = module
            texts += self._module_text(module)
        self.text = "\n".join(texts)
        self._volatile_texts = self._read_volatile()

    def volatile_unchanged(self) -> bool:
        """Whether what no comparison of objects can see, such as an array, is as it was."""
        return not self._volatile or self._read_volatile() == self._volatile_texts

    def first_unseen(self, roots: Sequence[nn.Module]) -> str | None:
        """What cannot be read, with the module's name below its root; None: everything was."""
        if not self.unseen:
            return None
        module, what = self.unseen[0]
        if module is None:
            return what
        names = (
            f"{type(root).__name__}.{name}".rstrip(".")
            for root in roots
            for name, other in root.named_modules()
            if other is module
        )
        return f"{what} of {next(names, type(module).__name__)}"

    # ---- modules

    def _walk(self, roots: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """Every module once. Those that `describe` finds in plain attributes come after the others."""
        self._stack, seen = list(reversed(roots)), set()
        while self._stack:
            module = self._stack.pop()
            if id(module) not in seen:
                seen.add(id(module))
                self.modules.append(module)
                self._stack.extend(child for child in reversed(module._modules.values()) if child is not None)
                yield module

    def _module_text(self, module: nn.Module) -> Iterator[str]:
        yield self._class_text(module)
        attributes = vars(module)
        for name in sorted(attributes.keys() - IGNORED):
            yield f"{name}={self.describe(attributes[name])}"
        self.tensors += [t for t in module._parameters.values() if t is not None]
        self.tensors += [t for t in module._buffers.values() if t is not None]
        self._check_hooks(module, module._forward_hooks.values(), "forward hook")
        self._check_hooks(module, module._forward_pre_hooks.values(), "forward pre-hook")
        if "forward" in attributes and not _is_own_forward(module, attributes["forward"]):
            self.unseen.append((module, f"a replaced forward ({_name(attributes['forward'])})"))
        if "_hf_hook" in attributes:
            yield self._accelerate_text(module, attributes["_hf_hook"])
        if attributes.get("_compiled_call_impl") is not None:
            yield "compiled"

    def _class_text(self, module: nn.Module) -> str:
        """A module's class and the code of its forward."""
        cls = type(module)
        if cls not in self._classes:
            forward = cls.forward
            self._classes[cls] = f"{cls.__qualname__}:{code_digest(forward)}"
            own = {base.__module__.partition(".")[0] for base in cls.__mro__}
            foreign = [part for part in functions_of(forward) if not _comes_from(part, own | LIBRARIES)]
            if foreign:
                self._classes[cls] += "!"
        if self._classes[cls].endswith("!"):
            self.unseen.append((module, f"a replaced forward ({_name(cls.forward)}) in the class"))
        return self._classes[cls]

    def _accelerate_text(self, module: nn.Module, hook) -> str:
        """accelerate's hook around a module's forward; one of another origin is not seen through."""
        hooks = getattr(hook, "hooks", (hook,))
        for part in hooks:
            if not type(part).__module__.startswith("accelerate."):
                self.unseen.append((module, f"an accelerate hook ({type(part).__qualname__})"))
        plain = [
            f"{name}={value!r}"
            for part in hooks
            for name, value in sorted(vars(part).items())
            if isinstance(value, PLAIN + PRINTED)
        ]
        return "|".join([*(type(part).__qualname__ for part in hooks), *plain])

    def _check_hooks(self, module: nn.Module | None, hooks: Iterable[Callable], what: str) -> None:
        for hook in hooks:
            if is_adapter_hook(hook):
                continue
            if not all(_is_library_hook(part) for part in functions_of(hook)):
                self.unseen.append((module, f"a {what} ({_name(hook)})"))

    # ---- attributes

    def describe(self, value) -> str:
        """The text of one attribute's value; containers, tensors and modules in it are noted on the way."""
        if isinstance(value, PLAIN):
            return repr(value)
        if isinstance(value, PRINTED):
            return str(value)
        number = self._numbers.get(id(value))
        if number is not None:
            return f"<{number}>"
        self._numbers[id(value)] = len(self._numbers)
        self._held.append(value)
        if isinstance(value, torch.Tensor):
            self.tensors.append(value)
            return "tensor"
        if isinstance(value, nn.Module):
            self._stack.insert(0, value)
            return type(value).__qualname__
        if isinstance(value, dict):
            self.dicts.append(value)
            return self._items_text(value)
        if isinstance(value, list | tuple | deque):
            if not isinstance(value, tuple):
                self.sequences.append(value)
            return f"{type(value).__name__}[{', '.join(map(self.describe, value))}]"
        if isinstance(value, set | frozenset):
            if isinstance(value, set):
                self.sequences.append(value)
            return f"{{{', '.join(sorted(map(self.describe, value)))}}}"
        return self._object_text(value)

    def _items_text(self, items: dict) -> str:
        parts = (
            f"{key if isinstance(key, str) else self.describe(key)}: {self.describe(item)}"
            for key, item in items.items()
            if key not in IGNORED
        )
        return f"{{{', '.join(parts)}}}"

    def _object_text(self, value) -> str:
        if isinstance(value, np.ndarray):
            if value.nbytes > MAX_ARRAY_BYTES or value.dtype.hasobject:
                self.unseen.append((self._owner, f"an array of {value.nbytes} bytes and type {value.dtype}"))
                return "array"
            self._volatile.append(value)
            digest = hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
            return f"array {value.dtype.str} {value.shape} {digest}"
        if callable(value) and not hasattr(value, "__dict__") or isinstance(value, CODE_TYPES):
            if any(getattr(part, "__closure__", None) for part in functions_of(value)):
                self._volatile.append(value)
            return code_digest(value)
        if isinstance(value, weakref.ref) or type(value).__module__ in (
            "_thread",
            "threading",
            "_contextvars",
        ):
            return type(value).__qualname__
        state, found = {}, False
        if hasattr(value, "__dict__"):
            self.dicts.append(vars(value))
            state, found = dict(vars(value)), True
        slots = [name for cls in type(value).__mro__ for name in _slots(cls)]
        if slots:
            self._volatile.append(value)
            state |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
        if not found and not slots and not type(value).__module__.startswith("torch"):
            self.unseen.append(
                (self._owner, f"an attribute of type {type(value).__module__}.{type(value).__qualname__}")
            )
        return f"{type(value).__qualname__}{self._items_text(state)}"

    def _read_volatile(self) -> list:
        return [_volatile_text(value) for value in self._volatile]


CODE_TYPES = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, functools.partial)


def functions_of(code) -> list[object]:
    """A callable, and the functions that it wraps or holds in its closure; what is no Python function as it is."""
    found: list[object] = []
    stack, seen = [code], set()
    while stack:
        part = stack.pop()
        if isinstance(part, functools.partial):
            stack.append(part.func)
            continue
        part = getattr(part, "__func__", part)
        if id(part) in seen:
            continue
        seen.add(id(part))
        found.append(part)
        if isinstance(part, types.FunctionType):
            cells = [cell.cell_contents for cell in part.__closure__ or () if _is_filled(cell)]
            stack += [cell for cell in cells if isinstance(cell, CODE_TYPES) and not isinstance(cell, type)]
        wrapped = getattr(part, "__wrapped__", None)
        if wrapped is not None:
            stack.append(wrapped)
    return found


def code_digest(code) -> str:
    """A callable's name and a digest of what it does: its code, defaults, and the plain values in its closure.

    Equal in every process of one Python version. What a function reads elsewhere is not in it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in functions_of(code):
        name = getattr(part, "__qualname__", type(part).__qualname__)
        digest.update(name.encode())
        if isinstance(part, types.FunctionType):
            cells = [cell.cell_contents for cell in part.__closure__ or () if _is_filled(cell)]
            values = [*cells, *(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values()]
            digest.update("|".join([_code_text(part.__code__), *map(_value_text, values)]).encode())
    if isinstance(code, functools.partial):
        digest.update("|".join(map(_value_text, (*code.args, *code.keywords.values()))).encode())
    return f"{getattr(code, '__qualname__', type(code).__qualname__)}#{digest.hexdigest()}"


def _code_text(code: types.CodeType) -> str:
    consts = [_code_text(c) if isinstance(c, types.CodeType) else _value_text(c) for c in code.co_consts]
    return f"{code.co_code.hex()}{consts}{code.co_names}{code.co_varnames}{code.co_freevars}"


def _value_text(value) -> str:
    """A value in a closure or among constants: what is plain as it is, anything else by its type."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, PRINTED):
        return str(value)
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_value_text, value))})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_value_text, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_value_text(k)}: {_value_text(v)}' for k, v in value.items())}}}"
    return type(value).__qualname__


def _volatile_text(value) -> object:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, CODE_TYPES):
        return code_digest(value)
    names = [name for cls in type(value).__mro__ for name in _slots(cls)]
    return [_value_text(getattr(value, name, None)) for name in names]


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    slots = (slots,) if isinstance(slots, str) else slots
    return [name for name in slots if name not in ("__dict__", "__weakref__")]


def _is_filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _origin(part) -> str:
    """The name of the module in which a function, or the class of a callable object, was really defined.

    By its globals: `functools.wraps` copies the name that a function shows.
    """
    if isinstance(part, types.FunctionType):
        return part.__globals__.get("__name__") or ""
    if isinstance(part, type | types.BuiltinFunctionType | types.BuiltinMethodType):
        return part.__module__ or builtins.__name__
    return type(part).__module__


def _comes_from(part, packages: Iterable[str]) -> bool:
    root = _origin(part).partition(".")[0]
    return root in packages or (
        root in sys.stdlib_module_names
        and root != "__main__"
        and isinstance(part, types.FunctionType | types.BuiltinFunctionType)
    )


def _is_library_hook(part) -> bool:
    origin = _origin(part)
    return any(origin == library or origin.startswith(f"{library}.") for library in HOOK_LIBRARIES)


def _is_own_forward(module: nn.Module, forward) -> bool:
    """Whether a module's own attribute `forward` runs the forward of its class after all."""
    cls = type(module)
    if getattr(forward, "__self__", None) is module:
        return forward.__func__ is cls.forward
    if isinstance(forward, functools.partial) and _origin(forward.func) == "accelerate.hooks":
        return _is_own_forward(module, vars(module).get("_old_forward"))
    return cls.__module__.startswith("torch._dynamo.")


def _name(code) -> str:
    """Where a callable comes from, for a message: the first part of it that is not a library's, if there is one."""
    parts = functions_of(code)
    part = next((part for part in parts if not _comes_from(part, LIBRARIES)), parts[0])
    return f"{_origin(part)}.{getattr(part, '__qualname__', type(part).__qualname__)}"
