"""Keys and values of background prefixes: from the background cache, or by a pass over one segment.

A miss and a hit run the same passes (segments first, then the rest), so that a hit changes no number.

Shapes: `B` rows, `n` tokens of a segment, `H` key/value heads, `d` head width, `c` positions of a prefix.
"""

import weakref
from functools import partial

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from .adapter_rows_backdrop import one_adapter, prefix_modules
from .background_prefix_backdrop import BackgroundPrefix, PrefixSegment
from .cache_tiers_backdrop import Lease, synchronized_clock
from .prefusion_backdrop import grow_cache
from .static_passes_backdrop import ReusedPrefix

# Of all layers for one segment, `[1, H, n, d]` each: keys and values of the first layer, of the second, and so on.
KeysAndValues = tuple[torch.Tensor, ...]


def load_background_prefix(model, prefix: BackgroundPrefix, past_key_values: Cache, run_key: bytes) -> None:
    """Puts the keys and values of a prefix into an empty cache.

    Args:
        model: the `BackdropModel`; its `background_cache` is read and filled.
        prefix: what every row begins with.
        past_key_values: empty; afterwards it holds the first `c` positions of each row. What it shares with the
            background cache stays pinned there until `release_background` or its own end.
        run_key: of the language model, see `prefix_run_key`.
    """
    lease = model.background_cache.lease()
    loaded: dict[bytes, KeysAndValues] = {}
    rows: list[list[KeysAndValues]] = []
    for row in prefix.rows:
        values: list[KeysAndValues] = []
        with one_adapter(row.adapter, *prefix_modules(model)):
            for segment in row.segments:
                if segment.key is None:
                    values.append(run_prefix_pass(model, segment, values))
                    continue
                if segment.key not in loaded:
                    loaded[segment.key] = _load_segment(model, segment, values, lease)
                values.append(loaded[segment.key])
        rows.append(values)
    starts = [row.start for row in prefix.rows]
    _fill(past_key_values, rows, starts, prefix.length)
    # A graph was captured without the adapters that a call names.
    if model.compiled_reuse is not None and all(row.adapter is None for row in prefix.rows):
        sources = tuple(values[0] for segments in rows for values in segments)
        past_key_values.reused_prefix = ReusedPrefix(run_key, tuple(starts), prefix.length, sources)
    # The cache shares stored tensors until the next pass has copied them.
    past_key_values.background_lease = lease
    weakref.finalize(past_key_values, lease.release)


def release_background(past_key_values: Cache | None) -> None:
    """Unpins what a cache shared with the background cache.

    Called after each pass, which leaves `past_key_values` with tensors of its own. In a compiled pass, where no lock can
    be taken, what is shared stays pinned until the cache ends.
    """
    if past_key_values is None or torch.compiler.is_compiling():
        return
    lease = vars(past_key_values).pop("background_lease", None)
    if lease is not None:
        lease.release()


def run_prefix_pass(model, segment: PrefixSegment, before: list[KeysAndValues]) -> KeysAndValues:
    """One pass over a segment on top of the segments before it; the keys and values of its own `n` tokens."""
    past_key_values = DynamicCache()
    seen = sum(values[0].shape[2] for values in before)
    for i in range(len(before[0]) // 2 if before else 0):
        keys, values = (torch.cat([part[2 * i + which] for part in before], dim=2) for which in (0, 1))
        past_key_values.update(keys, values, i)
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":  # offloaded: accelerate's hooks move what they need
        device = segment.input_ids.device
    model(
        input_ids=segment.input_ids[None].to(device),
        position_ids=segment.position_ids[None].to(device),
        image_embeds=segment.image_embeds,
        past_key_values=past_key_values,
        use_cache=True,
    )
    return tuple(
        tensor[:, :, seen:] for layer in past_key_values.layers for tensor in (layer.keys, layer.values)
    )


def _load_segment(model, segment: PrefixSegment, before: list[KeysAndValues], lease: Lease) -> KeysAndValues:
    """A background's segment from the cache, or computed and stored."""
    cache, device = model.background_cache, segment.image_embeds.device
    values = cache.get("prefix", segment.key, partial(_layer_devices, model), lease)
    if values is None:
        started = synchronized_clock(device)
        values = run_prefix_pass(model, segment, before)
        cache.put("prefix", segment.key, values, synchronized_clock(device) - started, lease)
    return values


def _layer_devices(model) -> list[torch.device]:
    """Where each layer's keys and values live, two a layer, for values that come from another tier."""
    layers = [
        *model.language_model.layers,
        *(model.prefusion.layers if model.config.num_prefusion_layers else ()),
    ]
    devices = [next(layer.parameters()).device for layer in layers]
    if any(device.type == "meta" for device in devices):  # offloaded: accelerate's hooks move what they need
        devices = [torch.device("cpu")]
    return [device for device in devices for _ in range(2)]


def _fill(cache: Cache, rows: list[list[KeysAndValues]], starts: list[int], length: int) -> None:
    """Every layer of an empty cache with the rows' segments, `length` positions each."""
    num_layers = next(len(segments[0]) for segments in rows if segments) // 2
    grow_cache(cache, num_layers)  # prefusion's layers lie behind the language model's
    for i in range(num_layers):
        keys, values = (
            _batch([[segment[2 * i + which] for segment in segments] for segments in rows], starts, length)
            for which in (0, 1)
        )
        layer = cache.layers[i] if i < len(cache.layers) else None
        if type(layer) is DynamicLayer and not layer.is_initialized:
            # A growing layer concatenates and never writes in place: it may share the stored tensors.
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        else:
            cache.update(keys, values, i)


def _batch(rows: list[list[torch.Tensor]], starts: list[int], length: int) -> torch.Tensor:
    """Rows of segments `[1, H, n, d]` behind padding on the left -> `[B, H, length, d]`.

    Padding is zero, and masked anyway. One segment of one row is handed on as it is, without a copy.
    """
    if len(rows) == 1 and len(rows[0]) == 1 and not starts[0]:
        stored = rows[0][0]
        return stored if stored.shape[2] == length else stored[:, :, :length]
    like = next(segments[0] for segments in rows if segments)
    batch = like.new_zeros((len(rows), like.shape[1], length, like.shape[3]))
    for r, (segments, start) in enumerate(zip(rows, starts, strict=True)):
        position = start
        for segment in segments:
            part = segment[0, :, : length - position]
            batch[r, :, position : position + part.shape[1]] = part
            position += part.shape[1]
    return batch
