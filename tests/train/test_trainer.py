"""The trainer: its matching loss, group kinds, and checkpoints that are complete or absent."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from trainings import trainer_for
from trl import ModelConfig

from backdrop.train.stages import check_start
from backdrop.train.trainer import MismatchCollator, answer_scores, replace_files


def test_the_matching_loss_is_the_ranking_of_likelihoods(base):
    trainer = trainer_for(base, trainable=["multi_modal_projector"], matching_loss=0.5)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    other = batch["mismatched"]
    assert torch.equal(other["labels"][0][-3:], batch["labels"][0][-3:])
    groups = [len(trainer.train_dataset[i]["images"]) for i in range(4)]
    assert torch.equal(other["pixel_values"][: groups[3]], batch["pixel_values"][-groups[3] :])
    model = trainer.model.eval()
    with torch.no_grad():
        alone = [
            answer_scores(model, trainer.data_collator.collator([trainer.train_dataset[i]])) for i in range(4)
        ]
        together = answer_scores(model, {k: v for k, v in batch.items() if k != "mismatched"})
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-4)
    trainer.train()
    assert {"matching_loss", "matching_accuracy"} <= set().union(*trainer.state.log_history)
    with pytest.raises(ValueError, match="this one has 1; wanted a batch size of 2"):
        trainer.data_collator([trainer.train_dataset[0]])


def test_mismatched_images_are_others_and_as_many():
    """Two captions of one image in a row, and a row with two images: none is told that its own image is wrong."""
    seen = MismatchCollator(lambda rows: {"images": [row["images"] for row in rows]})
    one, two, other = (Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3))
    rows = [{"images": images} for images in ([one], [one.copy()], [one, two], [other], [])]
    assert seen(rows)["mismatched"]["images"] == [[other], [other], [one, two], [one], []]


def test_rows_of_the_other_kind_are_refused(base):
    trainer = trainer_for(base, trainable=["multi_modal_projector"], group_kinds="background")
    with pytest.raises(
        ValueError, match=r"group_kinds is 'background', but a batch holds \['background', 'object'\]"
    ):
        trainer.train()


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("lora", [False, True], ids=["projector", "lora"])
def test_a_resumed_run_has_the_same_losses(base, lora):
    def trainer():
        options = ModelConfig(use_peft=lora, lora_r=2)
        made = trainer_for(base, options, trainable=None if lora else ["multi_modal_projector", "separators"])
        made.args.max_steps, made.args.logging_steps = 6, 1
        made.args.save_strategy, made.args.save_steps = "steps", 3
        return made

    whole = trainer()
    whole.train()
    assert sorted(path.name for path in (base / "out").glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(base / "out" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert (base / "out" / "checkpoint-3" / "config.json").is_file()


def test_a_save_that_is_cut_off_leaves_no_checkpoint(base, monkeypatch):
    trainer = trainer_for(base, trainable=["multi_modal_projector"])
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.args.max_steps = 2

    def cut_off(*args):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return whole(*args)

    whole = trainer._save_optimizer_and_scheduler
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in (base / "out").glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_finished_model_that_is_cut_off_does_not_load(tmp_path, monkeypatch):
    built, place = tmp_path / "built", tmp_path / "place"
    for folder, text in ((built, "new"), (place, "old")):
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text(text)
    replace = os.replace

    def cut_off(source, target):
        if Path(target).name == "tokenizer.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        replace_files(built, place, ("config.json",))
    assert not (place / "config.json").exists()
    with pytest.raises(ValueError, match=r"holds no config.json; wanted a finished checkpoint"):
        check_start(str(place), None)
    monkeypatch.undo()
    (built / "model.safetensors").write_text("new")
    replace_files(built, place, ("config.json",))
    assert {path.read_text() for path in place.iterdir()} == {"new"}
