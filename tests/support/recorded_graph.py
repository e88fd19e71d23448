"""A CUDA graph's stand-in on the CPU: operations are recorded once and repeated on the same tensors, without Python."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import backdrop.modeling.captured_graphs_backdrop as graphs_module
import backdrop.modeling.captured_reuse_backdrop as reuse_module

# What makes the host wait, or copies from it: an error in a real capture.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "unique")


class RecordedGraph(TorchDispatchMode):
    """Inside `with`, operations are recorded; `replay` repeats them into the tensors that they filled then."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name.startswith(FORBIDDEN):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def reset(self):
        self.calls = None


def capture_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile_reuse(capture=True)` records on the CPU from here on."""

    def captured(self, static):
        with torch.inference_mode(False), torch.no_grad():
            static.function()
            graph = RecordedGraph()
            with graph:
                static.function()
        # A real capture computes nothing: what it would leave behind is not to be relied on.
        static.output.fill_(float("nan"))
        self.captures += 1
        return graph

    refusal = graphs_module.capture_refusal
    monkeypatch.setattr(graphs_module.CapturedGraphs, "_captured", captured)
    monkeypatch.setattr(
        reuse_module, "capture_refusal", lambda part, device, capture: refusal(part, device, False)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
