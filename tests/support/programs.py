"""What the tests run in processes of their own (`forked.py`)."""

import os
import runpy
import signal
import sys
from pathlib import Path

import torch.distributed.run
from accelerate.commands import launch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from trl import cli

from backdrop.experiments import steps
from backdrop.train import sft

FSDP_SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def accelerate_launch(arguments: list[str]) -> None:
    """`accelerate launch -m backdrop.train.sft`: its processes are forked from this one in place of new ones."""
    found = torch.distributed.run.config_from_args

    def forking(options):
        config, command, rest = found(options)
        assert command == sys.executable and rest[:3] == ["-u", "-m", "backdrop.train.sft"], (command, rest)
        config.start_method = "fork"
        return config, _run_module, rest[2:]

    torch.distributed.run.config_from_args = forking
    sys.argv = ["accelerate-launch", *arguments]
    launch.main()


def _run_module(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__")


def trl_command(arguments: list[str]) -> None:
    """`trl`; the script that it launches runs in this process."""

    def run_here(options) -> None:
        sys.argv = [options.training_script, *options.training_script_args]
        runpy.run_path(options.training_script, run_name="__main__")

    launch.simple_launcher = run_here
    sys.argv = ["trl", *arguments]
    cli.main()


def train_sharded(arguments: list[str]) -> None:
    """`backdrop train` under FSDP2 over gloo.

    accelerate offers FSDP to accelerators alone: it calls processes on the CPU `MULTI_CPU` and leaves its FSDP settings
    unread. PyTorch shards parameters over CPU processes as it does over GPUs, so only the name is changed here.
    """
    for name, value in FSDP_SETTINGS.items():
        os.environ.setdefault(name, value)
    begin = PartialState.__init__

    def renamed(self, *args, **kwargs) -> None:
        begin(self, *args, **kwargs)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = renamed
    sft.main(arguments)


def run_here(command: list[str], log: Path) -> None:
    """In place of `steps.run_logged`: `python -m backdrop train ...` in this process."""
    assert command[1:4] == ["-m", "backdrop", "train"]
    sft.main(command[4:])


class _Killed(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train_stage_killed(recipe: dict, start: Path, folder: Path, step: int) -> None:
    """`steps.train_stage` in a process that is killed after so many steps."""
    build = sft.build_trainer

    def build_killed(*args):
        trainer = build(*args)
        trainer.add_callback(_Killed(step))
        return trainer

    sft.build_trainer, steps.run_logged = build_killed, run_here
    steps.train_stage(recipe, start, folder)
