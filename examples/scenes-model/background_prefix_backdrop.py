"""What the prefixes of a batch of prompts are made of, before anything is computed.

A prompt is `system text, [BG_START] background [BG_END], what changed, question`; with causal attention the keys and
values up to the background's end depend on nothing behind it. They are computed by one pass over that prefix, kept,
and handed to the next prompt that begins with the same ids and the same background. Where several backgrounds lead a
prompt each is a *segment* with keys and values of its own, on top of the segments before it. The passes themselves are
in `prefix_pass_backdrop`.

Shapes: `B` rows, `L` positions of a row, `n` tokens of a segment, `m` vision tokens among them, `D` width.
"""

from dataclasses import dataclass

import torch

from .cache_keys_backdrop import prefix_key
from .group_features_backdrop import EncodedGroups
from .prompt_layout_backdrop import PromptBatch, PromptRow

EXTRA_PASS_TOKENS = 64  # what one more pass over a single row costs, in tokens


@dataclass(frozen=True)
class PrefixSegment:
    """A stretch of one row that is computed in one pass, on top of the segments before it.

    `input_ids [n]`, `position_ids [n]`, on the CPU; `image_embeds [m, D]`, the vision tokens of its placeholders, None: it has none.
    `key`: the background cache's key of its keys and values; None: it is the row's own, and is not kept.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    image_embeds: torch.Tensor | None
    key: bytes | None


@dataclass(frozen=True)
class RowPrefix:
    """The segments of one row, in order, from its first position that is no padding (`start`).

    `adapter`: peft's, by which the call wants this row computed; None: it names none.
    """

    start: int
    segments: tuple[PrefixSegment, ...]
    adapter: str | None = None


@dataclass(frozen=True)
class BackgroundPrefix:
    """The first `length` positions of every row: what is loaded from the cache, or computed row by row."""

    length: int
    rows: tuple[RowPrefix, ...]


def background_prefix(
    prompt: PromptBatch,
    layout: list[PromptRow],
    encoded: EncodedGroups,
    image_token_id: int,
    contexts: list[bytes],
    adapters: list[str] | None = None,
) -> BackgroundPrefix | None:
    """The prefix with which a batch begins, None if none of its rows is led by a background.

    Args:
        prompt: on the CPU; `position_ids` are `[B, L]`.
        layout: one `PromptRow` per row.
        encoded: the groups of all rows.
        contexts: what the keys and values of each row depend on beyond ids, positions and pixels, see `prefix_key`.
        adapters: of each row, see `RowPrefix`.
    """
    length = _common_length(layout, prompt.input_ids.shape[1])
    if not length:
        return None
    rows = []
    for r, row in enumerate(layout):
        ids, positions = prompt.input_ids[r], prompt.position_ids[r]
        segments: list[PrefixSegment] = []
        reached, content = row.start, []
        for g, end in zip(row.groups, row.ends, strict=False):
            if reached >= length:
                break
            content.append(encoded.content_keys[g])
            key = prefix_key(ids[row.start : end], positions[row.start : end], content, contexts[r])
            segments.append(PrefixSegment(ids[reached:end], positions[reached:end], encoded.features[g], key))
            reached = end
        if reached < length:
            # A row whose backgrounds end earlier, or that has none: its tokens up to there are its own.
            features = [encoded.features[g] for g in row.groups]
            image_embeds = _vision_tokens_between(ids == image_token_id, reached, length, features)
            segments.append(PrefixSegment(ids[reached:length], positions[reached:length], image_embeds, None))
        rows.append(RowPrefix(row.start, tuple(segments), None if adapters is None else adapters[r]))
    return BackgroundPrefix(length, tuple(rows))


def _common_length(layout: list[PromptRow], length: int) -> int:
    """The position from which all rows are computed together, such that the fewest tokens are computed in all.

    Rows whose backgrounds end before it are brought there one by one. 0: no row is led by a background.
    """

    def cost(position: int) -> int:
        alone = [position - row.prefix_end for row in layout if row.prefix_end < position]
        return len(layout) * (length - position) + sum(alone) + EXTRA_PASS_TOKENS * len(alone)

    ends = {min(row.prefix_end, length - 1) for row in layout if row.ends}
    return min(sorted(ends), key=cost) if ends else 0


def _vision_tokens_between(
    is_image: torch.Tensor, first: int, last: int, features: list[torch.Tensor]
) -> torch.Tensor | None:
    """Vision tokens of one row's placeholders (`is_image [L]`) from `first` up to `last`, None if there are none."""
    before, count = int(is_image[:first].sum()), int(is_image[first:last].sum())
    return torch.cat(features)[before : before + count] if count else None
