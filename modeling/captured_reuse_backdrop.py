"""Reused answers from captured CUDA graphs: `model.compile_reuse()`.

What a reused answer computes is short: the tower's layers over the fresh patches, the language model over the fresh
vision tokens and the question on top of a cached prefix. On a GPU its time is mostly the launching of kernels, which a
captured graph does at once. A graph has fixed shapes, so lengths are padded to buckets and the padding is masked:

- The language model: `n` new tokens padded on the right to `N`; the prefix's `c` keys and values lie in a static buffer,
  directly in front of those of the new tokens, behind padding on the left up to `C`. One graph for each (rows, C, N).
- The tower: the tokens of each group padded on the right. One graph for each (groups, bucket).

A value is the plain path's, up to rounding. A call that does not fit takes the plain path, see `CapturedReuse.stats`.

Shapes: `B` rows, `H` key/value heads, `d` head width, `D` text width; `G` groups, `W` tower width; `n <= N`, `c <= C`.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from .captured_graphs_backdrop import (
    CapturedGraphs,
    StaticPass,
    WeightAddresses,
    calling_refusal,
    capture_refusal,
)
from .grouped_vision_backdrop import run_layers

logger = logging.get_logger(__name__)

PREFIX_BUCKET = 64  # padding of a prefix costs attention alone
CAPACITY_STEP = 256  # the static buffer grows in these steps, and each growth costs its graphs
LANGUAGE_MODEL, TOWER = "language_model", "tower"


@dataclass(frozen=True)
class ReusedPrefix:
    """With what a cache was filled, kept with the cache until its next pass.

    `run_key`: of the language model, see `prefix_run_key`; `starts`: padding of each row; `length`: positions c;
    `sources`: the first stored tensor of each segment, which no other prefix shares.
    """

    run_key: bytes
    starts: tuple[int, ...]
    length: int
    sources: tuple[torch.Tensor, ...]


def run_language_model(model, past_key_values: Cache | None, **inputs) -> BaseModelOutputWithPast:
    """The language model over new tokens: from a captured graph where one is on and the call fits.

    Args:
        model: the `BackdropModel`.
        inputs: the language model's other arguments, `inputs_embeds [B, n, D]` among them.
    """
    reused = vars(past_key_values).pop("reused_prefix", None) if past_key_values is not None else None
    captured = model.compiled_reuse
    if captured is not None and reused is not None:
        outputs = captured.language_model(model, reused, past_key_values, **inputs)
        if outputs is not None:
            return outputs
    return model.language_model(past_key_values=past_key_values, return_dict=True, **inputs)


class CapturedReuse:
    """The captured passes of one model and their static tensors. Thread-safe: one pass runs at a time.

    Args:
        bucket: new tokens, and tokens of a group, are padded to multiples of it.
        max_bytes: bound on the static buffers of keys and values.
        max_graphs: bound on the graphs; the least recently used is dropped.
        max_batch: the most rows, and the most groups, of a pass; what is larger is not bound by launches.
        capture: False: the same padded passes without graphs, on any device, to compare with.

    Raises:
        ValueError: a number is less than 1.
    """

    def __init__(
        self,
        bucket: int = 32,
        max_bytes: int = 2 * 2**30,
        max_graphs: int = 32,
        max_batch: int = 1,
        capture: bool = True,
    ):
        self.options = {
            "bucket": bucket,
            "max_bytes": max_bytes,
            "max_graphs": max_graphs,
            "max_batch": max_batch,
        }
        for name, value in self.options.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; wanted 1 or more.")
        self.options["capture"] = capture
        self._lock = threading.RLock()
        self._graphs = CapturedGraphs(max_graphs, capture)
        self._modules: dict[str, _CheckedModules] = {}  # by what is captured, `LANGUAGE_MODEL` or `TOWER`
        self._buffers: dict[int, _PrefixBuffer] = {}  # by rows
        self._counts: dict[str, int] = {}
        self._fallbacks: dict[str, int] = {}
        self._failure: str | None = None

    # Graphs and locks cannot be copied; a copied model captures its own.
    def __deepcopy__(self, memo) -> "CapturedReuse":
        return CapturedReuse(**self.options)

    def __reduce__(self):
        return _from_options, (self.options,)

    def stats(self) -> dict:
        """Counters since it was made.

        `language_model`, `tower`: passes that ran here; `fallbacks`: passes behind a reused prefix, or over objects
        alone, that took the plain path, by reason; `captures`; `prefix_copies`: how often a prefix was copied into its
        buffer; `graphs`, `buffer_bytes`, `pool_bytes`: what is held now; `failure`: the error that ended capturing.
        """
        with self._lock:
            return {
                LANGUAGE_MODEL: self._counts.get(LANGUAGE_MODEL, 0),
                TOWER: self._counts.get(TOWER, 0),
                "fallbacks": dict(self._fallbacks),
                "captures": self._graphs.captures,
                "prefix_copies": self._counts.get("prefix_copies", 0),
                "graphs": len(self._graphs),
                "buffer_bytes": sum(buffer.keys_values.nbytes for buffer in self._buffers.values()),
                "pool_bytes": self._graphs.pool_bytes,
                "failure": self._failure,
            }

    def clear(self) -> None:
        """Drops every graph and buffer; the counters stay."""
        with self._lock:
            self._graphs.drop(lambda name: True)
            self._modules.clear()
            self._buffers.clear()

    def language_model(
        self,
        model,
        reused: ReusedPrefix,
        past_key_values: Cache,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **others,
    ) -> BaseModelOutputWithPast | None:
        """The language model over `inputs_embeds [B, n, D]` behind a prefix of c positions; None: it does not fit.

        Args:
            past_key_values: holds the prefix, and afterwards `c + n` positions in tensors of its own.
            attention_mask: `[B, c + n]`; position_ids: `[B, n]` or `[1, n]`. Both as in `BackdropModel.forward`.
        """
        rows, new, _ = inputs_embeds.shape
        if use_cache is False or any(value not in (None, False) for value in others.values()):
            refusal = "other arguments"
        elif attention_mask is not None and attention_mask.shape != (rows, reused.length + new):
            refusal = "another attention mask"
        elif position_ids is not None and (position_ids.ndim != 2 or position_ids.shape[1] != new):
            refusal = "other positions"
        elif model.config.num_prefusion_layers:
            refusal = "prefusion"
        else:
            refusal = _cache_refusal(past_key_values, reused, model.language_model)
        refusal = refusal or self._call_refusal(model, rows, inputs_embeds.device)

        def run() -> BaseModelOutputWithPast | str:
            checked = self._checked(
                LANGUAGE_MODEL, [model.language_model], reused.run_key, inputs_embeds.device
            )
            if checked.refusal is not None:
                return checked.refusal
            C, N = _up(reused.length, PREFIX_BUCKET), _up(new, self.options["bucket"])
            buffer = self._buffer(past_key_values, C, N)
            if buffer is None:
                return "max_bytes"
            name = (LANGUAGE_MODEL, rows, C, N)
            static = self._graphs.static_pass(
                name, lambda: _language_model_pass(model.language_model, inputs_embeds, buffer, C, N)
            )
            if not buffer.holds(reused):
                buffer.load(reused, past_key_values, C)
                self._count("prefix_copies")
            _fill_language_model_inputs(
                static.inputs, reused.length, C, inputs_embeds, attention_mask, position_ids
            )
            self._graphs.run(name)
            hidden = static.output[:, :new].clone()
            buffer.unload(past_key_values, reused.length, new)
            return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

        return self._guarded(LANGUAGE_MODEL, refusal, inputs_embeds.device, run)

    def tower_layers(
        self,
        model,
        run_key: bytes,
        layers: nn.ModuleList,
        tokens: torch.Tensor,
        lengths: list[int],
        depths: list[int],
    ) -> list[torch.Tensor] | None:
        """The tower's layers over groups of their own; None: they do not fit.

        Args:
            run_key: of the tower, see `tokens_run_key`.
            layers: of the tower; all of them take a mask.
            tokens: `[sum of lengths, W]`, embedded; lengths: tokens of each group, CLS included.
            depths: how many layers to run, see `run_layers`.

        Returns:
            `G` tensors `[length, W * len(depths)]`.
        """
        groups, device = len(lengths), tokens.device
        refusal = self._call_refusal(model, groups, device)

        def run() -> list[torch.Tensor] | str:
            checked = self._checked(TOWER, [layers], run_key, device)
            if checked.refusal is not None:
                return checked.refusal
            length = _up(max(lengths), self.options["bucket"])
            name = (TOWER, groups, length, *depths)
            static = self._graphs.static_pass(
                name, lambda: _tower_pass(layers, tokens, groups, length, depths)
            )
            hidden, attended = static.inputs["hidden"], static.inputs["attended"]
            hidden.zero_()
            attended.zero_()
            for g, part in enumerate(tokens.split(lengths)):
                hidden[g, : part.shape[0]] = part
                attended[g, : part.shape[0]] = True
            self._graphs.run(name)
            states = static.output.clone()
            return [states[g, :count] for g, count in enumerate(lengths)]

        return self._guarded(TOWER, refusal, device, run)

    def _call_refusal(self, model, rows: int, device: torch.device) -> str | None:
        """What does not fit a call, whatever it runs; None: it fits."""
        if self._failure is not None:
            return "failure"
        if model.training:
            return "training"
        if rows > self.options["max_batch"]:
            return "batch"
        return calling_refusal(device)

    def _guarded(self, what: str, refusal: str | None, device: torch.device, run: Callable):
        """What `run` returns, one thread at a time; None and counted where it is refused, by a reason, or fails."""
        with self._lock:
            result = refusal
            if refusal is None:
                try:
                    with self._graphs.in_order(device):
                        result = run()
                except Exception as error:  # whatever goes wrong here, the plain path has the answer
                    result = self._give_up(what, error)
            if isinstance(result, str):
                self._fallbacks[result] = self._fallbacks.get(result, 0) + 1
                return None
            self._count(what)
            return result

    def _give_up(self, what: str, error: Exception) -> str:
        """Ends capturing for good after an error."""
        self._failure = f"{what}: {type(error).__name__}: {error}"[:500]
        logger.warning_once(
            f"compile_reuse is off from here on, and answers come from the plain path: {self._failure}"
        )
        try:
            self.clear()
        except RuntimeError:  # the device itself is in error: the plain path will say so
            self._graphs = CapturedGraphs(self.options["max_graphs"], self.options["capture"])
            self._modules, self._buffers = {}, {}
        return "failure"

    def _checked(
        self, what: str, modules: list[nn.Module], run_key: bytes, device: torch.device
    ) -> "_CheckedModules":
        """The modules' check, made anew, and their graphs dropped, when the weights' key or an address has changed."""
        checked = self._modules.get(what)
        if checked is None or checked.run_key != run_key or not checked.is_valid(device):
            self._graphs.drop(lambda name: name[0] == what)
            checked = self._modules[what] = _CheckedModules.of(
                modules, run_key, device, self.options["capture"]
            )
        return checked

    def _buffer(self, cache: Cache, C: int, N: int) -> "_PrefixBuffer | None":
        """The static buffer for the rows of a cache, with room for C and N positions; None: over `max_bytes`."""
        keys = cache.layers[0].keys
        rows = keys.shape[0]
        buffer = self._buffers.get(rows)
        if buffer is not None and buffer.has_room(keys, C, N):
            return buffer
        prefix, new = _up(C, CAPACITY_STEP), _up(N, CAPACITY_STEP)
        if buffer is not None:
            prefix, new = max(prefix, buffer.prefix), max(new, buffer.new)
        needed = 2 * len(cache.layers) * keys[:, :, :1].nbytes * (prefix + new)
        others = sum(other.keys_values.nbytes for r, other in self._buffers.items() if r != rows)
        if needed + others > self.options["max_bytes"]:
            return None
        self._graphs.drop(lambda name: name[:2] == (LANGUAGE_MODEL, rows))
        self._buffers.pop(rows, None)
        del buffer  # its memory goes before the new one's comes
        self._buffers[rows] = _PrefixBuffer(cache, prefix, new)
        return self._buffers[rows]

    def _count(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1


@dataclass(frozen=True)
class _CheckedModules:
    """Modules under one weights' key: where their weights are, and why they cannot be captured (None: they can)."""

    run_key: bytes
    device: torch.device
    addresses: WeightAddresses
    refusal: str | None

    @classmethod
    def of(cls, modules, run_key: bytes, device: torch.device, capture: bool) -> "_CheckedModules":
        refusals = (capture_refusal(module, device, capture) for module in modules)
        refusal = next((refusal for refusal in refusals if refusal is not None), None)
        # Weights that are refused may have no address, and need none.
        return cls(run_key, device, WeightAddresses(() if refusal else modules), refusal)

    def is_valid(self, device: torch.device) -> bool:
        return device == self.device and self.addresses.unchanged()


class _PrefixBuffer:
    """Keys and values of all layers, `[2 * layers, B, H, prefix + new, d]`, at fixed addresses.

    A prefix ends at `prefix`, and new tokens begin there, whatever their numbers: all graphs of B rows share it.

    Args:
        cache: filled, for the shapes.
        prefix, new: room for so many positions.
    """

    def __init__(self, cache: Cache, prefix: int, new: int):
        self.prefix, self.new = prefix, new
        keys = cache.layers[0].keys
        rows, heads, _, width = keys.shape
        with torch.inference_mode(False):
            self.keys_values = torch.zeros(
                (2 * len(cache.layers), rows, heads, prefix + new, width),
                dtype=keys.dtype,
                device=keys.device,
            )
        self._held: tuple | None = None

    def has_room(self, keys: torch.Tensor, C: int, N: int) -> bool:
        """Whether C and N positions of keys such as these fit."""
        own = self.keys_values
        alike = (keys.dtype, keys.device, keys.shape[1], keys.shape[3])
        return (
            self.prefix >= C
            and self.new >= N
            and alike == (own.dtype, own.device, own.shape[2], own.shape[4])
        )

    def window(self, before: int, behind: int) -> torch.Tensor:
        """The last `before` positions of the prefix and the first `behind` new ones, `[2 * layers, B, H, ., d]`."""
        return self.keys_values[:, :, :, self.prefix - before : self.prefix + behind]

    def holds(self, reused: ReusedPrefix) -> bool:
        """Whether this very prefix was loaded last.

        Known by the stored tensors themselves and not by their key: after `BackgroundCache.clear` the same key may
        stand for other values.
        """
        if self._held is None or self._held[:2] != (reused.starts, reused.length):
            return False
        held = self._held[2]
        return len(held) == len(reused.sources) and all(
            reference() is source for reference, source in zip(held, reused.sources, strict=True)
        )

    def load(self, reused: ReusedPrefix, cache: Cache, C: int) -> None:
        """Copies the prefix that a cache holds, behind zeros up to C positions."""
        self._held = None  # until everything is there
        self.window(C, 0)[:, :, :, : C - reused.length].zero_()
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        torch._foreach_copy_(list(self.window(reused.length, 0)), tensors)
        self._held = (reused.starts, reused.length, tuple(map(weakref.ref, reused.sources)))

    def unload(self, cache: Cache, length: int, new: int) -> None:
        """Gives a cache its prefix of `length` positions and `new` computed ones, in one copy for all layers."""
        copied = self.window(length, new).clone(memory_format=torch.contiguous_format)
        for i, layer in enumerate(cache.layers):
            layer.keys, layer.values = copied[2 * i], copied[2 * i + 1]


class _WindowLayer(DynamicLayer):
    """A layer of a cache in a `_PrefixBuffer`: new keys and values are written behind the prefix, in place."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, prefix: int):
        super().__init__()
        self.prefix = prefix
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, self.prefix :].copy_(key_states)
        self.values[:, :, self.prefix :].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.prefix


def _language_model_pass(
    language_model: nn.Module, like: torch.Tensor, buffer: _PrefixBuffer, C: int, N: int
) -> StaticPass:
    """The pass over N new tokens behind C; `like [B, ., D]` gives rows, width, dtype and device."""
    rows, _, width = like.shape
    device = like.device
    inputs = {
        "inputs_embeds": torch.zeros((rows, N, width), dtype=like.dtype, device=device),
        "position_ids": torch.zeros((rows, N), dtype=torch.long, device=device),
        "attended": torch.zeros((rows, C + N), dtype=torch.bool, device=device),
    }
    output = torch.zeros_like(inputs["inputs_embeds"])
    window = buffer.window(C, N)
    cache = DynamicCache()
    cache.layers = [_WindowLayer(window[i], window[i + 1], C) for i in range(0, window.shape[0], 2)]
    causal = torch.ones((N, C + N), dtype=torch.bool, device=device).tril(C)
    itself = torch.zeros_like(causal)
    itself.diagonal(C).fill_(True)

    def function() -> None:
        # Each position attends to itself, so that no row of the softmax is empty; padding is read by nobody.
        allowed = (inputs["attended"][:, None, None, :] & causal) | itself
        hidden = language_model(
            inputs_embeds=inputs["inputs_embeds"],
            attention_mask=_additive(allowed, like.dtype),  # four dimensions: transformers takes it as it is
            position_ids=inputs["position_ids"],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        output.copy_(hidden)

    return StaticPass(inputs, output, function)


def _fill_language_model_inputs(
    static: dict[str, torch.Tensor],
    length: int,
    C: int,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> None:
    """Puts the arguments of a call with `length` cached positions into the static tensors, padding included."""
    new = inputs_embeds.shape[1]
    static["inputs_embeds"][:, :new] = inputs_embeds
    static["inputs_embeds"][:, new:].zero_()
    if position_ids is None:
        position_ids = torch.arange(length, length + new, device=inputs_embeds.device)[None]
    static["position_ids"][:, :new] = position_ids
    static["attended"].zero_()
    static["attended"][:, C - length : C + new] = True if attention_mask is None else attention_mask.bool()


def _tower_pass(
    layers: nn.ModuleList, tokens: torch.Tensor, groups: int, length: int, depths: list[int]
) -> StaticPass:
    """The tower's layers over `groups` groups of up to `length` tokens; `tokens [., W]` gives width, dtype, device."""
    shape = (groups, length)
    hidden = tokens.new_zeros((*shape, tokens.shape[1]))
    attended = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    output = tokens.new_zeros((*shape, tokens.shape[1] * len(depths)))

    def function() -> None:
        allowed = attended[:, None, None, :].expand(groups, 1, length, length)
        output.copy_(run_layers(layers, hidden, _additive(allowed, hidden.dtype), depths))

    return StaticPass({"hidden": hidden, "attended": attended}, output, function)


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to scores: 0 where `allowed`, -inf elsewhere; made once for all layers."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, float("-inf")
    )


def _cache_refusal(cache: Cache, reused: ReusedPrefix, language_model: nn.Module) -> str | None:
    """Why the language model cannot run on a static copy of this cache; None: it can."""
    config = language_model.config
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return "another cache"
    if len(cache.layers) != config.num_hidden_layers or cache.get_seq_length() != reused.length:
        return "another cache"
    if len({tensor.shape for layer in cache.layers for tensor in (layer.keys, layer.values)}) != 1:
        return "layers of several shapes"
    if not getattr(language_model, "_can_compile_fullgraph", False):
        return "language model"
    if config._attn_implementation not in ("sdpa", "eager"):
        return "attention implementation"
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return "other arguments"
    return None


def _up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step


def _from_options(options: dict) -> CapturedReuse:
    return CapturedReuse(**options)
