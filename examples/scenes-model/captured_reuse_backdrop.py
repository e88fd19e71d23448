"""Reused answers from captured CUDA graphs: `model.compile_reuse()`.

What a reused answer computes is short: the tower's layers over the fresh patches, the language model over the fresh
vision tokens and the question on top of a cached prefix. On a GPU its time is mostly the launching of kernels, which a
captured graph does at once. A graph has fixed shapes, so lengths are padded to buckets and the padding is masked
(`static_passes_backdrop`): one graph for each size of the language model's pass (rows, padded prefix, padded new tokens)
and of the tower's (groups, padded tokens).

A value is the plain path's, up to rounding. A call that does not fit takes the plain path, see `CapturedReuse.stats`.

Shapes: `B` rows, `n` new tokens, `c` cached positions, `D` text width; `G` groups, `W` tower width; padded: `N`, `C`.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from .cache_options_backdrop import byte_count, flag, whole_number
from .captured_graphs_backdrop import (
    CapturedGraphs,
    WeightAddresses,
    calling_refusal,
    capture_refusal,
)
from .static_passes_backdrop import (
    PrefixBuffer,
    ReusedPrefix,
    fill_language_model_inputs,
    language_model_pass,
    next_multiple,
    tower_pass,
)

logger = logging.get_logger(__name__)

PREFIX_BUCKET = 64  # padding of a prefix costs attention alone
CAPACITY_STEP = 256  # the static buffer grows in these steps, and each growth costs its graphs
LANGUAGE_MODEL, TOWER = "language_model", "tower"


def run_language_model(model, past_key_values: Cache | None, **inputs) -> BaseModelOutputWithPast:
    """The language model over new tokens: from a captured graph where one is on and the call fits.

    Args:
        model: the `BackdropModel`.
        inputs: the language model's other arguments, `inputs_embeds [B, n, D]` among them.
    """
    reused = vars(past_key_values).pop("reused_prefix", None) if past_key_values is not None else None
    captured = model.compiled_reuse
    if captured is not None and reused is not None and not torch.compiler.is_compiling():
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
        ValueError: an option is of the wrong type, or less than 1.
    """

    def __init__(
        self,
        bucket: int = 32,
        max_bytes: int | str = 2 * 2**30,
        max_graphs: int = 32,
        max_batch: int = 1,
        capture: bool = True,
    ):
        self.options = {
            "bucket": whole_number("bucket", bucket),
            "max_bytes": byte_count("max_bytes", max_bytes, 1),
            "max_graphs": whole_number("max_graphs", max_graphs),
            "max_batch": whole_number("max_batch", max_batch),
            "capture": flag("capture", capture),
        }
        self._lock = threading.RLock()
        self._graphs = CapturedGraphs(max_graphs, capture)
        self._modules: dict[str, _CheckedModules] = {}  # by what is captured, `LANGUAGE_MODEL` or `TOWER`
        self._buffers: dict[int, PrefixBuffer] = {}  # by rows
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
        if use_cache is False or any(value is not None and value is not False for value in others.values()):
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
            C, N = next_multiple(reused.length, PREFIX_BUCKET), next_multiple(new, self.options["bucket"])
            buffer = self._buffer(past_key_values, C, N)
            if buffer is None:
                return "max_bytes"
            name = (LANGUAGE_MODEL, rows, C, N)
            static = self._graphs.static_pass(
                name, lambda: language_model_pass(model.language_model, inputs_embeds, buffer, C, N)
            )
            if not buffer.holds(reused):
                buffer.load(reused, past_key_values, C)
                self._count("prefix_copies")
            fill_language_model_inputs(
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
            length = next_multiple(max(lengths), self.options["bucket"])
            name = (TOWER, groups, length, *depths)
            static = self._graphs.static_pass(
                name, lambda: tower_pass(layers, tokens, groups, length, depths)
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
            if checked.refusal is not None:
                logger.warning_once(f"compile_reuse cannot capture the {what}: {checked.refusal}.")
        return checked

    def _buffer(self, cache: Cache, C: int, N: int) -> "PrefixBuffer | None":
        """The static buffer for the rows of a cache, with room for C and N positions; None: over `max_bytes`."""
        keys = cache.layers[0].keys
        rows = keys.shape[0]
        buffer = self._buffers.get(rows)
        if buffer is not None and buffer.has_room(keys, C, N):
            return buffer
        prefix, new = next_multiple(C, CAPACITY_STEP), next_multiple(N, CAPACITY_STEP)
        if buffer is not None:
            prefix, new = max(prefix, buffer.prefix), max(new, buffer.new)
        needed = 2 * len(cache.layers) * keys[:, :, :1].nbytes * (prefix + new)
        others = sum(other.keys_values.nbytes for r, other in self._buffers.items() if r != rows)
        if needed + others > self.options["max_bytes"]:
            return None
        self._graphs.drop(lambda name: name[:2] == (LANGUAGE_MODEL, rows))
        self._buffers.pop(rows, None)
        del buffer  # its memory goes before the new one's comes
        self._buffers[rows] = PrefixBuffer(cache, prefix, new)
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


def _from_options(options: dict) -> CapturedReuse:
    return CapturedReuse(**options)
