"""Runs `backdrop.train.sft` under FSDP2 over gloo: `torchrun --standalone --nproc_per_node 2 tests/fsdp_on_cpu.py --config recipe.yaml`.

accelerate offers FSDP to accelerators alone: it calls processes on the CPU `MULTI_CPU` and leaves its FSDP settings
unread. PyTorch divides parameters over CPU processes as it does over GPUs, so only the name is changed here.
"""

import os

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from backdrop.train import sft

SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def main() -> None:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    begin = PartialState.__init__

    def renamed(self, *args, **kwargs) -> None:
        begin(self, *args, **kwargs)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = renamed
    sft.main()


if __name__ == "__main__":
    main()
