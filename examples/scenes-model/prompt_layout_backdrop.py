"""Where things are in a batch of prompts: padding, groups, and the backgrounds that lead a row.

Shapes: `B` rows, `L` positions of a row, `G` groups of all rows in order of appearance.
"""

from dataclasses import dataclass

import torch

from .configuration_backdrop import BACKGROUND
from .host_copies_backdrop import host_copies


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as the processor makes them: `input_ids [B, L]`; None: no padding, counted positions.

    `attention_mask` and `position_ids` may have the other forms that `forward` takes; only `[B, L]` (positions: also
    `[1, L]`) can be laid out.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    def first(self, length: int | None) -> "PromptBatch":
        """The first `length` positions, None: all of them; forms that cannot be laid out stay as they are."""
        if length is None:
            return self
        mask, positions = (
            form[:, :length] if isinstance(form, torch.Tensor) and form.ndim == 2 else form
            for form in (self.attention_mask, self.position_ids)
        )
        return PromptBatch(self.input_ids[:, :length], mask, positions)

    def on_host(self) -> "PromptBatch":
        """The same on the CPU, as far as it can be laid out."""
        mask, positions = (
            form if isinstance(form, torch.Tensor) and form.ndim == 2 else None
            for form in (self.attention_mask, self.position_ids)
        )
        ids, host_mask, host_positions = host_copies([self.input_ids, mask, positions])
        return PromptBatch(
            ids,
            self.attention_mask if mask is None else host_mask,
            self.position_ids if positions is None else host_positions,
        )


@dataclass(frozen=True)
class PromptRow:
    """Where things are in one row of a prompt batch, as positions in the row."""

    start: int  # first position that is no padding
    groups: tuple[int, ...]  # indices of the row's groups, in order
    ends: tuple[int, ...]  # the position behind each of the background groups that lead the row

    @property
    def prefix_end(self) -> int:
        """The position behind the last of them."""
        return self.ends[-1] if self.ends else self.start


def rows_of_groups(
    input_ids: torch.Tensor, image_token_id: int, tokens_per_group: list[int], cached: int = 0
) -> tuple[list[tuple[int, ...]], int]:
    """Which groups belong to which row, from the placeholders that each row holds.

    The groups are those of all placeholders or, where a conversation goes on, those of the placeholders that are not
    cached yet: the numbers of tokens say which, as they differ by what is cached.

    Args:
        input_ids: `[B, L]`.
        tokens_per_group: placeholders that each of the `G` groups stands for, in order of appearance.
        cached: positions of each row that are cached.

    Returns:
        For each row the indices of its groups, and the column from which the placeholders were counted, 0 or `cached`.

    Raises:
        ValueError: the placeholders of a row are not a whole number of groups.
    """
    is_image = input_ids == image_token_id
    every, new = (is_image[:, first:].sum(-1).tolist() for first in (0, cached))
    given = sum(tokens_per_group)
    first = cached if given == sum(new) and given != sum(every) else 0
    rows, g = [], 0
    for row, wanted in enumerate(new if first else every):
        start, found = g, 0
        while found < wanted and g < len(tokens_per_group):
            found += tokens_per_group[g]
            g += 1
        if found != wanted:
            behind = f" ({new[row]} behind the cached {cached} positions)" if cached else ""
            raise ValueError(
                f"Image features and image tokens do not match: row {row} has {wanted} placeholders{behind}, "
                f"its groups {list(range(start, g))} have {found} patch tokens."
            )
        rows.append(tuple(range(start, g)))
    if g != len(tokens_per_group):
        raise ValueError(
            f"Image features and image tokens do not match: {len(tokens_per_group)} groups were given, "
            f"the placeholders account for {g}."
        )
    return rows, first


def unseen_tokens(
    features: list[torch.Tensor], rows: list[tuple[int, ...]], seen_placeholders: torch.Tensor
) -> torch.Tensor | None:
    """The vision tokens `[n, D]` of the placeholders that are not cached, row by row; None if there are none.

    Args:
        features: `G` tensors `[n_g, D]`.
        rows: the indices of each row's groups.
        seen_placeholders: `[B, c]` bool, the row's placeholders that are cached.
    """
    unseen = []
    for groups, seen in zip(rows, seen_placeholders.sum(-1).tolist(), strict=True):
        for g in groups:
            skip = min(seen, features[g].shape[0])
            seen -= skip
            if skip < features[g].shape[0]:
                unseen.append(features[g][skip:])
    return torch.cat(unseen) if unseen else None


def prompt_rows(
    prompt: PromptBatch,
    rows: list[tuple[int, ...]],
    group_kinds: tuple[int, ...],
    tokens_per_group: list[int],
    image_token_id: int,
    bg_end_token_id: int | None,
) -> list[PromptRow]:
    """Finds in each row the padding and the ends of the background groups before the first object group.

    Args:
        prompt: its `attention_mask` is None or `[B, L]`.
        rows: see `rows_of_groups`.
        group_kinds, tokens_per_group: of the `G` groups.
        bg_end_token_id: of [BG_END], which belongs to its background; None: the model has no separators.
    """
    layout = []
    for r, groups in enumerate(rows):
        mask = None if prompt.attention_mask is None else prompt.attention_mask[r]
        start = 0 if mask is None else int(mask.long().argmax())
        ends: list[int] = []
        # Padding anywhere but on the left: such a row is computed whole.
        padded_left = mask is None or bool(mask[start:].all())
        ids = prompt.input_ids[r].tolist() if groups and padded_left else []
        position = 0
        for g in groups if ids else ():
            if group_kinds[g] != BACKGROUND:
                break
            first = ids.index(image_token_id, position)
            position = first + tokens_per_group[g]
            if ids[first:position] != [image_token_id] * (position - first):
                break
            has_separator = (
                bg_end_token_id is not None and position < len(ids) and ids[position] == bg_end_token_id
            )
            position += int(has_separator)
            ends.append(position)
        layout.append(PromptRow(start, groups, tuple(ends)))
    return layout
