"""A step through the real SFTTrainer: what should move moves, what should not does not, what is saved loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from trainings import trainer_for
from trl import ModelConfig, SFTConfig

from backdrop.hub_export.export import export_checkpoint
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.train.sft import BackdropArguments, build_trainer
from backdrop.train.trainable import select_trainable, trainable_summary, unused_parameters


@pytest.mark.parametrize(
    "patterns", [["multi_modal_projector", "prefusion", "embed_tokens"], ["language_model"], ["."]], ids=str
)
def test_one_step_moves_what_trains_and_nothing_else(base, patterns):
    trainer = trainer_for(base, trainable=patterns)
    model = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= trainable
    # Identity layers first move their zero output projections; what lies before those gets a zero gradient once.
    still = trainable - moved
    assert all(model.get_parameter(name).grad is not None or "prefusion" in name for name in still), still
    assert not trainable & unused_parameters(model)


def test_a_checkpoint_loads_bit_for_bit(base):
    trainer = trainer_for(base, trainable=["multi_modal_projector"])
    trainer.train()
    trainer.save_model(str(base / "out"))
    again = BackdropForConditionalGeneration.from_pretrained(base / "out")
    state = trainer.model.state_dict()
    assert again.config.trained_on_groups
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


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


def test_a_pattern_that_matches_nothing_is_named():
    model = tiny.backdrop_model()
    with pytest.raises(ValueError, match=r"trainable: \['multi_modal_projektor'\] matches no parameter"):
        select_trainable(model, ["language_model", "multi_modal_projektor"])
    select_trainable(model, ["multi_modal_projector"])
    rows = {row["module"]: row for row in trainable_summary(model)}
    assert rows["multi_modal_projector"]["share"] == 1 and rows["vision_tower"]["trainable"] == 0


def test_a_length_limit_and_a_wrong_module_are_refused(base):
    with pytest.raises(ValueError, match="lora_also_trains: the model has no module"):
        trainer_for(base, ModelConfig(use_peft=True), lora_also_trains=["projector"])
    values = BackdropArguments(model=str(base / "model"), dataset=str(base / "rows"))
    with pytest.raises(ValueError, match="max_length is 1024"):
        build_trainer(values, SFTConfig(output_dir=str(base / "o"), use_cpu=True, bf16=False), ModelConfig())


@pytest.mark.slow
def test_trl_sft_runs_on_the_exported_folder(base):
    export_checkpoint(base / "model", base / "hub")
    rows = Dataset.load_from_disk(base / "rows")
    (base / "files").mkdir()
    rows.to_parquet(base / "files" / "train.parquet")
    command = [
        Path(sys.executable).parent / "trl", "sft", "--model_name_or_path", base / "hub", "--trust_remote_code",
        "--dataset_name", base / "files", "--output_dir", base / "trl", "--max_steps", "1", "--use_cpu",
        "--bf16", "False", "--max_length", "None", "--per_device_train_batch_size", "2", "--report_to", "none",
        "--gradient_checkpointing", "False", "--save_strategy", "no", "--dtype", "float32",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(base / "home"),
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    done = subprocess.run(
        [str(part) for part in command], cwd=base, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert BackdropProcessor.from_pretrained(base / "trl").use_separators
    BackdropForConditionalGeneration.from_pretrained(base / "trl")
