"""What docs/design/decoder-prefixes.md rests on: what transformers' cache classes hold at a prefix's end continues it.

No code of ours runs here: these are facts about the decoders that prefixes of other than full attention would need.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

WINDOW, PREFIX, LENGTH = 16, 40, 60
_LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "head_dim": 8}
FAMILIES = {
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "mistral": {"head_dim": 8, "sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen3_next": {**_LINEAR, **_EXPERTS},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": _MAMBA,
}


def decoder(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **FAMILIES[family],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@torch.no_grad()
def run(model, ids, cache, start):
    positions = torch.arange(start, start + ids.shape[1])[None]
    return model(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True).logits


def tensors(layer):
    """Every tensor that a layer of a cache holds, by name."""
    found = {}
    for name, value in vars(layer).items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        found |= {f"{name}{key}": v for key, v in entries if isinstance(v, torch.Tensor) and v.ndim > 1}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_snapshot_at_the_prefixs_end_continues_it_bit_for_bit(family):
    model = decoder(family)
    ids = torch.randint(3, 64, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, PREFIX:]
    cache = DynamicCache(config=model.config)
    run(model, ids[:, :PREFIX], cache, 0)
    snapshot = copy.deepcopy(cache)
    miss = run(model, ids[:, PREFIX:], cache, PREFIX)
    assert torch.equal(run(model, ids[:, PREFIX:], copy.deepcopy(snapshot), PREFIX), miss)
    torch.testing.assert_close(miss, whole, atol=1e-4, rtol=1e-4)
    # Without the snapshot the continuation is another: the test would see a state that is lost.
    assert not torch.allclose(
        run(model, ids[:, PREFIX:], DynamicCache(config=model.config), PREFIX), whole, atol=1e-2
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_snapshots_size_does_not_grow_where_attention_is_not_full(family):
    model = decoder(family)
    sizes = []
    for length in (PREFIX, 2 * PREFIX):
        cache = DynamicCache(config=model.config)
        run(model, torch.full((1, length), 5), cache, 0)
        sizes.append([sum(v.numel() for v in tensors(layer).values()) for layer in cache.layers])
    grown = [two > one for one, two in zip(*sizes, strict=True)]
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 4
    full = [kind in ("full_attention", "hybrid") or family == "falcon_h1" for kind in kinds]
    assert grown == full


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "falcon_h1"])
def test_recurrent_states_are_written_in_place_so_a_reader_needs_a_copy(family):
    model = decoder(family)
    cache = DynamicCache(config=model.config)
    run(model, torch.full((1, PREFIX), 5), cache, 0)
    layer = next(layer for layer in cache.layers if hasattr(layer, "conv_states"))
    state = next(iter(layer.conv_states.values()))
    before = state.clone()
    run(model, torch.full((1, 3), 7), cache, PREFIX)
    assert not torch.equal(state, before)
