"""Memory of training before it starts: hand-counted parts, orders, and one real run."""

import pytest
import tiny
import torch
from trl import ModelConfig, SFTConfig

# The estimate runs the loss of these versions of TRL, not a loss of its own.
pytest.importorskip("trl", minversion="1.16")

from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.train.memory import GIB, estimate, meta_model, packed_bytes, print_memory
from backdrop.train.memory.llava import LORA, QLORA, llava_config
from backdrop.train.memory.result import CARDS, with_margin
from backdrop.train.memory.step import full_batch, prepare_for_training, split_evenly
from backdrop.train.trainable import select_trainable

LENGTH = 40
EVERYTHING = ["language_model", "lm_head", "multi_modal_projector"]


def settings(folder, **changes) -> SFTConfig:
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "activation_checkpointing": False,
        "bf16": False,
        "optim": "adamw_torch",
        "report_to": "none",
        "max_length": None,
    }
    return SFTConfig(**{**values, **changes})


def options(**changes) -> ModelConfig:
    return ModelConfig(**{"dtype": "float32", **changes})


def of(
    folder,
    choices=None,
    patterns=EVERYTHING,
    config=None,
    device="cuda",
    length=LENGTH,
    model=None,
    **training,
):
    """Estimate of a tiny recipe."""
    choices = choices or options()
    model = model or meta_model(config or small_config(), choices, patterns, ["multi_modal_projector"])
    return estimate(model, settings(folder, **training), choices, sequence_length=length, device=device)


def small_config(**changes):
    """As few layers as there can be: the time of an estimate is that of its operations."""
    tower = tiny.TOWERS["clip"]()
    tower.num_hidden_layers = 2
    return tiny.backdrop_config(
        **{"vision_config": tower, "text_config": tiny.text_config(num_hidden_layers=1), **changes}
    )


def wide_config(width=256, layers=2):
    """Wide enough for layers to outweigh the rest."""
    return small_config(
        text_config=tiny.text_config(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers)
    )


def test_weights_gradients_and_states_are_those_counted_by_hand(tmp_path):
    model = tiny.backdrop_model()
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    select_trainable(model, ["multi_modal_projector"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 32 * 32 * 2 + 2 * 32
    # Two float32 of AdamW for each weight that trains, and a step count for each of the four tensors.
    found = of(tmp_path, model=model, device="cpu")
    assert found.weights == weights
    assert found.optimizer == 2 * 4 * trained + 4 * 4
    assert found.gradients in range(4 * trained + 1)
    accumulated = of(tmp_path, model=model, device="cpu", gradient_accumulation_steps=2)
    assert accumulated.gradients == 4 * trained
    assert of(tmp_path, model=model, device="cpu", optim="sgd").optimizer == 0
    assert all(p.grad is None and not p.is_meta for p in model.parameters()), "the model given was touched"


def test_activations_are_those_of_a_real_run(tmp_path):
    """A real forward of the same batch, its saved tensors counted by autograd's own hooks."""
    config, training = wide_config(), settings(tmp_path)
    model = BackdropForConditionalGeneration(config).train()
    select_trainable(model, EVERYTHING)
    found = estimate(model, training, options(), sequence_length=LENGTH, device="cpu")

    fixed = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in fixed:
            saved[storage._cdata] = storage
        return tensor

    prepare_for_training(model, training)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(
            **full_batch(config, training, LENGTH, split_evenly(config, 1, 2)), fused_lm_head=True
        )
        loss = -outputs.log_probs.sum()
    real = sum(storage.nbytes() for storage in saved.values())
    assert loss.requires_grad and real > 2**20
    # The batch itself is counted beside what is saved.
    assert real <= found.saved_for_backward <= 1.05 * real


def test_checkpointing_keeps_less(tmp_path):
    config = wide_config(layers=4)
    kept, recomputed = (of(tmp_path, config=config, activation_checkpointing=flag) for flag in (False, True))
    assert recomputed.saved_for_backward < kept.saved_for_backward / 3
    assert recomputed.peaks["backward"] < kept.peaks["backward"]
    assert recomputed.weights == kept.weights


def test_eager_attention_keeps_its_maps(tmp_path):
    length = 256
    eager, sdpa = (
        of(tmp_path, options(dtype="bfloat16", attn_implementation=name), length=length)
        for name in ("eager", "sdpa")
    )
    heads, layers, rows = 4, 1, 2
    maps = layers * rows * heads * length**2 * 4
    assert eager.saved_for_backward - sdpa.saved_for_backward > 0.7 * maps
    # Without padding (one row) flash keeps nothing that grows with the square.
    one = of(
        tmp_path, options(dtype="bfloat16"), length=length, per_device_train_batch_size=1
    ).saved_for_backward
    two = of(
        tmp_path, options(dtype="bfloat16"), length=2 * length, per_device_train_batch_size=1
    ).saved_for_backward
    assert two < 2 * one


def test_quantised_is_less_than_bf16_and_matches_the_block_sizes(tmp_path):
    config = wide_config(layers=1)
    base = {"use_peft": True, "lora_r": 4, "dtype": "bfloat16"}
    plain = of(tmp_path, options(**base), config=config)
    eight = of(tmp_path, options(**base, load_in_8bit=True), config=config)
    four = of(tmp_path, options(**base, load_in_4bit=True), config=config)
    nested = of(tmp_path, options(**base, load_in_4bit=True, use_bnb_nested_quant=True), config=config)
    assert nested.weights < four.weights < eight.weights < plain.weights
    # QLoRA, section 3: 0.5 bit a weight for the scales of 64, 0.127 with their own scales in 8 bits.
    numel = 4096 * 11008
    assert 8 * packed_bytes(numel, nested=False) / numel == pytest.approx(4.5, abs=1e-3)
    assert 8 * packed_bytes(numel, nested=True) / numel == pytest.approx(4.127, abs=1e-3)


def test_an_adapter_beside_a_tied_head_is_estimated(tmp_path):
    """peft wraps a head that is tied to the separators' embedding rows."""
    config = small_config(text_config=tiny.text_config(num_hidden_layers=1, tie_word_embeddings=True))
    config.tie_word_embeddings = True
    found = of(tmp_path, options(use_peft=True, lora_r=4), config=config, device="cpu")
    assert found.weights and found.optimizer


def test_eight_bits_keep_inputs_that_checkpointing_cannot_free(tmp_path):
    """bitsandbytes keeps them on the function's context, see `_QuantisedMatmul`."""
    config, base = wide_config(layers=1), {"use_peft": True, "lora_r": 4, "dtype": "bfloat16"}
    four, eight = (
        of(
            tmp_path,
            options(**base, **{f"load_in_{bits}bit": True}),
            config=config,
            activation_checkpointing=True,
        )
        for bits in (4, 8)
    )
    assert eight.saved_for_backward > 1.5 * four.saved_for_backward


def test_optimizers(tmp_path):
    with pytest.raises(ValueError, match="optim is .*lomo.*; memory is known of adamw_torch, "):
        of(tmp_path, optim="lomo")
    config = wide_config(layers=1)
    full, eight, paged, factored = (
        of(tmp_path, config=config, optim=name)
        for name in ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor")
    )
    assert eight.optimizer == pytest.approx(full.optimizer / 4, rel=0.1)
    assert paged.host > 0 and paged.optimizer < eight.optimizer
    assert factored.optimizer < full.optimizer / 20


def test_processes_share_what_they_divide(tmp_path):
    model = meta_model(wide_config(layers=1), options(dtype="bfloat16"), EVERYTHING)
    found = {
        name: estimate(
            model,
            settings(tmp_path, gradient_accumulation_steps=2),
            options(dtype="bfloat16"),
            sequence_length=LENGTH,
            processes=4,
            sharding=name,
        )
        for name in ("ddp", "zero1", "zero2", "zero3")
    }
    one, two, three = (found[name] for name in ("zero1", "zero2", "zero3"))
    assert two.gradients == pytest.approx(one.gradients / 4, abs=4)
    assert three.weights == pytest.approx(two.weights / 4, abs=4) and two.weights == one.weights
    # Master, two moments: 12 bytes instead of 4 a weight, a quarter each.
    assert one.optimizer == pytest.approx(found["ddp"].optimizer * 3 / 4, rel=0.02)
    with pytest.raises(ValueError, match="sharding is 'zero4'"):
        estimate(model, settings(tmp_path), options(), sequence_length=LENGTH, sharding="zero4")


def test_a_row_must_hold_its_images(tmp_path):
    with pytest.raises(
        ValueError, match="sequence_length is 16; wanted more than the 16 tokens of 2 patch group"
    ):
        of(tmp_path, length=16)


def test_the_7b_model_on_24_gb(tmp_path):
    """LLaVA's sizes, two layers of each stack, stretched to all: a layer costs what a layer costs."""
    totals = {}
    for layers in (1, 2):
        config = llava_config()
        config.vision_config.num_hidden_layers = 2
        config.text_config.num_hidden_layers = layers
        for name, choices in (("lora", LORA), ("qlora", QLORA)):
            model = meta_model(config, choices, lora_also_trains=["multi_modal_projector"])
            totals[name, layers] = of(
                tmp_path,
                choices,
                model=model,
                length=2048,
                bf16=True,
                activation_checkpointing=True,
                per_device_train_batch_size=1,
                optim="adamw_torch_fused",
            ).total
    whole = {name: totals[name, 1] + 31 * (totals[name, 2] - totals[name, 1]) for name in ("lora", "qlora")}
    assert 13 * GIB < whole["lora"] < 24 * GIB
    assert whole["qlora"] < 12 * GIB


def test_table_adds_up(tmp_path, capsys):
    found = of(tmp_path)
    rows = {row["part"]: row for row in found.table()}
    assert (
        rows["total"]["bytes"]
        == found.total
        == sum(row["bytes"] for name, row in rows.items() if name != "total")
    )
    needed = with_margin(found.total) / GIB
    assert found.fits(needed * 1.001) and not found.fits(needed * 0.999)
    print_memory(found)
    printed = capsys.readouterr().out
    assert "weights" in printed and "24 GB (23.5 GiB): yes" in printed


def test_vision_towers_and_prefusion_take_part(tmp_path):
    config = wide_config(layers=1)
    frozen = of(tmp_path, config=config)
    tower = of(tmp_path, config=config, patterns=[*EVERYTHING, "vision_tower"])
    assert tower.saved_for_backward > frozen.saved_for_backward
    config.num_prefusion_layers = 2
    fused = of(tmp_path, config=config, patterns=[*EVERYTHING, "prefusion"])
    assert fused.saved_for_backward > 1.4 * frozen.saved_for_backward


def test_padding_changes_the_kernel_on_a_gpu(tmp_path):
    """The mask that padded rows need becomes a bias in bfloat16 that every layer keeps."""
    length, layers = 512, 1
    one, two = (
        of(tmp_path, options(dtype="bfloat16"), length=length, per_device_train_batch_size=rows)
        for rows in (1, 2)
    )
    assert two.saved_for_backward - 2 * one.saved_for_backward >= layers * 2 * length**2 * 2


def test_a_card_offers_less_than_its_name_says():
    """23.7 GiB do not fit a card of 24 GB, of which CUDA offers some 23.6 GiB."""
    assert CARDS[24] < 23.7 and with_margin(22.3) < CARDS[24] < with_margin(22.5)


def test_groups_of_an_example_may_own_any_number_of_patches(tmp_path):
    """A whole background and a few fresh patches, as matching gives them."""
    config = small_config()
    groups = [(config.num_patches, 0), (3, 1)]
    batch = full_batch(config, settings(tmp_path), LENGTH, groups)
    assert batch["patch_mask"].sum(-1).tolist() == [config.num_patches, 3] * 2
    assert batch["group_kind"].tolist() == [0, 1] * 2
    assert int((batch["input_ids"] == config.image_token_id).sum()) == 2 * (config.num_patches + 3)
