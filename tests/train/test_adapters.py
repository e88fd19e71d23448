"""LoRA adapters: what trains beside them, over quantised models too, and that they merge into what was trained."""

import pytest
import torch
from trainings import CPU, trainer_for
from trl import ModelConfig

from backdrop.evaluation.answering import load
from backdrop.experiments.steps import load_for_scoring
from backdrop.hub_export.checkpoint import load_checkpoint
from backdrop.hub_export.export import export_checkpoint
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.train.arguments import parse
from backdrop.train.sft import build_trainer, run


def test_lora_with_separators_projector_and_prefusion_trains_saves_merges_and_exports(base):
    options = ModelConfig(use_peft=True, lora_r=4)
    trainer = trainer_for(base, options, lora_also_trains=["multi_modal_projector", "prefusion"])
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in names) and any("trainable_tokens" in name for name in names)
    assert any("multi_modal_projector" in name for name in names) and any(
        "prefusion" in name for name in names
    )
    assert not any("vision_tower" in name for name in names)
    assert not any("lora" in name and "prefusion" in name for name in names)
    trainer.train()
    trainer.save_model(str(base / "adapter"))
    trainer.model.config.save_pretrained(base / "adapter")
    trainer.processing_class.save_pretrained(base / "adapter")
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    inputs.pop("labels")
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
    export_checkpoint(base / "adapter", base / "hub")
    merged = BackdropForConditionalGeneration.from_pretrained(base / "hub").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-3)


def test_lora_with_separators_trains_a_model_with_tied_embeddings(base):
    model = BackdropForConditionalGeneration.from_pretrained(base / "model")
    config = model.config.to_dict()
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    tied = BackdropForConditionalGeneration(BackdropConfig.from_dict(config))
    tied.save_pretrained(base / "model")
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    words += ["--use_peft", "true", "--lora_r", 2, "--lora_also_trains", "multi_modal_projector"]
    run(*parse([*map(str, words), "--max_steps", "2", "--learning_rate", "0.01"]))
    trained, _ = load_checkpoint(base / "out")
    separators = tied.config.separator_token_ids
    changed = (trained.get_input_embeddings().weight != tied.get_input_embeddings().weight).any(-1)
    assert changed.nonzero().flatten().tolist() == sorted(separators)
    assert trained.lm_head.weight is trained.get_input_embeddings().weight
    # The evaluation takes the adapter's folder as it is.
    scored, _ = load(base / "out", "cpu")
    assert all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(scored.parameters(), trained.parameters(), strict=True)
    )


def test_an_adapter_is_evaluated_as_it_was_trained(base):
    words = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    words += ["--use_peft", "true", "--lora_r", 2, "--masked_attention", "false", "--max_steps", 1]
    run(*parse([*map(str, words)]))
    assert BackdropConfig.from_pretrained(base / "model").masked_attention
    model, _ = load(base / "out", "cpu")
    assert not model.config.masked_attention and not model.model.config.masked_attention
    # Quantised for a score, an adapter is merged first.
    quantised, _ = load_for_scoring(base / "out", {"load_in_8bit": True}, base / "score")
    assert quantised.is_loaded_in_8bit and not quantised.config.masked_attention


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_only_the_language_models_layers_are_quantised_and_lora_trains_on_them(base, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    words = [
        "--model",
        base / "model",
        "--dataset",
        base / "rows",
        "--output_dir",
        base / "out",
        "--max_steps",
        2,
    ]
    words += ["--use_peft", "true", f"--{bits}", "true", "--lora_r", 2, "--use_cpu", "true", "--bf16", "true"]
    words += ["--gradient_checkpointing", "false", "--lora_also_trains", "multi_modal_projector", "prefusion"]
    trainer = build_trainer(*parse([*map(str, words)]))
    kind = bitsandbytes.nn.Linear4bit if bits == "load_in_4bit" else bitsandbytes.nn.Linear8bitLt
    packed = [name for name, module in trainer.model.named_modules() if isinstance(module, kind)]
    assert packed and all("language_model.layers" in name for name in packed)
    trainer.train()  # gradients where they should be, nothing frozen moved: else the check would stop it
    assert trainer.state.log_history[-1]["train_loss"] > 0
    words[words.index("--use_peft") + 1] = "false"
    with pytest.raises(ValueError, match="wanted use_peft: true"):
        build_trainer(*parse([*map(str, words)]))
