"""Whole runs of the program, in this process: what they write, and that it loads."""

import json
import runpy

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trainings import CPU, trainer_for, words

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.train.arguments import parse
from backdrop.train.sft import build_trainer, run
from backdrop.train.stages import check_start, read_stage


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_script_prints_one_line(base, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sft", *words(base, "--trainable", "tower_of_vision")])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("backdrop.train.sft", run_name="__main__")
    assert left.value.code == 1
    printed = capsys.readouterr().err
    assert (
        printed.strip()
        .splitlines()[-1]
        .startswith("error: trainable: ['tower_of_vision'] matches no parameter")
    )
    assert "Traceback" not in printed


def test_the_table_is_saved_beside_the_checkpoint(base):
    recipe = base / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": str(base / "model"),
                "dataset": str(base / "rows"),
                "output_dir": str(base / "out"),
                "trainable": ["multi_modal_projector"],
                "max_steps": 1,
                "stage": "one",
            }
        )
    )
    run(*parse(["--config", str(recipe), *CPU]))
    rows = json.loads((base / "out" / "trainable.json").read_text())
    assert {"module", "parameters", "trainable", "share", "dtype", "device"} == set(rows[0])
    assert read_stage(base / "out")["stage"] == "one"
    assert read_stage(base / "out")["recipe"]["trainable"] == ["multi_modal_projector"]
    check_start(str(base / "out"), "one")
    with pytest.raises(ValueError, match="of stage 'one'; wanted stage 'two'"):
        check_start(str(base / "out"), "two")


def test_a_checkpoint_loads_bit_for_bit(base):
    trainer = trainer_for(base, trainable=["multi_modal_projector"])
    trainer.train()
    trainer.save_model(str(base / "out"))
    again = BackdropForConditionalGeneration.from_pretrained(base / "out")
    state = trainer.model.state_dict()
    assert again.config.trained_on_groups
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_a_checkpoint_every_epoch_by_default(base):
    command = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    command += [
        "--num_train_epochs",
        2,
        "--per_device_train_batch_size",
        4,
        "--trainable",
        "multi_modal_projector",
    ]
    run(*parse([*map(str, command)]))
    assert sorted(path.name for path in (base / "out").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    BackdropForConditionalGeneration.from_pretrained(base / "out")


def test_streamed_rows_train(base):
    from datasets import load_from_disk

    (base / "files").mkdir()
    load_from_disk(base / "rows").to_parquet(base / "files" / "train.parquet")
    command = ["--model", base / "model", "--dataset", base / "files", "--output_dir", base / "out", *CPU]
    command += ["--streaming", "true", "--max_steps", 2, "--per_device_train_batch_size", 2]
    run(*parse([*map(str, command), "--trainable", "multi_modal_projector"]))
    assert (base / "out" / "model.safetensors").is_file()


def test_rows_to_evaluate_on_give_a_loss(base):
    command = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
    command += ["--eval_dataset", base / "rows", "--eval_split", "train", "--eval_strategy", "epoch"]
    command += ["--num_train_epochs", 2, "--load_best_model_at_end", "true", "--save_total_limit", 1]
    run(*parse([*map(str, command)]))
    log = json.loads((base / "out" / "log.json").read_text())
    assert sum("eval_loss" in entry for entry in log) == 2
    assert json.loads((base / "out" / "bad_rows.json").read_text()) == []


def test_the_seed_draws_new_parts_too(base):
    config = BackdropConfig.from_pretrained(base / "model")
    config.num_prefusion_layers = 0
    BackdropForConditionalGeneration(config).save_pretrained(base / "model")

    def drawn(seed):
        command = ["--model", base / "model", "--dataset", base / "rows", "--output_dir", base / "out", *CPU]
        command += ["--num_prefusion_layers", 2, "--seed", seed]
        return build_trainer(*parse([*map(str, command)])).model.state_dict()

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_stage_without_training_saves_its_switches(base):
    recipe = base / "recipe.yaml"
    values = {"model": str(base / "model"), "output_dir": str(base / "one"), "train": False, "split": False}
    recipe.write_text(yaml.safe_dump(values | {"separators": "none", "stage": "ladder_1"}))
    run(*parse(["--config", str(recipe), *CPU]))
    processor = BackdropProcessor.from_pretrained(base / "one")
    model = BackdropForConditionalGeneration.from_pretrained(base / "one")
    assert not processor.image_processor.split and model.config.separator_token_ids is None
    check_start(str(base / "one"), "ladder_1")
    old = load_file(base / "model" / "model.safetensors")
    assert all(
        torch.equal(value, old[name]) for name, value in load_file(base / "one" / "model.safetensors").items()
    )
