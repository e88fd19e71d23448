"""Reuse of the language model's keys and values over a background, inside generation's prefill.

A prompt is `system text, [BG_START] background [BG_END], what changed, question`; with causal attention the keys and
values up to the background's end depend on nothing behind it. They are computed by one pass over that prefix, kept,
and handed to the next prompt that begins with the same ids and the same background. Hit and miss run the same two
passes (prefix, rest), so that a hit changes no number.

Shapes: `B` rows, `L` prompt columns, `G` groups, `D` width, `H` key/value heads, `d` head width.
"""

from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from .background_cache_backdrop import joined_key
from .prefusion_backdrop import grow_cache


@dataclass(frozen=True)
class PromptRow:
    """Where things are in one row of a prompt batch (columns)."""

    start: int  # first column that is no padding
    groups: tuple[int, ...]  # indices of the row's groups, in order
    prefix_end: (
        int | None
    )  # column behind the leading background group, None if the row does not begin with one


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
    """Finds in each row the padding and the end of a leading background group."""
    layout = []
    for r, groups in enumerate(rows):
        start = 0 if attention_mask is None else int(attention_mask[r].long().argmax())
        prefix_end = None
        # Padding anywhere but on the left: such a row is computed whole.
        padded_left = attention_mask is None or bool(attention_mask[r, start:].all())
        if groups and group_kind[groups[0]] == 0 and padded_left:
            ids = input_ids[r].tolist()
            first = ids.index(image_token_id)
            end = first + group_tokens[groups[0]]
            if ids[first:end] == [image_token_id] * (end - first):
                has_separator = bg_end_token_id is not None and end < len(ids) and ids[end] == bg_end_token_id
                prefix_end = end + int(has_separator)
        layout.append(PromptRow(start, groups, prefix_end))
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
    """Puts the keys and values of every row's background prefix into an empty cache.

    Args:
        model: the `BackdropModel`; its `background_cache` is read and filled.
        input_ids, position_ids: `[B, L]`.
        layout: one `PromptRow` per row.
        features: vision tokens of the `G` groups, `[n_g, D]` each.
        content_keys: the memo's key of each group (None for object groups).
        past_key_values: empty; afterwards it holds the first `c` columns of each row.
        context: what the keys and values depend on beyond ids, positions and pixels.

    Returns:
        `c`, 0 if nothing was loaded.
    """
    if any(row.prefix_end is None for row in layout):
        return 0
    # Rows may differ in length; the rest of the prompt starts at one column, behind the shortest prefix.
    columns = min(min(row.prefix_end for row in layout), input_ids.shape[1] - 1)
    if columns <= max(row.start for row in layout):
        return 0
    store = model.background_cache
    loaded: dict[bytes, tuple[torch.Tensor, ...]] = {}
    row_values = []
    for r, row in enumerate(layout):
        ids = input_ids[r, row.start : row.prefix_end]
        positions = position_ids[r, row.start : row.prefix_end]
        content = content_keys[row.groups[0]]
        key = joined_key(context, ids.cpu().numpy().tobytes(), positions.cpu().numpy().tobytes(), content)
        if key not in loaded:
            value = store.get("prefix", key)
            if value is None:
                value = _compute_prefix(model, ids, positions, features[row.groups[0]])
                store.put("prefix", key, value)
            loaded[key] = value
        row_values.append(loaded[key])
    _fill(past_key_values, row_values, [row.start for row in layout], columns)
    return columns


def _compute_prefix(model, ids, positions, tokens) -> tuple[torch.Tensor, ...]:
    """One pass over the prefix; keys and values of all layers, `[1, H, prefix, d]`, keys before values."""
    cache = DynamicCache()
    model(
        input_ids=ids[None],
        position_ids=positions[None],
        image_embeds=tokens,
        past_key_values=cache,
        use_cache=True,
    )
    return tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def _fill(cache: Cache, row_values: list[tuple[torch.Tensor, ...]], starts: list[int], columns: int) -> None:
    grow_cache(cache, len(row_values[0]) // 2)  # prefusion's layers lie behind the language model's
    for i in range(len(row_values[0]) // 2):
        keys = _batch([value[2 * i] for value in row_values], starts, columns)
        values = _batch([value[2 * i + 1] for value in row_values], starts, columns)
        layer = cache.layers[i] if i < len(cache.layers) else None
        if type(layer) is DynamicLayer and not layer.is_initialized:
            # A growing layer concatenates and never writes in place: it may share the stored tensors.
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        else:
            cache.update(keys, values, i)


def _batch(rows: list[torch.Tensor], starts: list[int], columns: int) -> torch.Tensor:
    """Rows `[1, H, prefix_r, d]` under left padding -> `[B, H, columns, d]`; padding is zero and masked anyway."""
    aligned = [
        torch.nn.functional.pad(row[:, :, : columns - start], (0, 0, start, 0))
        if start
        else row[:, :, :columns]
        for row, start in zip(rows, starts, strict=True)
    ]
    return aligned[0] if len(aligned) == 1 else torch.cat(aligned)
