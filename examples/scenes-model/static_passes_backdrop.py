"""The two passes of a reused answer over static tensors, and the buffer in which a prefix lies for them.

Lengths are padded and the padding is masked, so that few shapes are ever seen. For the language model the prefix's `c`
keys and values lie directly in front of those of the `n` new tokens: behind padding on the left up to `C`, and in front
of padding on the right up to `N`.

Shapes: `B` rows, `H` key/value heads, `d` head width, `D` text width; `G` groups, `W` tower width.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .captured_graphs_backdrop import StaticPass
from .grouped_vision_backdrop import run_layers


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

    def __deepcopy__(self, memo) -> "ReusedPrefix":
        return self  # it names stored tensors, which nobody writes to


class PrefixBuffer:
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
    """A layer of a cache in a `PrefixBuffer`: new keys and values are written behind the prefix, in place."""

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


def language_model_pass(
    language_model: nn.Module, like: torch.Tensor, buffer: PrefixBuffer, C: int, N: int
) -> StaticPass:
    """The pass over N new tokens behind C; `like [B, ., D]` gives rows, width, dtype and device."""
    rows, _, width = like.shape
    dtype, device = like.dtype, like.device
    inputs = {
        "inputs_embeds": torch.zeros((rows, N, width), dtype=dtype, device=device),
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
            attention_mask=_additive(allowed, dtype),  # four dimensions: transformers takes it as it is
            position_ids=inputs["position_ids"],
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        output.copy_(hidden)

    return StaticPass(inputs, output, function)


def fill_language_model_inputs(
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


def tower_pass(
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
    """A mask to add to scores, made once for all layers: 0 where `allowed`, the least number elsewhere.

    Not -inf: a block of keys that are all masked must not become NaN in any kernel.
    """
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


def next_multiple(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step
