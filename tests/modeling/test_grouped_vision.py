"""Groups encoded apart equal block-diagonal attention in the full tower."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    SiglipVisionModel,
)

from backdrop.modeling.grouped_vision_backdrop import encode_groups, plan_rows

TOWER_CLASSES = {
    "clip": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "dinov3": DINOv3ViTModel,
}
PREFIX = tiny.PREFIX_TOKENS


def block_diagonal(tower, pixels, masks, layer, prefix):
    """All groups of one image as one sequence through stock layers under a 4D additive mask."""
    hidden = [tower.embeddings(pixels)] * len(masks)
    if hasattr(tower, "pre_layrnorm"):
        hidden = [tower.pre_layrnorm(h) for h in hidden]
    keep = [torch.cat([torch.ones(prefix, dtype=torch.bool), mask]) for mask in masks]
    sequence = torch.cat([h[:, k] for h, k in zip(hidden, keep, strict=True)], dim=1)
    owner = torch.cat([torch.full((int(k.sum()),), g) for g, k in enumerate(keep)])
    bias = torch.where(owner[:, None] == owner[None, :], 0.0, torch.finfo(torch.float32).min)[None, None]
    encoder = tower.encoder if hasattr(tower, "encoder") else tower.model
    layers = encoder.layer if hasattr(encoder, "layer") else encoder.layers
    rotary = {}
    if hasattr(tower, "rope_embeddings"):
        # Token by token: a patch has the angles of its place in the grid, a prefix token is not turned.
        table = [torch.stack(pair) for pair in zip(*tower.rope_embeddings(pixels), strict=True)]
        still = torch.stack([torch.ones_like(table[0][0]), torch.zeros_like(table[0][0])])
        owned = [[still] * prefix + [table[p] for p in mask.nonzero().flatten().tolist()] for mask in masks]
        turns = torch.stack([turn for group in owned for turn in group])
        rotary["position_embeddings"] = (turns[:, 0], turns[:, 1])
    for block in layers[: layer if layer >= 0 else len(layers) + 1 + layer]:
        try:
            sequence = block(sequence, bias, **rotary)
        except TypeError:
            pytest.skip("this version's layers take no mask; groups are encoded by length")
    return [sequence[0, owner == g][prefix:] for g in range(len(masks))]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TOWER_CLASSES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_groups_apart_equal_block_diagonal_attention(name, attention, data):
    torch.manual_seed(0)
    config = tiny.TOWERS[name]()
    config._attn_implementation = attention
    tower = TOWER_CLASSES[name](config).eval()
    patches = st.lists(st.booleans(), min_size=tiny.PATCHES, max_size=tiny.PATCHES).filter(any)
    special = st.sampled_from([[True] * tiny.PATCHES, [True] + [False] * (tiny.PATCHES - 1)])
    masks = torch.tensor(data.draw(st.lists(st.one_of(patches, special), min_size=1, max_size=5)))
    pixels = torch.randn(1, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        found = encode_groups(tower, pixels.expand(len(masks), -1, -1, -1), masks, -2, "full")
        expected = block_diagonal(tower, pixels, masks, -2, PREFIX[name])
    for mine, theirs, mask in zip(found, expected, masks, strict=True):
        assert mine.shape[0] == int(mask.sum()) + PREFIX[name]
        torch.testing.assert_close(mine[PREFIX[name] :], theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TOWER_CLASSES)
@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 1, 3])
def test_all_patches_equal_the_stock_towers_hidden_state(name, layer):
    tower = TOWER_CLASSES[name](tiny.TOWERS[name]()).eval()
    pixels = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    whole = torch.ones(2, tiny.PATCHES, dtype=torch.bool)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[layer]
        assert torch.equal(torch.stack(encode_groups(tower, pixels, whole, layer, "full")), expected)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=24))
def test_rows_hold_every_group_once_and_waste_little(lengths):
    rows = plan_rows(lengths, 1024)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    padded = len(rows) * max(sum(lengths[i] for i in row) for row in rows)
    assert padded <= 2 * sum(lengths)


def test_layers_behind_the_feature_layer_are_not_computed():
    tower = CLIPVisionModel(tiny.TOWERS["clip"]())
    ran = []
    for i, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    encode_groups(tower, torch.randn(1, 3, tiny.SIDE, tiny.SIDE), torch.ones(1, 16, dtype=torch.bool), -2)
    assert ran == [0, 1]


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
@pytest.mark.parametrize("size", [(112, 40), (40, 100)])
def test_padding_that_nobody_owns_is_neither_attended_to_nor_computed(image_processor, name, size):
    """A padded picture's groups in the tower equal the full tower under a mask in which groups see neither padding
    nor each other, and no layer gets a token of padding."""
    image_processor.fit, image_processor.own_padding = "pad", False
    image = tiny.photo(*size).convert("L").convert("RGB")  # nothing red but what follows
    image.paste((255, 0, 0), (6, 14, 30, 38))
    split = image_processor(image, return_tensors="pt")
    whole = image_processor(image, split=False, own_padding=True, return_tensors="pt")["pixel_values"]
    masks = split["patch_mask"]
    assert len(masks) == 2 and whole.shape[0] == 1
    ((_, placement),) = image_processor.placed_images([image])
    assert torch.equal(masks.any(0), torch.from_numpy(placement.picture_patches(tiny.PATCH)))
    tower = TOWER_CLASSES[name](tiny.TOWERS[name]()).eval()
    layers = tower.encoder.layer if hasattr(tower.encoder, "layer") else tower.encoder.layers
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    with torch.no_grad():
        found = encode_groups(tower, split["pixel_values"], masks, -2, "full")
        computed = seen.copy()
        expected = block_diagonal(tower, whole, masks, -2, PREFIX[name])
    tokens = int(masks.sum()) + len(masks) * PREFIX[name]
    assert computed and set(computed) == {tokens} and tokens < tiny.PATCHES
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[PREFIX[name] :], theirs, atol=2e-5, rtol=1e-4)
