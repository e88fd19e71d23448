"""Reuse of the language model's keys and values over a background, inside generation's prefill.

A prompt is `system text, [BG_START] background [BG_END], what changed, question`; with causal attention the keys and
values up to the background's end depend on nothing behind it. They are computed by one pass over that prefix, kept,
and handed to the next prompt that begins with the same ids and the same background. Where several backgrounds lead a
prompt each is a *segment* with keys and values of its own, on top of the segments before it. Hit and miss run the same
passes (segments, rest), so that a hit changes no number.

Shapes: `B` rows, `L` prompt columns, `G` groups, `D` width, `H` key/value heads, `d` head width.
"""

import weakref
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from .background_cache_backdrop import joined_key, synchronized_clock
from .prefusion_backdrop import grow_cache

EXTRA_PASS_COLUMNS = 64  # what one more pass over a single row costs, in columns


@dataclass(frozen=True)
class PromptRow:
    """Where things are in one row of a prompt batch (columns)."""

    start: int  # first column that is no padding
    groups: tuple[int, ...]  # indices of the row's groups, in order
    ends: tuple[int, ...]  # columns behind each of the background groups that lead the row

    @property
    def prefix_end(self) -> int:
        """Column behind the last of them."""
        return self.ends[-1] if self.ends else self.start


def rows_of_groups(
    input_ids: torch.Tensor, image_token_id: int, group_tokens: list[int]
) -> list[tuple[int, ...]]:
    """Which groups belong to which row, from the placeholders that each row holds.

    Args:
        input_ids: `[B, L]`.
        group_tokens: placeholders that each of the `G` groups stands for, in order of appearance.

    Raises:
        ValueError: the placeholders of a row are not a whole number of groups.
    """
    placeholders = (input_ids == image_token_id).sum(-1).tolist()
    rows, g = [], 0
    for row, wanted in enumerate(placeholders):
        first, found = g, 0
        while found < wanted and g < len(group_tokens):
            found += group_tokens[g]
            g += 1
        if found != wanted:
            raise ValueError(
                f"Image features and image tokens do not match: row {row} has {wanted} placeholders, "
                f"its groups {list(range(first, g))} have {found} patch tokens."
            )
        rows.append(tuple(range(first, g)))
    if g != len(group_tokens):
        raise ValueError(
            f"Image features and image tokens do not match: {len(group_tokens)} groups were given, "
            f"the placeholders account for {g}."
        )
    return rows


def prompt_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rows: list[tuple[int, ...]],
    group_kind: list[int],
    group_tokens: list[int],
    image_token_id: int,
    bg_end_token_id: int | None,
) -> list[PromptRow]:
    """Finds in each row the padding and the ends of the background groups before the first object group."""
    layout = []
    for r, groups in enumerate(rows):
        start = 0 if attention_mask is None else int(attention_mask[r].long().argmax())
        ends: list[int] = []
        # Padding anywhere but on the left: such a row is computed whole.
        padded_left = attention_mask is None or bool(attention_mask[r, start:].all())
        ids = input_ids[r].tolist() if groups and padded_left else []
        column = 0
        for g in groups if ids else ():
            if group_kind[g] != 0:
                break
            first = ids.index(image_token_id, column)
            column = first + group_tokens[g]
            if ids[first:column] != [image_token_id] * (column - first):
                break
            has_separator = (
                bg_end_token_id is not None and column < len(ids) and ids[column] == bg_end_token_id
            )
            column += int(has_separator)
            ends.append(column)
        layout.append(PromptRow(start, groups, tuple(ends)))
    return layout


def keeps_prefixes(text_config: PreTrainedConfig) -> bool:
    """Only full attention keeps every position: a sliding window or a recurrent state is no prefix to reuse."""
    layers = DynamicCache(config=text_config).layers
    return all(type(layer) is DynamicLayer for layer in layers)


def load_background_prefix(
    model,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    layout: list[PromptRow],
    features: list[torch.Tensor],
    content_keys: list[bytes | None],
    past_key_values: Cache,
    context: bytes,
) -> int:
    """Puts the keys and values of every row's leading backgrounds into an empty cache.

    Args:
        model: the `BackdropModel`; its `background_cache` is read and filled.
        input_ids, position_ids: `[B, L]`.
        layout: one `PromptRow` per row.
        features: vision tokens of the `G` groups, `[n_g, D]` each.
        content_keys: the memo's key of each group (None for object groups).
        past_key_values: empty; afterwards it holds the first `c` columns of each row. What is shared with the memo
            stays pinned there until `release_background` or the cache's end.
        context: what the keys and values depend on beyond ids, positions and pixels.

    Returns:
        `c`, 0 if nothing was loaded.
    """
    columns = _first_column_to_compute(layout, input_ids.shape[1])
    if not columns:
        return 0
    lease = model.background_cache.lease()
    loaded: dict[bytes, tuple[torch.Tensor, ...]] = {}
    rows: list[list[tuple[torch.Tensor, ...]]] = []
    for r, row in enumerate(layout):
        segments, reached, content = [], row.start, []
        for g, end in zip(row.groups, row.ends, strict=False):
            if reached >= columns:
                break
            content.append(content_keys[g])
            ids, positions = input_ids[r, row.start : end], position_ids[r, row.start : end]
            key = joined_key(
                context, ids.cpu().numpy().tobytes(), positions.cpu().numpy().tobytes(), *content
            )
            if key not in loaded:
                done = reached - row.start
                loaded[key] = _segment(model, key, ids[done:], positions[done:], features[g], segments, lease)
            segments.append(loaded[key])
            reached = end
        if reached < columns:
            # A row whose backgrounds end earlier, or that has none: its columns up to there are its own.
            tokens = _tokens_between(model, input_ids[r], reached, columns, [features[g] for g in row.groups])
            ids, positions = input_ids[r, reached:columns], position_ids[r, reached:columns]
            segments.append(_compute(model, ids, positions, tokens, segments))
        rows.append(segments)
    _fill(past_key_values, rows, [row.start for row in layout], columns)
    # The cache shares stored tensors until the next pass has copied them.
    past_key_values.background_lease = lease
    weakref.finalize(past_key_values, lease.release)
    return columns


def release_background(past_key_values: Cache | None) -> None:
    """Unpins what a cache shared with the memo; called after each pass, which leaves it with tensors of its own."""
    lease = vars(past_key_values).pop("background_lease", None) if past_key_values is not None else None
    if lease is not None:
        lease.release()


def _first_column_to_compute(layout: list[PromptRow], length: int) -> int:
    """The column from which all rows are computed together, such that the fewest columns are computed in all.

    Rows whose backgrounds end before it are brought there one by one.
    """

    def cost(column: int) -> int:
        alone = [column - row.prefix_end for row in layout if row.prefix_end < column]
        return len(layout) * (length - column) + sum(alone) + EXTRA_PASS_COLUMNS * len(alone)

    ends = {min(row.prefix_end, length - 1) for row in layout if row.ends}
    return min(sorted(ends), key=cost) if ends else 0


def _tokens_between(model, ids: torch.Tensor, first: int, last: int, features: list[torch.Tensor]):
    """Vision tokens of the placeholders in columns `first` to `last` of one row, None if there are none."""
    is_image = ids == model.config.image_token_id
    before, count = int(is_image[:first].sum()), int(is_image[first:last].sum())
    return torch.cat(features)[before : before + count] if count else None


def _segment(model, key: bytes, ids, positions, tokens, segments, lease) -> tuple[torch.Tensor, ...]:
    """One segment from the memo, or computed on top of the segments before it and stored."""
    store = model.background_cache
    value = store.get("prefix", key, _layer_devices(model), lease)
    if value is None:
        started = synchronized_clock(tokens.device)
        value = _compute(model, ids, positions, tokens, segments)
        store.put("prefix", key, value, synchronized_clock(tokens.device) - started, lease)
    return value


def _compute(model, ids, positions, tokens, segments) -> tuple[torch.Tensor, ...]:
    """One pass over `ids [n]`; keys and values of all layers for them, `[1, H, n, d]`, keys before values."""
    cache = DynamicCache()
    seen = 0
    if segments:
        cache = DynamicCache()
        seen = sum(segment[0].shape[2] for segment in segments)
        for i in range(len(segments[0]) // 2):
            keys, values = (
                torch.cat([segment[2 * i + part] for segment in segments], dim=2) for part in (0, 1)
            )
            cache.update(keys, values, i)
    model(
        input_ids=ids[None],
        position_ids=positions[None],
        image_embeds=tokens,
        past_key_values=cache,
        use_cache=True,
    )
    return tuple(tensor[:, :, seen:] for layer in cache.layers for tensor in (layer.keys, layer.values))


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


def _fill(cache: Cache, rows: list[list[tuple[torch.Tensor, ...]]], starts: list[int], columns: int) -> None:
    num_layers = next(len(segments[0]) for segments in rows if segments) // 2
    grow_cache(cache, num_layers)  # prefusion's layers lie behind the language model's
    for i in range(num_layers):
        keys, values = (
            _batch([[segment[2 * i + part] for segment in segments] for segments in rows], starts, columns)
            for part in (0, 1)
        )
        layer = cache.layers[i] if i < len(cache.layers) else None
        if type(layer) is DynamicLayer and not layer.is_initialized:
            # A growing layer concatenates and never writes in place: it may share the stored tensors.
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        else:
            cache.update(keys, values, i)


def _batch(rows: list[list[torch.Tensor]], starts: list[int], columns: int) -> torch.Tensor:
    """Rows of segments `[1, H, n, d]` under left padding -> `[B, H, columns, d]`; padding is zero and masked anyway."""
    if len(rows) == 1 and len(rows[0]) == 1 and not starts[0]:
        return rows[0][0][:, :, :columns]
    like = next(segments[0] for segments in rows if segments)
    batch = like.new_zeros((len(rows), like.shape[1], columns, like.shape[3]))
    for r, (segments, start) in enumerate(zip(rows, starts, strict=True)):
        column = start
        for segment in segments:
            part = segment[0, :, : columns - column]
            batch[r, :, column : column + part.shape[1]] = part
            column += part.shape[1]
    return batch
