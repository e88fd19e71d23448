"""Passes over static tensors, run from captured CUDA graphs: one launch instead of hundreds.

A CUDA graph holds addresses. Its inputs and outputs are therefore tensors that stay where they are (a `StaticPass`), and
it is valid as long as the weights stay where they were (`WeightAddresses`) and no module runs code of others'
(`capture_refusal`). See torch's notes, "CUDA Graphs": a warm-up on a side stream, no synchronisation inside, a private
memory pool.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

WARM_UP_RUNS = 2


@dataclass
class StaticPass:
    """A function that reads `inputs` and writes `output`, all of them tensors that are allocated once.

    `function` takes and returns nothing, and never waits for the device.
    """

    inputs: dict[str, torch.Tensor]
    output: torch.Tensor
    function: Callable[[], None]


class CapturedGraphs:
    """Static passes by name, each captured into a CUDA graph when it first runs. Not thread-safe by itself.

    All graphs share one memory pool: they run one after the other, and nothing that outlives a pass lies in it.

    Args:
        max_graphs: passes that are kept; the least recently used one is dropped.
        capture: False: Python runs each function every time, on any device.
    """

    def __init__(self, max_graphs: int, capture: bool = True):
        self.max_graphs = max_graphs
        self.capture = capture
        self.captures = 0  # since it was made
        self.pool_bytes = 0  # what capturing added to the memory that torch has reserved
        self._passes: OrderedDict[Hashable, tuple[StaticPass, torch.cuda.CUDAGraph | None]] = OrderedDict()
        self._pool = None
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._last_run: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._passes)

    def static_pass(self, name: Hashable, build: Callable[[], StaticPass]) -> StaticPass:
        """The pass of that name, from `build` where it is new. Its inputs are then to be filled, and `run` called."""
        if name not in self._passes:
            while len(self._passes) >= self.max_graphs:
                self._drop([next(iter(self._passes))])
            # Static tensors made in inference mode could not be written outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._passes[name] = (build(), None)
        self._passes.move_to_end(name)
        return self._passes[name][0]

    def run(self, name: Hashable) -> None:
        """Runs a pass on what its inputs hold: its `output` is filled, in the order of the current stream."""
        static, graph = self._passes[name]
        if not self.capture:
            with torch.inference_mode(False), torch.no_grad():
                static.function()
            return
        if graph is None:
            graph = self._captured(static)
            self._passes[name] = (static, graph)
        graph.replay()

    @contextlib.contextmanager
    def in_order(self, device: torch.device) -> Iterator[None]:
        """Inside, static tensors may be written and read: behind the previous use, on whichever stream that was."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if self._last_run is None:
            self._last_run = torch.cuda.Event()
        stream.wait_event(self._last_run)
        try:
            yield
        finally:
            self._last_run.record(stream)

    def drop(self, wanted: Callable[[Hashable], bool]) -> None:
        """Drops the passes whose names are `wanted`."""
        self._drop([name for name in self._passes if wanted(name)])

    def _drop(self, names: list[Hashable]) -> None:
        if not names:
            return
        if any(self._passes[name][1] is not None for name in names):
            torch.cuda.synchronize()  # a graph that runs must not lose its memory
        for name in names:
            _, graph = self._passes.pop(name)
            if graph is not None:
                graph.reset()
        if all(graph is None for _, graph in self._passes.values()):
            self._pool, self.pool_bytes = None, 0  # the last graph has released it

    def _captured(self, static: StaticPass) -> torch.cuda.CUDAGraph:
        """Warms the function up, which computes the output once already, and captures it."""
        device = static.output.device
        # torch.cuda.graph does not go back to the caller's stream when a capture fails; the outer context does.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            if self._streams is None:
                self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device))
            warm_up, capturing = self._streams
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.inference_mode(False), torch.no_grad():
                warm_up.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(warm_up):
                    for _ in range(WARM_UP_RUNS):
                        static.function()
                torch.cuda.current_stream(device).wait_stream(warm_up)
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
                reserved = torch.cuda.memory_reserved(device)
                graph = torch.cuda.CUDAGraph()
                # "thread_local": what other threads do meanwhile (allocate, copy to the host) is no error.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=capturing, capture_error_mode="thread_local"
                ):
                    static.function()
                self.pool_bytes += max(0, torch.cuda.memory_reserved(device) - reserved)
        self.captures += 1
        return graph


class WeightAddresses:
    """Where every parameter and buffer of some modules lies.

    Args:
        modules: their submodules included.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        owners = list(dict.fromkeys(owner for module in modules for owner in module.modules()))
        self._tensors = [
            (tensors, name, tensor.data_ptr())
            for owner in owners
            for tensors in (owner._parameters, owner._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]

    def unchanged(self) -> bool:
        """Whether all are where they were."""
        for tensors, name, address in self._tensors:
            tensor = tensors.get(name)
            if tensor is None or tensor.data_ptr() != address:
                return False
        return True


def capture_refusal(module: nn.Module, device: torch.device, capture: bool = True) -> str | None:
    """Why a module's forward may not run from a graph that was captured once; None: it may.

    Args:
        device: where its inputs are.
        capture: whether a graph is captured at all, which only CUDA can.
    """
    if capture and device.type != "cuda":
        return "no CUDA device"
    for part in module.modules():
        # Hooks run Python that a graph would leave out; accelerate replaces `forward` to move weights.
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if "forward" in vars(part) or not all(map(_only_collects, hooks)):
            return "hooks"
        if getattr(part, "_compiled_call_impl", None) is not None:
            return "torch.compile"
        rope_type = getattr(part, "rope_type", "")  # a string, or one for each type of layer
        if "dynamic" in str(rope_type) or "longrope" in str(rope_type):
            return "positions that depend on the length"
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is None:
                continue
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                return "quantised or sharded weights"
            if tensor.device != device:
                return "several devices"
    return None


def _only_collects(hook: Callable) -> bool:
    """Whether a hook is transformers' own for `output_hidden_states`, which does nothing unless it is asked for."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def calling_refusal(device: torch.device) -> str | None:
    """Why the present call, whatever it computes, may not run from a captured graph; None: it may."""
    if torch.is_grad_enabled():
        return "gradients"
    if torch.compiler.is_compiling():
        return "torch.compile"
    if torch.is_autocast_enabled(device.type):
        return "autocast"  # its copies of the weights live for one call only
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "inside another capture"
    return None
