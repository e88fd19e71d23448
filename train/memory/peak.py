"""Peak memory of a training run, estimated by running one training step on tensors without data.

The step is whole: batch, towers, projector, prefusion, language model, TRL's chunked loss, backward with recomputation,
clipping, optimizer. Nothing is computed by formula except what several processes share.

Shapes: `B` examples in a batch, `L` positions, `G` groups of patches, `P` patches of the grid, `S` image side.
"""

import contextlib
import copy
import math
import re
from collections.abc import Sequence

import torch
from peft import get_peft_model
from torch import nn
from trl import ModelConfig, SFTConfig

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

from ..adapters import lora_config
from ..trainable import select_trainable
from .kernels import gpu_kernels, triton_loss
from .ledger import Ledger
from .optimizers import check_optimizer
from .quantised import quantise
from .result import CUDA_CONTEXT, FRAGMENTATION, MemoryEstimate
from .step import prepare_for_training, run_step, split_evenly, without_data

CUDA_BLOCK = 512  # kMinBlockSize of c10/cuda/CUDACachingAllocator.h: every allocation is rounded up to it
SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp")


def estimate(
    model: nn.Module,
    training: SFTConfig,
    options: ModelConfig,
    *,
    sequence_length: int,
    images_per_example: int = 1,
    groups_per_image: int = 2,
    example_groups: Sequence[tuple[int, int]] | None = None,
    processes: int = 1,
    sharding: str = "ddp",
    device: str = "cuda",
) -> MemoryEstimate:
    """Peak memory of a run, by running one step of it without data.

    Args:
        model: ready to train, with or without LoRA: `requires_grad`, dtypes and attention as in the run; best built on
            the meta device (`meta_model`). It is copied, not touched.
        training: read are batch size, accumulation, gradient checkpointing, optimizer, bf16 and fp16, clipping,
            assistant_only_loss.
        options: read are load_in_4bit, load_in_8bit, use_bnb_nested_quant. Quantised are the linear maps of the
            language model's layers; embeddings, head, tower and projector keep their dtype.
        sequence_length: `L`, tokens of the longest example, image tokens included.
        images_per_example: images of every example.
        groups_per_image: groups of patches that every image is split into.
        example_groups: in place of these two, (patches, kind) of each group of every example; ready-made groups may overlap.
        processes: data-parallel processes.
        sharding: what the processes divide among them: nothing ("ddp"), optimizer states ("zero1"), also gradients
            ("zero2"), also weights ("zero3", "fsdp").
        device: the device to model, "cuda" or "cpu"; it need not be present.

    Raises:
        ValueError: an unknown optimizer, sharding or device, a sequence too short for its images, or DoRA over a
            quantised model, which the estimate does not know.
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding is {sharding!r}; wanted one of {', '.join(SHARDINGS)}.")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device is {device!r}; wanted 'cuda' or 'cpu'.")
    check_optimizer(training.optim)
    if options.use_dora and (options.load_in_4bit or options.load_in_8bit):
        raise ValueError(
            "use_dora is true with load_in_4bit or load_in_8bit, whose memory is not estimated; wanted one of them."
        )
    gpu = device == "cuda"
    ledger = Ledger(block=CUDA_BLOCK if gpu else 1)
    with contextlib.ExitStack() as stack:
        if gpu:
            stack.enter_context(triton_loss())
        stack.enter_context(ledger)
        model = without_data(model)
        if options.load_in_4bit or options.load_in_8bit:
            quantise(model, options)
        prepare_for_training(model, training)
        ledger.assign("weights", [*model.parameters(), *model.buffers()])
        ledger.peaks.clear()  # forget the peak of building the model
        if gpu:
            stack.enter_context(gpu_kernels())
        masters = processes > 1 and sharding.startswith("zero")
        if example_groups is None:
            with torch.utils._python_dispatch._disable_current_modes():
                example_groups = split_evenly(model.config, images_per_example, groups_per_image)
        host = run_step(model, training, ledger, gpu, masters, sequence_length, example_groups)
    peaks = ledger.peaks
    if processes > 1:
        peaks = {
            phase: share_between_processes(phase, parts, model, processes, sharding)
            for phase, parts in peaks.items()
        }
    totals = {phase: sum(parts.values()) for phase, parts in peaks.items()}
    phase = max(totals, key=totals.__getitem__)
    return MemoryEstimate(
        **peaks[phase],
        overhead=CUDA_CONTEXT + int(FRAGMENTATION * totals[phase]) if gpu else 0,
        phase=phase,
        peaks=totals,
        saved_for_backward=ledger.saved_for_backward,
        host=host,
    )


def meta_model(
    config: BackdropConfig,
    options: ModelConfig,
    trainable: list[str] | None = None,
    lora_also_trains: Sequence[str] = (),
) -> nn.Module:
    """A model on the meta device in which the parts to train are chosen as by a recipe (`BackdropArguments`).

    Args:
        options: read are dtype ("auto": bfloat16), attn_implementation, use_peft and LoRA's options.
        trainable: without LoRA, patterns of `select_trainable`.
        lora_also_trains: with LoRA, modules trained whole beside it.
    """
    dtype = torch.bfloat16 if options.dtype in (None, "auto") else getattr(torch, options.dtype)
    config = copy.deepcopy(config)
    config._attn_implementation = options.attn_implementation or "sdpa"
    with torch.device("meta"):
        model = BackdropForConditionalGeneration(config)
    model = model.to(dtype)
    if not options.use_peft:
        select_trainable(model, list(trainable or ()))
        return model
    return get_peft_model(model, lora_config(model, options, list(lora_also_trains)))


def share_between_processes(
    phase: str, parts: dict[str, int], model: nn.Module, processes: int, sharding: str
) -> dict[str, int]:
    """The parts of one process out of several.

    DDP keeps a second copy of the gradients in its buckets. ZeRO (Rajbhandari et al. 2020) divides optimizer states
    (with their float32 masters), gradients and weights by the processes, stage by stage; with divided weights two
    layers are whole at a time (the one that runs and the one fetched ahead).
    """
    parts = dict(parts)
    if sharding == "ddp":
        parts["temporaries"] += sum(
            p.numel() * p.element_size() for p in model.parameters() if p.requires_grad
        )
        return parts
    divided = ["optimizer"]
    divided += ["gradients"] if sharding != "zero1" else []
    divided += ["weights"] if sharding in ("zero3", "fsdp") else []
    divided += ["temporaries"] if phase == "optimizer step" else []
    for part in divided:
        parts[part] = math.ceil(parts[part] / processes)
    if "weights" in divided and phase != "optimizer step":
        layers = [module for name, module in model.named_modules() if re.search(r"\.layers\.\d+$", name)]
        sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers]
        parts["temporaries"] += 2 * max(sizes, default=0)
    return parts
