"""Runs in processes of their own: several that train alike, one that is killed, TRL's own command.

All of them start from a fork server (`forked.py`), so that torch is imported once.
"""

import json
import signal

import programs
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_yolo import tiny_yaml
from trainings import save_mixed, words

from backdrop.experiments import steps
from backdrop.hub_export.export import export_checkpoint
from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration
from backdrop.processing.processing_backdrop import BackdropProcessor
from backdrop.train.arguments import parse
from backdrop.train.sft import main as sft_main
from backdrop.train.sft import run

STEPS = ["--max_steps", 2, "--logging_steps", 1, "--save_strategy", "steps", "--save_steps", 1, "--seed", 3]


def logged_losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]


def test_two_processes_train_alike(base, fork_server):
    """DDP over two CPU processes: one checkpoint, written once, and the gradients of both."""
    options = ["--trainable", "multi_modal_projector", *STEPS]
    launch = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "backdrop.train.sft"]
    two = words(base, *options, "--per_device_train_batch_size", 2, out="two")
    output = fork_server.run(programs.accelerate_launch, [*launch, *two], log=base / "two.log")
    assert output.count("What trains") == 1
    run(*parse(words(base, *options, "--per_device_train_batch_size", 4, out="one")))
    one, two = (logged_losses(base / name) for name in ("one", "two"))
    assert len(two) == 2
    assert two == pytest.approx(one, rel=0.02)
    checkpoints = sorted(path.name for path in (base / "two").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2"]
    BackdropForConditionalGeneration.from_pretrained(base / "two")


# Every batch of these examples has one process without something that the other has: pictures to split, objects, images.
MIXED = {
    "lora, checkpointing, workers": (
        ["--use_peft", "true", "--lora_r", 2, "--lora_also_trains", "multi_modal_projector", "prefusion"],
        ["--gradient_checkpointing", "true", "--separate_projectors", "true", "--dataloader_num_workers", 1],
    ),
    "lora": (["--use_peft", "true", "--lora_r", 2], []),
    "projectors, checkpointing": (
        ["--trainable", "multi_modal_projector", "separators"],
        ["--gradient_checkpointing", "true", "--separate_projectors", "true"],
    ),
    "everything, workers": (
        ["--trainable", "vision_tower", "multi_modal_projector", "prefusion", "language_model"],
        ["--separate_projectors", "true", "--separate_vision_towers", "true", "--dataloader_num_workers", 2],
    ),
    "everything, checkpointing": (
        ["--trainable", "vision_tower", "multi_modal_projector", "prefusion", "language_model"],
        ["--gradient_checkpointing", "true"],
    ),
}


@pytest.mark.parametrize(
    ("trains", "more"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.real] if i else [])
        for i, (name, case) in enumerate(MIXED.items())
    ],
)
def test_two_processes_with_mixed_rows_train_alike(base, fork_server, trains, more):
    """Detectors are loaded while the other process is in a collective operation; parts are unused in one of the two."""
    save_mixed(base, tiny_yaml(base, "detect"))
    options = [
        "--dataset",
        base / "mixed",
        *trains,
        *more,
        "--max_steps",
        3,
        "--logging_steps",
        1,
        "--seed",
        3,
    ]
    options += ["--train_sampling_strategy", "sequential", "--save_strategy", "no", "--lora_dropout", 0]
    fork_server.run(
        sft_main,
        words(base, *options, "--per_device_train_batch_size", 2, out="two"),
        log=base / "two.log",
        processes=2,
    )
    run(*parse(words(base, *options, "--per_device_train_batch_size", 4, out="one")))
    one, two = (logged_losses(base / name) for name in ("one", "two"))
    assert len(two) == 3
    assert two == pytest.approx(one, rel=1e-4)


SHARDED = {
    "projector and separators": ("FULL_STATE_DICT", ["multi_modal_projector", "separators"], []),
    "all but the tower": (
        "SHARDED_STATE_DICT",
        ["multi_modal_projector", "prefusion", "language_model"],
        ["--num_prefusion_layers", 1],
    ),
}


@pytest.mark.parametrize(("states", "trainable", "more"), SHARDED.values(), ids=SHARDED)
def test_sharded_processes_train_alike(base, fork_server, states, trainable, more):
    """FSDP2 over two CPU processes ends with the weights of one process, in one folder that loads."""
    options = ["--trainable", *trainable, *more, *STEPS]
    # Adam would amplify rounding.
    options += ["--optim", "sgd", "--learning_rate", 0.1, "--weight_decay", 0.1]
    fork_server.run(
        programs.train_sharded,
        words(base, *options, "--per_device_train_batch_size", 2, out="two"),
        log=base / "two.log",
        processes=2,
        environment={"FSDP_STATE_DICT_TYPE": states},
    )
    run(*parse(words(base, *options, "--per_device_train_batch_size", 4, out="one")))
    checkpoint = {path.name for path in (base / "two" / "checkpoint-1").iterdir()}
    sharded = {"FULL_STATE_DICT": "pytorch_model_fsdp.bin", "SHARDED_STATE_DICT": "pytorch_model_fsdp_0"}
    assert sharded[states] in checkpoint, "the processes did not run under FSDP"
    before, one, two = (
        BackdropForConditionalGeneration.from_pretrained(base / name).state_dict()
        for name in ("model", "one", "two")
    )
    assert any(not torch.equal(value, before[name]) for name, value in one.items() if name in before)
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    table = two["model.language_model.embed_tokens.weight"]
    if "separators" in trainable:  # of the embedding rows, only the separators' have moved
        old = before["model.language_model.embed_tokens.weight"]
        moved = (table != old).any(dim=1).nonzero().flatten().tolist()
        assert moved == sorted(BackdropConfig.from_pretrained(base / "two").separator_token_ids)


def test_a_killed_run_goes_on_and_ends_alike(base, fork_server, tmp_path, monkeypatch):
    recipe = {
        "dataset": str(base / "rows"), "trainable": ["multi_modal_projector"], "max_steps": 8, "save_strategy": "steps",
        "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "learning_rate": 0.01,
    }  # fmt: skip
    monkeypatch.setattr(steps, "run_logged", programs.run_here)
    whole = steps.train_stage(recipe, base / "model", tmp_path / "whole")
    killed = tmp_path / "killed"
    process = fork_server.start(
        programs.train_stage_killed, recipe, base / "model", killed, 5, log=tmp_path / "killed.log"
    )
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "killed.log").read_text()[-3000:]
    found = {path.name for path in (killed / "model").iterdir()}
    assert "checkpoint-4" in found and "config.json" not in found
    commands = []
    monkeypatch.setattr(
        steps, "run_logged", lambda command, log: (commands.append(command), programs.run_here(command, log))
    )
    again = steps.train_stage(recipe, base / "model", killed)
    assert commands[0][-2:] == ["--resume_from_checkpoint", str(killed / "model" / "checkpoint-4")]
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_trl_sft_runs_on_the_exported_folder(base, fork_server):
    export_checkpoint(base / "model", base / "hub")
    (base / "files").mkdir()
    Dataset.load_from_disk(base / "rows").to_parquet(base / "files" / "train.parquet")
    command = [
        "sft", "--model_name_or_path", base / "hub", "--trust_remote_code",
        "--dataset_name", base / "files", "--output_dir", base / "trl", "--max_steps", "1", "--use_cpu",
        "--bf16", "False", "--max_length", "None", "--per_device_train_batch_size", "2", "--report_to", "none",
        "--gradient_checkpointing", "False", "--save_strategy", "no", "--dtype", "float32",
    ]  # fmt: skip
    fork_server.run(
        programs.trl_command,
        [str(part) for part in command],
        log=base / "trl.log",
        environment={"TRL_EXPERIMENTAL_SILENCE": "1"},
    )
    assert BackdropProcessor.from_pretrained(base / "trl").use_separators
    BackdropForConditionalGeneration.from_pretrained(base / "trl")


@pytest.mark.real
def test_sharded_processes_with_mixed_rows_train_alike(base, fork_server):
    """FSDP2 gathers a layer's shards where all processes reach it: the tower's too, in a process with text alone."""
    save_mixed(base, tiny_yaml(base, "detect"))
    trains = ["vision_tower", "multi_modal_projector", "prefusion", "language_model"]
    options = ["--dataset", base / "mixed", "--trainable", *trains, "--separate_vision_towers", "true"]
    options += ["--max_steps", 3, "--logging_steps", 1, "--seed", 3, "--save_strategy", "no"]
    options += ["--train_sampling_strategy", "sequential", "--optim", "sgd", "--learning_rate", 0.1]
    fork_server.run(
        programs.train_sharded,
        words(base, *options, "--per_device_train_batch_size", 2, out="two"),
        log=base / "two.log",
        processes=2,
    )
    run(*parse(words(base, *options, "--per_device_train_batch_size", 4, out="one")))
    one, two = (logged_losses(base / name) for name in ("one", "two"))
    assert len(two) == 3 and two == pytest.approx(one, rel=1e-3)
