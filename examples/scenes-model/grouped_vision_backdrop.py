"""Encoding patch groups apart through a stock vision tower.

A group is a set of patches of one image. Patch and position embeddings are computed on the full grid, the owned
patches are gathered behind the tower's CLS token, and no group ever attends to another: the same function as the
full tower under a block-diagonal attention mask, without computing the blocks that the mask would remove.

A tower with rotary positions (DINOv3) gets them in every layer: each token keeps the angles of its own patch, and prefix
tokens are not turned.

Shapes: `G` groups, `P` patches of the grid, `C` prefix tokens (CLS, registers), `D` tower width, `d` width of a head, `n_g` patches of group g,
`T` = sum of `C + n_g`, `R` x `L` rows and length of the packed layout.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from .configuration_backdrop import tower_prefix_tokens
from .host_copies_backdrop import to_device


def encode_groups(
    vision_tower: nn.Module,
    pixel_values: torch.Tensor,
    patch_mask: torch.Tensor | None,
    vision_feature_layer: int | list[int] = -2,
    vision_feature_select_strategy: str = "default",
    layers_pass: Callable[..., list[torch.Tensor] | None] | None = None,
) -> list[torch.Tensor]:
    """Features of each group's own patches.

    Args:
        vision_tower: of one of the model types in `TOWER_PREFIX_TOKENS`.
        pixel_values: `[G, 3, S, S]`, normalised.
        patch_mask: `[G, P]` bool, row-major over the grid; each group owns at least one patch. Best on the CPU, where
            its lengths are read. None: each owns every patch, and no tensor is read.
        vision_feature_layer: index into the tower's hidden states, or several, concatenated on the width.
        vision_feature_select_strategy: "default" drops the prefix tokens, "full" keeps them in front.
        layers_pass: another way to run the layers, asked first where they take a mask: called with the layers, the
            embedded tokens `[T, D]`, the `G` lengths `C + n_g` and the depths (see `run_layers`), it gives `G` tensors
            `[C + n_g, D * layers]`, or None.

    Returns:
        `G` tensors `[n_g (+ C), D * layers]` in the tower's dtype.

    Raises:
        KeyError: the tower is of another model type.
    """
    prefix_tokens = tower_prefix_tokens(vision_tower.config)
    layers = _encoder_layers(vision_tower)
    depths = [_depth(index, len(layers)) for index in _as_list(vision_feature_layer)]
    hidden = _embed(vision_tower, pixel_values)  # [G, C + P, D]
    lengths, index = [hidden.shape[1]] * hidden.shape[0], None
    if patch_mask is not None:
        keep = torch.nn.functional.pad(patch_mask.cpu(), (prefix_tokens, 0), value=True)  # [G, C + P]
        lengths, index = keep.sum(-1).tolist(), keep.flatten().nonzero().squeeze(-1)
    angles = _angles(vision_tower, pixel_values, hidden)  # [C + P, 2d], or None

    def kept(tokens: torch.Tensor) -> torch.Tensor:  # [G, C + P, ...] -> [T, ...]
        tokens = tokens.flatten(0, 1)
        return tokens if index is None else tokens[to_device(index, tokens.device)]

    def kept_tokens() -> torch.Tensor:  # [T, D]
        return kept(hidden)

    def kept_angles() -> torch.Tensor | None:  # [T, 2d]
        return None if angles is None else kept(angles.expand(len(lengths), -1, -1))

    dropped = prefix_tokens if vision_feature_select_strategy == "default" else 0
    accepts_mask = "attention_mask" in _forward_parameters(type(layers[0]).forward)
    maskable = accepts_mask and vision_tower.config._attn_implementation in ("eager", "sdpa")
    if layers_pass is not None and maskable and angles is None:
        states = layers_pass(layers, kept_tokens(), lengths, depths)
        if states is not None:
            return [state[dropped:] for state in states]
    if set(lengths) == {hidden.shape[1]}:
        states = run_layers(layers, hidden, None, depths, None if angles is None else angles[None])
        return list(states[:, dropped:])
    if maskable and len(set(lengths)) > 1:
        config = vision_tower.config
        return _encode_packed_rows(layers, kept_tokens(), kept_angles(), lengths, depths, dropped, config)
    return _encode_by_length(layers, kept_tokens(), kept_angles(), lengths, depths, dropped)


def plan_rows(lengths: list[int], width: int) -> list[list[int]]:
    """Distributes sequences over packed rows so that the padded rows cost the fewest FLOPs.

    For every possible number of rows the longest sequence left goes to the emptiest row (longest processing time first,
    Graham, "Bounds on multiprocessing timing anomalies", 1969). Of these plans the one is kept that minimises
    `R * L * (1 + L / (6 * width))`, the cost of a transformer layer up to a factor: `24 L D^2` FLOPs in its linear maps
    and `4 L^2 D` in its attention (Narayanan et al., "Efficient large-scale language model training on GPU clusters",
    2021). Ties go to more rows, which need less masking.

    Args:
        lengths: tokens of each sequence.
        width: `D`, the model width.

    Returns:
        For each packed row the indices of its sequences.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best_rows, best_cost = [], float("inf")
    for num_rows in range(1, len(lengths) + 1):
        rows, loads = [[] for _ in range(num_rows)], [0] * num_rows
        for i in order:
            emptiest = loads.index(min(loads))
            rows[emptiest].append(i)
            loads[emptiest] += lengths[i]
        row_length = max(loads)
        cost = num_rows * row_length * (1 + row_length / (6 * width))
        if cost <= best_cost:
            best_rows, best_cost = rows, cost
    return best_rows


def _encode_packed_rows(layers, tokens, angles, lengths, depths, dropped, config):
    """All groups in one pass: `tokens [T, D]` laid out in `R` rows under a block-diagonal mask."""
    rows = plan_rows(lengths, tokens.shape[-1])
    row_length = max(sum(lengths[i] for i in row) for row in rows)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    source = np.zeros((len(rows), row_length), dtype=np.int64)  # padding repeats token 0, which nothing reads
    owner = np.full((len(rows), row_length), -1, dtype=np.int64)
    located = {}  # group: (row, its first position there)
    for r, row in enumerate(rows):
        position = 0
        for i in row:
            source[r, position : position + lengths[i]] = np.arange(starts[i], starts[i + 1])
            owner[r, position : position + lengths[i]] = i
            located[i] = (r, position)
            position += lengths[i]
    source = to_device(torch.from_numpy(source), tokens.device)
    packed = tokens[source]  # [R, L, D]
    owner = to_device(torch.from_numpy(owner), tokens.device)
    # Padding is a block of its own: a query that may attend to nothing would be NaN.
    mask = owner[:, None, :, None] == owner[:, None, None, :]  # [R, 1, L, L]
    if config._attn_implementation == "eager":
        blocked = torch.zeros((), dtype=packed.dtype, device=packed.device)
        mask = torch.where(mask, blocked, torch.finfo(packed.dtype).min)
    states = run_layers(layers, packed, mask, depths, None if angles is None else angles[source])
    return [states[r, start + dropped : start + lengths[i]] for i, (r, start) in sorted(located.items())]


def _encode_by_length(layers, tokens, angles, lengths, depths, dropped):
    """Groups of equal length together, without a mask: all there is to do, or attention takes none (flash, flex)."""
    groups = tokens.split(lengths)
    turned = None if angles is None else angles.split(lengths)
    features = [None] * len(lengths)
    for length in sorted(set(lengths)):
        members = [i for i, n in enumerate(lengths) if n == length]
        positions = None if turned is None else torch.stack([turned[i] for i in members])
        states = run_layers(layers, torch.stack([groups[i] for i in members]), None, depths, positions)
        for i, state in zip(members, states, strict=True):
            features[i] = state[dropped:]
    return features


def run_layers(layers, hidden, mask, depths, angles=None):
    """`hidden [R, L, D]` -> `[R, L, D * len(depths)]`; layers after the deepest one asked for are not computed.

    `depths`: how many of the layers to run for each of the states, which are concatenated on the width.
    `angles`: `[R or 1, L, 2d]`, cosines and sines of rotary positions, for layers that take them.
    """
    rotary = {}
    if angles is not None:
        rotary["position_embeddings"] = angles.unsqueeze(1).chunk(2, dim=-1)  # the same for every head
    states = {0: hidden}
    for depth, layer in enumerate(layers[: max(depths)], start=1):
        with_mask = mask is not None or _needs_mask(layer)
        hidden = layer(hidden, mask, **rotary) if with_mask else layer(hidden, **rotary)
        if depth in depths:
            states[depth] = hidden
    return states[depths[0]] if len(depths) == 1 else torch.cat([states[depth] for depth in depths], dim=-1)


def _needs_mask(layer: nn.Module) -> bool:
    """CLIP's and SigLIP's layers take the mask without a default."""
    parameter = _forward_parameters(type(layer).forward).get("attention_mask")
    return parameter is not None and parameter.default is inspect.Parameter.empty


@lru_cache(maxsize=16)
def _forward_parameters(forward: Callable) -> Mapping[str, inspect.Parameter]:
    """The parameters of a layer's `forward`; reading a signature takes longer than launching a kernel."""
    return inspect.signature(forward).parameters


def _embed(vision_tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Patch and position embeddings of the full grid, `[G, C + P, D]`, as the tower itself computes them."""
    pixel_values = pixel_values.to(vision_tower.dtype)
    device = next(vision_tower.embeddings.parameters()).device
    if device.type != "meta":  # "meta": weights that accelerate offloaded, and its hooks move the pixels
        pixel_values = pixel_values.to(device)
    hidden = vision_tower.embeddings(pixel_values)
    if vision_tower.config.model_type == "clip_vision_model":
        hidden = vision_tower.pre_layrnorm(hidden)
    return hidden


def _angles(vision_tower: nn.Module, pixel_values: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
    """Cosines and sines of the whole grid's rotary positions, `[C + P, 2d]`; None: the tower has none.

    Prefix tokens have the cosine 1 and the sine 0, so that a group's tokens can stand anywhere in a row.
    """
    rotary = getattr(vision_tower, "rope_embeddings", None)
    if rotary is None:
        return None
    cosines, sines = rotary(pixel_values.to(hidden.device, hidden.dtype))  # [P, d] each
    prefix = (0, 0, hidden.shape[1] - cosines.shape[0], 0)
    pad = nn.functional.pad
    return torch.cat([pad(cosines, prefix, value=1.0), pad(sines, prefix, value=0.0)], dim=-1)


def _encoder_layers(vision_tower: nn.Module) -> nn.ModuleList:
    """The tower's transformer layers, wherever its class keeps them."""
    encoder = vision_tower.encoder if hasattr(vision_tower, "encoder") else vision_tower.model
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


def _depth(index: int, num_layers: int) -> int:
    """Number of layers to run for `hidden_states[index]`, where `hidden_states[0]` are the embeddings."""
    return index if index >= 0 else num_layers + 1 + index


def _as_list(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)
