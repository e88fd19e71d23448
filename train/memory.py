"""Peak memory of a training run, before it starts.

    python -m backdrop.train.memory                    # LLaVA-1.5-7B cases: which fit 24, 40 and 80 GB
    python -m backdrop.train.memory --check            # the estimate against measured runs on the CPU
    python -m backdrop.train.memory --docs docs        # both, written to docs/memory.md and docs/memory.json

`estimate` guesses nothing by formula: it runs one whole training step (batch, towers, projector, prefusion, language
model, TRL's chunked loss, backward with recomputation, clipping, optimizer) on tensors without data, and counts the
storages that are alive. Floating-point tensors are torch's `FakeTensor`s; integers and booleans are real, so that
everything that depends on values (patch masks, placeholders, padding) takes the way it takes in training.

On a GPU some kernels keep other things than on the CPU; `_gpu_kernels` puts in what CUDA would run: flash or
memory-efficient attention, dropout's boolean mask, autocast's float32 list, TRL's Triton loss. TRL's loss is TRL's own
code: 1.16 or newer.

Shapes: `B` rows, `L` columns, `G` groups of patches, `P` patches of the grid, `S` image side.
"""

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import CLIPVisionConfig, LlamaConfig, Trainer
from trl import ModelConfig, SFTConfig

from backdrop.modeling.configuration_backdrop import BackdropConfig
from backdrop.modeling.modeling_backdrop import BackdropForConditionalGeneration

from .trainable import select_trainable

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "temporaries")
# What a CUDA process takes before its first tensor. transformers' "Model training anatomy" measures 1.3 GB
# with eagerly loaded kernels; since CUDA 11.7 modules load lazily and 0.3 to 0.6 GB are usual. cuBLAS adds 32 MiB.
CUDA_CONTEXT = 640 * 2**20
# Bytes that PyTorch's caching allocator reserves and cannot hand out (block splitting), as a share of what is allocated.
FRAGMENTATION = 0.04
CUDA_BLOCK = 512  # kMinBlockSize of c10/cuda/CUDACachingAllocator.h: every allocation is rounded up to it
SHARDINGS = ("ddp", "zero1", "zero2", "zero3", "fsdp")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the moment of the peak, by part.

    Attributes:
        weights: parameters and buffers as they are stored (packed, where quantised).
        gradients: of trainable parameters, as far as they exist at the peak.
        optimizer: states of the optimizer (and float32 masters under ZeRO).
        activations: what the forward left for the backward and is not freed yet at the peak; the batch.
        temporaries: everything else alive at the peak: recomputation of a layer, logits tiles, casts, dequantised
            weights, kernels' workspace; buckets and gathered layers of several processes.
        overhead: CUDA context and fragmentation, an assumption (`CUDA_CONTEXT`, `FRAGMENTATION`).
        phase: where the peak is: "forward", "backward" or "optimizer step".
        peaks: highest total of each phase, without overhead.
        saved_for_backward: activations at the end of the forward.
        host: bytes of paged optimizer states, which live in the host's memory under pressure.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    overhead: int
    phase: str
    peaks: dict[str, int]
    saved_for_backward: int
    host: int = 0

    @property
    def allocated(self) -> int:
        """What PyTorch's allocator hands out at the peak (`torch.cuda.max_memory_allocated`)."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def total(self) -> int:
        return self.allocated + self.overhead

    def fits(self, gib: float) -> bool:
        """Whether the peak is within a device of so many GiB."""
        return self.total <= gib * GIB

    def table(self) -> list[dict]:
        """One row per part: name, bytes, GiB, share of the total."""
        rows = [(part, getattr(self, part)) for part in (*PARTS, "overhead")] + [("total", self.total)]
        return [
            {"part": part, "bytes": size, "gib": size / GIB, "share": size / self.total}
            for part, size in rows
        ]


def print_memory(estimate: MemoryEstimate, devices: Iterable[float] = (24, 40, 80)) -> None:
    """The table on the console, and which devices it fits."""
    table = Table("part", "GiB", "share", title=f"Memory at the peak ({estimate.phase})")
    for row in estimate.table():
        table.add_row(
            row["part"],
            f"{row['gib']:.2f}",
            f"{row['share']:.1%}",
            style="bold" if row["part"] == "total" else None,
        )
    Console().print(table)
    verdicts = ", ".join(f"{gib:g} GiB: {'yes' if estimate.fits(gib) else 'no'}" for gib in devices)
    Console().print(f"Fits {verdicts}")


def estimate(
    model: nn.Module,
    training: SFTConfig,
    options: ModelConfig,
    *,
    sequence_length: int,
    images_per_row: int = 1,
    groups_per_image: int = 2,
    processes: int = 1,
    sharding: str = "ddp",
    device: str = "cuda",
) -> MemoryEstimate:
    """Peak memory of a run, by running one step of it without data.

    Args:
        model: ready to train, with or without LoRA: `requires_grad`, dtypes and attention as in the run; best built on
            the meta device (`meta_model`). It is copied, not touched.
        training: of it are read: batch size, accumulation, gradient checkpointing, optimizer, bf16 and fp16, clipping,
            assistant_only_loss.
        options: of it are read: load_in_4bit, load_in_8bit, use_bnb_nested_quant. Quantised are the linear maps of the
            language model's layers; embeddings, head, tower and projector keep their dtype.
        sequence_length: `L`, columns of the longest row, image tokens included.
        images_per_row, groups_per_image: every image is split into so many groups of patches.
        processes, sharding: data-parallel processes, and what they share: nothing ("ddp"), optimizer states ("zero1"),
            gradients too ("zero2"), weights too ("zero3", "fsdp").
        device: "cuda" or "cpu": whose kernels run; any machine can tell either.

    Raises:
        ValueError: an optimizer, a sharding or a device that is not known, or a row too short for its images.
    """
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding is {sharding!r}; wanted one of {', '.join(SHARDINGS)}.")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device is {device!r}; wanted 'cuda' or 'cpu'.")
    _check_optimizer(training.optim)
    gpu = device == "cuda"
    ledger = _Ledger(block=CUDA_BLOCK if gpu else 1)
    with contextlib.ExitStack() as stack:
        if gpu:
            stack.enter_context(_triton_loss())
        stack.enter_context(ledger)
        model = _without_data(model)
        if options.load_in_4bit or options.load_in_8bit:
            _quantise(model, options)
        _prepare(model, training)
        ledger.assign("weights", [*model.parameters(), *model.buffers()])
        ledger.peaks.clear()  # of building the model
        if gpu:
            stack.enter_context(_gpu_kernels())
        masters = processes > 1 and sharding.startswith("zero")
        host = _step(
            model, training, ledger, gpu, masters, (sequence_length, images_per_row, groups_per_image)
        )
    peaks = ledger.peaks
    if processes > 1:
        peaks = {phase: _share(phase, parts, model, processes, sharding) for phase, parts in peaks.items()}
    totals = {phase: sum(parts.values()) for phase, parts in peaks.items()}
    phase = max(totals, key=totals.get)
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
    lora_also_trains: list[str] = (),
) -> nn.Module:
    """A model on the meta device with what trains chosen as a recipe chooses it (`BackdropArguments`).

    Args:
        options: of it are read: dtype ("auto": bfloat16), attn_implementation, use_peft and LoRA's options.
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
    from peft import get_peft_model

    from .sft import lora_config  # sft imports this module

    return get_peft_model(model, lora_config(model, options, list(lora_also_trains)))


# The simulated step


class _Ledger(TorchDispatchMode):
    """Runs floats as fakes and integers for real, and keeps account of the storages that are alive.

    Attributes:
        live: bytes alive by part.
        peaks: for each phase the parts at its highest total.
        phase: name under which peaks are kept now.
    """

    def __init__(self, block: int):
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=False)
        self.live = dict.fromkeys(PARTS, 0)
        self.peaks: dict[str, dict[str, int]] = {}
        self.phase = "forward"
        self.saved_for_backward = 0
        self._block = block
        # Storages by id: part, bytes, and the reference whose end takes them out.
        self._known: dict[int, tuple[str, int, weakref.ref]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:  # asked before nearly every operation
            return args[0].fake_device
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        if any(isinstance(value, FakeTensor) for value in given):
            result = self._run_fake(func, types, args, kwargs, given)
        else:
            result = self._run_real(func, types, args, kwargs, given)
        for value in _tensors((result,)):
            self._add(value)
        self._keep_peak(_workspace(func, args))
        return result

    def _run_fake(self, func, types, args, kwargs, given):
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        if func in _INDEXING or not all(isinstance(value, FakeTensor) for value in given):
            args, kwargs = tree_map_only(torch.Tensor, self._as_fake, (args, kwargs))
        return self.fakes.__torch_dispatch__(func, types, args, kwargs)

    def _run_real(self, func, types, args, kwargs, given):
        if not given:
            made = self.fakes.__torch_dispatch__(func, types, args, kwargs)
            if isinstance(made, torch.Tensor) and _without_values(made):
                return made
        made = func(*args, **kwargs)
        return self._as_fake(made) if isinstance(made, torch.Tensor) and _without_values(made) else made

    def _as_fake(self, tensor: torch.Tensor) -> FakeTensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fakes.from_tensor(tensor)

    def assign(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """Puts the tensors' storages under a part."""
        for tensor in tensors:
            key = self._add(tensor)
            old, size, reference = self._known[key]
            self.live[old] -= size
            self.live[part] += size
            self._known[key] = (part, size, reference)

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """Hook for what autograd saves: an activation, unless it is a weight."""
        key = self._add(tensor)
        if self._known[key][0] == "temporaries":
            self.assign("activations", [tensor])
        return tensor

    def end_forward(self) -> None:
        """What is alive now was left for the backward, by other ways than autograd's too (a context, a closure)."""
        for key, (part, size, reference) in list(self._known.items()):
            if part == "temporaries":
                self._known[key] = ("activations", size, reference)
                self.live["temporaries"] -= size
                self.live["activations"] += size
        self.saved_for_backward = self.live["activations"]

    def _add(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = -(-storage.nbytes() // self._block) * self._block
            self._known[key] = ("temporaries", size, weakref.ref(storage, lambda _: self._remove(key)))
            self.live["temporaries"] += size
        return key

    def _remove(self, key: int) -> None:
        part, size, _ = self._known.pop(key)
        self.live[part] -= size

    def _keep_peak(self, workspace: int) -> None:
        now = sum(self.live.values()) + workspace
        if self.phase not in self.peaks or now > sum(self.peaks[self.phase].values()):
            self.peaks[self.phase] = {**self.live, "temporaries": self.live["temporaries"] + workspace}


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results, lists opened."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _without_values(tensor: torch.Tensor) -> bool:
    """Floats are fakes; single numbers (an optimizer's step count) and integers are real."""
    return tensor.is_floating_point() and tensor.ndim > 0


_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor,
    _aten._unsafe_index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


def _positions(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Boolean indices as the positions they choose: the result's size is then known without the values."""
    positions = []
    for index in indices:
        known = isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor)
        positions += index.nonzero().unbind(1) if known and index.dtype == torch.bool else [index]
    return positions


def _workspace(func, args) -> int:
    """Bytes that a kernel takes for itself, unseen by the dispatcher.

    The backward of flash and of memory-efficient attention sums the queries' gradient in float32, beside one float32
    per query and head (`dq_accum`, `softmax_d` in aten/native/transformers/cuda/flash_attn/flash_api.cpp; `gq_workspace`
    and `delta` in mem_eff_attention/kernel_backward.h).
    """
    if func in (
        _aten._scaled_dot_product_flash_attention_backward.default,
        _aten._scaled_dot_product_efficient_attention_backward.default,
    ):
        query = args[1]
        return 4 * query.numel() + 4 * query.numel() // query.shape[-1]
    return 0


def _step(
    model: nn.Module,
    training: SFTConfig,
    ledger: _Ledger,
    gpu: bool,
    masters: bool,
    lengths: tuple[int, int, int],
) -> int:
    """One step as `SFTTrainer` takes it from the second step on; returns the bytes of paged states."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # The optimizer goes first: its states exist from the second step on, which is the first to need the most.
    ledger.phase = "optimizer step"
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    ledger.assign("gradients", [parameter.grad for parameter in trained])
    if training.max_grad_norm:
        nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
    stepped = trained
    if masters:
        stepped = [nn.Parameter(torch.empty(p.shape)) if _is_half(p) else p for p in trained]
        for own, parameter in zip(stepped, trained, strict=True):
            own.grad = torch.empty(own.shape) if own is not parameter else own.grad
    optimizer = _optimizer(stepped, training, gpu)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in tree_leaves(state)]
    copies = [own for own, parameter in zip(stepped, trained, strict=True) if own is not parameter]
    ledger.assign("optimizer", [*copies, *(value for value in states if isinstance(value, torch.Tensor))])
    ledger.peaks.clear()
    optimizer.step()  # the states are there now
    for own in copies:
        own.grad = None
    if training.gradient_accumulation_steps == 1:
        for parameter in trained:
            parameter.grad = None
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.assign("gradients", [p.grad]))

    ledger.phase = "forward"
    batch = _batch(model.config, training, *lengths)
    amp = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    saving = torch.autograd.graph.saved_tensors_hooks(ledger.save, lambda tensor: tensor)
    with saving, torch.autocast("cpu", dtype=amp, enabled=amp is not None):
        outputs = model(**batch, fused_lm_head=True, use_cache=False)
    loss = -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)
    del outputs
    ledger.end_forward()
    ledger.phase = "backward"
    loss.backward()
    return optimizer.host if isinstance(optimizer, _BlockwiseAdamW) else 0


def _without_data(model: nn.Module) -> nn.Module:
    """A copy whose parameters and floating buffers are fakes; tied ones stay tied."""
    with torch.utils._python_dispatch._disable_current_modes():
        model = copy.deepcopy(model)
    made: dict[int, tuple[torch.Tensor, nn.Parameter]] = {}  # the first of each pair keeps its id taken
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                if id(value) not in made:
                    empty = torch.empty(value.shape, dtype=value.dtype)  # a fake, under the ledger
                    made[id(value)] = value, nn.Parameter(empty, requires_grad=value.requires_grad)
                module._parameters[name] = made[id(value)][1]
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = torch.zeros(value.shape, dtype=value.dtype)
    return model


def _prepare(model: nn.Module, training: SFTConfig) -> None:
    """What `SFTTrainer.__init__` and `Trainer.train` do to the model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.trained_on_groups = True
    trl.trainer.utils.add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    if training.activation_checkpointing:
        settings = dict(training.activation_checkpointing_kwargs or {})
        every = settings.pop("every_n_layers", 1)
        unknown = sorted(set(settings) - {"use_reentrant"})
        if unknown:
            raise ValueError(
                f"activation_checkpointing_kwargs has {unknown}; the estimate knows every_n_layers, use_reentrant."
            )
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=settings or None, every_n_layers=every
        )
        if base is not model:
            model.enable_input_require_grads()


def _batch(config: BackdropConfig, training: SFTConfig, length: int, images: int, groups: int) -> dict:
    """A batch of full rows; the rows behind the first are one column shorter, as padding changes the attention kernel.

    Returns:
        input_ids, attention_mask, labels `[B, L]`, pixel_values `[G, 3, S, S]`, patch_mask `[G, P]`, group_kind `[G]`.
    """
    rows, patches, side = (
        training.per_device_train_batch_size,
        config.num_patches,
        config.vision_config.image_size,
    )
    image_tokens = images * (patches + groups * config.extra_tokens_per_group)
    if length <= image_tokens:
        raise ValueError(
            f"sequence_length is {length}; wanted more than the {image_tokens} tokens of {images} image(s)."
        )
    owner = torch.arange(patches) * groups // patches
    # Groups of unequal size: they share rows of the tower under a mask, as they do in training.
    owner[: patches // (4 * groups)] = groups - 1
    mask = owner == torch.arange(groups)[:, None]  # [groups, P]
    text = int(config.image_token_id == 0)
    ids = torch.full((rows, length), text)
    ids[:, 1 : 1 + image_tokens] = config.image_token_id
    attention_mask = torch.ones_like(ids)
    attention_mask[1:, -1] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    if training.assistant_only_loss:
        labels = labels.masked_fill(ids == config.image_token_id, -100)
    batch = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
    if images:
        batch["pixel_values"] = torch.zeros(rows * images * groups, 3, side, side)
        batch["patch_mask"] = mask.repeat(rows * images, 1)
        batch["group_kind"] = (torch.arange(groups) > 0).long().repeat(rows * images)
    return batch


# What a GPU runs in place of the CPU's kernels


def _gpu_kernels() -> contextlib.AbstractContextManager:
    """Calls of torch.nn.functional whose CUDA kernels keep other tensors than the CPU's."""
    return mock.patch.multiple(
        functional,
        scaled_dot_product_attention=_gpu_attention,
        dropout=_gpu_dropout,
        # Autocast runs these in float32 on CUDA (torch.amp's documentation), and not on the CPU.
        layer_norm=_in_float32(functional.layer_norm),
        softmax=_in_float32(functional.softmax),
    )


def _in_float32(function: Callable) -> Callable:
    def call(*args, **kwargs):
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        args = [value.float() if _is_half(value) else value for value in args]
        kwargs = {name: value.float() if _is_half(value) else value for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return call


def _is_half(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _gpu_dropout(input, p=0.5, training=True, inplace=False):
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _gpu_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """The kernel that CUDA would choose (`_fused_sdp_choice`, aten/native/transformers/cuda/sdp_utils.cpp): flash for
    half precision without a mask, memory-efficient otherwise; the mask becomes a bias in the queries' dtype, its last
    dimension padded to 16 (`convert_boolean_attn_mask`, `pad_bias` in aten/native/transformers/attention.cpp)."""
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        if attn_mask is not None or not _is_half(query):
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    if attn_mask is None and _is_half(query):
        return _aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    if attn_mask is not None:
        width = attn_mask.shape[-1]
        bias = torch.empty(attn_mask.shape, dtype=query.dtype)
        if width % 16:
            bias = functional.pad(bias, (0, 16 - width % 16))[..., :width]
        attn_mask = bias.expand(*query.shape[:2], query.shape[2], width)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )[0]


class _Launches:
    """Stands for a Triton kernel: launched, it writes into what it is given and allocates nothing."""

    def __getitem__(self, grid) -> Callable:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def _triton_loss() -> Iterator[None]:
    """TRL's loss on the way it takes on a GPU: compacted rows, logits tiles changed in place by Triton kernels, float32
    sums in place by cuBLAS (`_addmm_fp32`)."""
    kernels, yes = trl.kernels.chunked_logprob, lambda device: True
    with (
        mock.patch.object(trl.trainer.utils, "_use_triton", yes),
        mock.patch.multiple(
            kernels,
            _use_triton=yes,
            _forward_kernel=_Launches(),
            _backward_kernel=_Launches(),
            _addmm_fp32=lambda acc, a, b: None,
        ),
        mock.patch.object(kernels, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)), create=True),
    ):
        yield


# Quantised language models (bitsandbytes)


def packed_bytes(numel: int, nested: bool) -> int:
    """Bytes of a matrix in 4 bits: half a byte a weight, one scale for 64 of them.

    Scales are float32, or, nested, 8 bits with a float32 scale for 256 of them and an offset; QLoRA (Dettmers et al.
    2023, section 3), `quantize_4bit` of bitsandbytes/functional.py. Two code books (16 and, nested, 256 float32).
    """
    scales = math.ceil(numel / 64)
    size = math.ceil(numel / 2) + 4 * 16
    return size + (scales + 4 * math.ceil(scales / 256) + 4 + 4 * 256 if nested else 4 * scales)


class _QuantisedLinear(nn.Module):
    """Stands for bitsandbytes' `Linear4bit` or `Linear8bitLt`: the same bytes stored, kept and passed through."""

    def __init__(self, linear: nn.Linear, options: ModelConfig):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.eight_bit = options.load_in_8bit
        numel = linear.weight.numel()
        # LLM.int8(): a byte a weight and a float32 scale a row (`int8_vectorwise_quant`).
        size = (
            numel + 4 * linear.out_features
            if self.eight_bit
            else packed_bytes(numel, options.use_bnb_nested_quant)
        )
        self.register_buffer("packed", torch.empty(size // 2, dtype=torch.bfloat16), persistent=False)
        self.weight = self.packed  # peft asks for its device
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # `Linear4bit` and peft's layer around it copy the result once (`result.clone()` in peft/tuners/lora/bnb.py).
        return _QuantisedMatmul.apply(x, self).clone()


class _QuantisedMatmul(torch.autograd.Function):
    """`MatMul4Bit` and `MatMul8bitLt` of bitsandbytes/autograd/_functions.py.

    4 bits: nothing of the input is kept, the weight is dequantised in the forward (for more than a few rows,
    `gemm_4bit`) and again in the backward. 8 bits: the input is kept on the context itself, where gradient
    checkpointing cannot free it; the product is int32 before it is scaled.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.kept = layer, x if layer.eight_bit else None
        if not layer.eight_bit:
            return functional.linear(x, _dequantised(layer, x.dtype))
        rows = x.numel() // x.shape[-1]
        half = x.to(torch.float16)
        codes = torch.empty(rows, layer.in_features, dtype=torch.int8)
        product = torch.empty(rows, layer.out_features, dtype=torch.float32)  # int32, as many bytes
        del half, codes
        return product.to(x.dtype).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ _dequantised(ctx.layer, gradient.dtype), None


def _dequantised(layer: _QuantisedLinear, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
    if not layer.eight_bit:
        scales = torch.empty(weight.numel() // 64, dtype=torch.float32)
        del scales
    return weight


def _quantise(model: nn.Module, options: ModelConfig) -> None:
    """Linear maps of the language model's layers in 4 or 8 bits, and what trains in bfloat16 as TRL casts it."""
    inside = re.compile(r"language_model\.layers\.\d+\.")
    for name, module in list(model.named_modules()):
        if (
            isinstance(module, nn.Linear)
            and inside.search(name)
            and "lora_" not in name
            and "modules_to_save" not in name
        ):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _QuantisedLinear(module, options))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and "lora_magnitude_vector" not in name:
                module._parameters[name] = nn.Parameter(parameter.detach().to(torch.bfloat16))


# Optimizers

_TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd")
_BNB_OPTIMIZERS = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")


def _check_optimizer(name: str) -> None:
    known = (*_TORCH_OPTIMIZERS, *_BNB_OPTIMIZERS)
    if str(getattr(name, "value", name)) not in known:
        raise ValueError(f"optim is {name!r}; memory is known of {', '.join(known)}.")


def _optimizer(trained: list[nn.Parameter], training: SFTConfig, gpu: bool) -> torch.optim.Optimizer:
    name = str(getattr(training.optim, "value", training.optim))
    if name in _BNB_OPTIMIZERS:
        return _BlockwiseAdamW(trained, bits=8 if "8bit" in name else 32, paged="paged" in name)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
    if name in ("adamw_torch", "sgd") and gpu:
        settings = {**settings, "foreach": True}  # torch's default on CUDA, which it refuses to fakes
    return kind(trained, **settings)


class _BlockwiseAdamW(torch.optim.Optimizer):
    """States of bitsandbytes' AdamW (`Optimizer2State.init_state`, bitsandbytes/optim/optimizer.py): two bytes a weight
    and two float32 for 256 of them; parameters of fewer than 4096 weights and the 32-bit form keep two float32. Paged
    states (of 100,000 weights and more) live in managed memory: the largest is on the device at a time."""

    def __init__(self, parameters, bits: int, paged: bool):
        super().__init__(parameters, {})
        self.bits, self.paged, self.host = bits, paged, 0

    @torch.no_grad()
    def step(self):
        paged = []
        for parameter in self.param_groups[0]["params"]:
            numel = parameter.numel()
            small = self.bits == 32 or numel < 4096
            size = 8 * numel if small else 2 * numel + 8 * math.ceil(numel / 256)
            if self.paged and numel >= 1e5:
                paged.append(size)
                continue
            if parameter not in self.state:
                self.state[parameter]["states"] = torch.empty(size // 4, dtype=torch.float32)
        self.host = sum(paged)
        if paged:
            torch.empty(max(paged) // 4, dtype=torch.float32)


# Several processes


def _share(
    phase: str, parts: dict[str, int], model: nn.Module, processes: int, sharding: str
) -> dict[str, int]:
    """The parts of one process of several.

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


# Against measured runs on the CPU


@dataclass(frozen=True)
class CheckCase:
    """A small recipe that is both estimated and run."""

    name: str
    trains: str
    checkpointing: bool
    bf16: bool = False
    attention: str = "sdpa"
    optim: str = "adamw_torch_fused"
    # A wide MLP puts the peak into the recomputation of a layer, elsewhere it is in the logits' tile.
    wide: bool = False


CHECK_CASES = [
    *(
        CheckCase(
            f"{trains}, {'checkpointing' if checkpointing else 'no checkpointing'}", trains, checkpointing
        )
        for trains in ("full", "LoRA", "projector")
        for checkpointing in (False, True)
    ),
    CheckCase("full, bf16 autocast", "full", False, bf16=True),
    CheckCase("full, bf16 autocast, checkpointing", "full", True, bf16=True),
    CheckCase("LoRA, eager attention", "LoRA", False, attention="eager"),
    CheckCase("full, AdamW without fusion", "full", True, optim="adamw_torch"),
    CheckCase("LoRA, wide MLP, checkpointing", "LoRA", True, wide=True),
]
CHECK_ROWS, CHECK_LENGTH = 4, 400


def check_config(case: CheckCase) -> BackdropConfig:
    """Small, but with activations that outweigh what is fixed: CLIP 4 x 256 at 224 px, Llama 6 x 384."""
    return BackdropConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=224,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=384,
            intermediate_size=24576 if case.wide else 1024,
            num_hidden_layers=2 if case.wide else 6,
            num_attention_heads=6,
            num_key_value_heads=3,
            vocab_size=8000,
        ),
        image_token_id=7990,
        separator_token_ids=[7991, 7992, 7993, 7994],
    )


def _check_settings(case: CheckCase, folder: str) -> tuple[SFTConfig, ModelConfig, list[str]]:
    training = SFTConfig(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=CHECK_ROWS,
        activation_checkpointing=case.checkpointing,
        bf16=case.bf16,
        optim=case.optim,
        max_steps=2,
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    options = ModelConfig(
        dtype="float32", attn_implementation=case.attention, use_peft=case.trains == "LoRA", lora_r=16
    )
    patterns = (
        ["language_model", "lm_head", "multi_modal_projector"] if case.trains == "full" else ["projector"]
    )
    return training, options, patterns


def measure(case: CheckCase) -> dict[str, int]:
    """Peak bytes of two real steps of `SFTTrainer` on the CPU.

    Returns:
        allocated: highest sum of what PyTorch's allocator handed out (torch.profiler's memory events).
        resident: growth of the process's peak resident memory (VmHWM), a second witness with malloc's noise.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.profiler import ProfilerActivity, profile
    from transformers import PreTrainedTokenizerFast
    from trl import SFTTrainer

    from backdrop.processing.image_processing_backdrop import BackdropImageProcessor
    from backdrop.processing.processing_backdrop import BackdropProcessor

    from .sft import lora_config

    config = check_config(case)
    config._attn_implementation = case.attention
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    BackdropProcessor.add_tokens(tokenizer)
    processor = BackdropProcessor(
        BackdropImageProcessor(patch_size=14), tokenizer, chat_template="{{ messages }}"
    )
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": ""}], "images": []}] * 8)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at VmRSS (proc(5))
    before = _status_bytes("VmRSS")
    with (
        tempfile.TemporaryDirectory() as folder,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        training, options, patterns = _check_settings(case, folder)
        model = BackdropForConditionalGeneration(config)
        if not options.use_peft:
            select_trainable(model, patterns)
        trainer = SFTTrainer(
            model=model,
            args=training,
            train_dataset=rows,
            processing_class=processor,
            data_collator=lambda _: _batch(config, training, CHECK_LENGTH, 1, 2),
            peft_config=lora_config(model, options, ["multi_modal_projector"]) if options.use_peft else None,
        )
        trainer.train()
        resident = _status_bytes("VmHWM") - before
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return {"allocated": peak, "resident": resident}


def _print_measured(case: CheckCase) -> None:
    print(json.dumps(measure(case)), flush=True)


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1))


def check(cases: Iterable[CheckCase] = tuple(CHECK_CASES)) -> list[dict]:
    """Each case estimated here and measured in another process, which takes no part in the estimates."""
    cases = list(cases)
    command = [sys.executable, "-m", "backdrop.train.memory", "--measure", *(case.name for case in cases)]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        results = (json.loads(line) for line in run.stdout if line.startswith('{"allocated"'))
        for case, measured in zip(cases, results, strict=False):
            rows.append(_check_row(case, measured))
            print(*_check_cells(rows[-1]), sep="  ", file=sys.stderr, flush=True)
    if run.returncode or len(rows) < len(cases):
        raise RuntimeError(
            f"Of {len(cases)} measured runs {len(rows)} came to an end; see the messages above."
        )
    return rows


def _check_row(case: CheckCase, measured: dict[str, int]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        training, options, patterns = _check_settings(case, folder)
        model = meta_model(check_config(case), options, patterns, ["multi_modal_projector"])
        estimated = estimate(model, training, options, sequence_length=CHECK_LENGTH, device="cpu").allocated
    error = estimated / measured["allocated"] - 1
    return {"case": case.name, "estimated": estimated, **measured, "error": error}


# LLaVA-1.5-7B


def llava_config() -> BackdropConfig:
    """LLaVA-1.5-7B's shapes: CLIP ViT-L/14 at 336 px and Llama-2-7B with 32,064 rows."""
    return BackdropConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(vocab_size=32064),
        image_token_id=32000,
        separator_token_ids=[32002, 32003, 32004, 32005],
    )


LORA = ModelConfig(dtype="bfloat16", use_peft=True, lora_r=128, lora_alpha=256, lora_dropout=0.05)
QLORA = ModelConfig(
    dtype="bfloat16",
    use_peft=True,
    lora_r=128,
    lora_alpha=256,
    lora_dropout=0.05,
    load_in_4bit=True,
    use_bnb_nested_quant=True,
)
FULL = ModelConfig(dtype="bfloat16")
IMAGE_TOKENS, TEXT_TOKENS = 576, (200, 1472)
LLAVA_CASES = [
    *(
        {"method": method, "rows": rows, "length": IMAGE_TOKENS + text, "processes": 1, "sharding": "ddp"}
        for method in ("LoRA r=128, bf16", "QLoRA r=128, NF4")
        for text in TEXT_TOKENS
        for rows in (1, 4, 8, 16)
    ),
    *(
        {"method": "full, bf16", "rows": rows, "length": 2048, "processes": n, "sharding": sharding}
        for rows, n, sharding in ((1, 4, "zero2"), (1, 8, "zero2"), (16, 8, "zero3"))
    ),
]
DEVICES = (24, 40, 80)


def llava(cases: Iterable[dict] = tuple(LLAVA_CASES)) -> list[dict]:
    """Estimates of LLaVA-1.5-7B finetuning with gradient checkpointing: GiB by part, and what they fit."""
    models: dict[str, tuple[nn.Module, ModelConfig]] = {}
    rows = []
    for case in cases:
        if case["method"] not in models:
            options = {"Q": QLORA, "L": LORA, "f": FULL}[case["method"][0]]
            trains = ["language_model", "lm_head", "multi_modal_projector"]
            models = {
                case["method"]: (
                    meta_model(llava_config(), options, trains, ["multi_modal_projector"]),
                    options,
                )
            }
        model, options = models[case["method"]]
        with tempfile.TemporaryDirectory() as folder:
            training = SFTConfig(
                output_dir=folder,
                use_cpu=True,  # lets bf16 be asked for where there is no GPU; the estimate is for one
                bf16=True,
                per_device_train_batch_size=case["rows"],
                max_length=None,
                report_to="none",
            )
            found = estimate(
                model,
                training,
                options,
                sequence_length=case["length"],
                processes=case["processes"],
                sharding=case["sharding"],
            )
        sizes = {row["part"]: round(row["gib"], 2) for row in found.table()}
        fits = {f"{gib} GB": found.fits(gib) for gib in DEVICES}
        rows.append({**case, **sizes, "phase": found.phase, "fits": fits})
        print(*_llava_cells(rows[-1]), sep="  ", file=sys.stderr, flush=True)
    return rows


# Command


def _check_cells(row: dict) -> list[str]:
    sizes = [f"{row[name] / 2**20:.1f}" for name in ("estimated", "allocated")]
    return [row["case"], *sizes, f"{row['error']:+.1%}", f"{row['resident'] / 2**20:.0f}"]


def _llava_cells(row: dict) -> list[str]:
    sharing = f" ({row['processes']} x {row['sharding']})" if row["processes"] > 1 else ""
    sizes = [f"{row[part]:.1f}" for part in (*PARTS, "overhead", "total")]
    fits = ["yes" if ok else "no" for ok in row["fits"].values()]
    return [row["method"] + sharing, str(row["rows"]), str(row["length"]), *sizes, *fits]


_LLAVA_COLUMNS = ["method", "rows", "columns", *PARTS, "overhead", "total GiB", *(f"{g} GB" for g in DEVICES)]
_CHECK_COLUMNS = ["case", "estimated MiB", "measured MiB", "error", "resident MiB"]


def _print_table(title: str, columns: list[str], rows: Iterable[list[str]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _markdown_table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_docs(folder: Path, checked: list[dict], cases: list[dict]) -> None:
    """memory.md and memory.json."""
    (folder / "memory.json").write_text(
        json.dumps({"check": checked, "llava-1.5-7b": cases}, indent=1) + "\n"
    )
    worst = max(checked, key=lambda row: abs(row["error"]))
    text = _DOCS.format(
        llava=_markdown_table(_LLAVA_COLUMNS, map(_llava_cells, cases)),
        check=_markdown_table(_CHECK_COLUMNS, map(_check_cells, checked)),
        worst=f"{worst['error']:+.1%} ({worst['case']})",
        context=f"{CUDA_CONTEXT / 2**20:.0f} MiB",
        fragmentation=f"{FRAGMENTATION:.0%}",
        rows=CHECK_ROWS,
        length=CHECK_LENGTH,
    )
    (folder / "memory.md").write_text(text)


_DOCS = """\
# Memory of a training run, before it starts

Written by `python -m backdrop.train.memory --docs docs`; numbers in `memory.json`.

`backdrop.train.memory.estimate` runs one whole training step on tensors without data and counts the storages alive:
batch, towers, projector, prefusion, language model, TRL's chunked loss, backward with recomputation, clipping, optimizer.
Nothing is guessed by formula except what the last section lists.

## LLaVA-1.5-7B

CLIP-L/14 at 336 px and Llama-2-7B; images split into two groups; 576 image tokens and 200 or 1,472 text tokens (2,048 in
all, LLaVA's maximum); every token supervised; gradient checkpointing; fused AdamW; the projector and the separators' rows
train beside LoRA (r = 128 on all linear maps of the language model's layers, LLaVA's recipe). GiB at the moment of the
peak; a part that does not exist at that moment is 0.

{llava}

What to read from it:
- Rows of one batch that differ in length need a mask, and with a mask PyTorch takes memory-efficient attention, which keeps
  a bias per layer; a single row needs none and runs on flash attention.
- peft keeps LoRA's weights in float32 over a bfloat16 model and copies the input of every adapted map to float32
  (`_cast_input_dtype`); over a quantised model TRL casts them to bfloat16. At 16 rows the recomputation of one layer costs
  more than the whole quantised model.
- bitsandbytes' LLM.int8() keeps the input of every linear map on the function's context, where checkpointing cannot free it
  (seen with bitsandbytes 0.50.2 on the CPU, too): for training prefer 4 bits.
- TRL's loss never holds the logits of all tokens, only a tile of 4,096 x 32,768 at most.

### Published figures

- LLaVA's author (haotian-liu/LLaVA issue 842): LoRA training of the 7B model fits 8 RTX 3090 of 24 GB, with fewer rows a
  device than the script's 16. That is with the weights divided (ZeRO-3); the table says that one row fits without.
- LLaVA's README (quoted in issue 528): full finetuning of the 7B model with `finetune.sh`, ZeRO-3 and 16 rows a device, on 8
  A100 of 40 GB: the last row of the table.
- LLaVA issues 569 and 655: full finetuning with ZeRO-2 and one row runs out of memory on 4 A100 of 40 GB, as in the table;
  with 8 the author says that it "should work fine", as the table does, and one user of two nodes reports that it did not
  (DeepSpeed's communication buffers are not in the estimate).
- LLaVA issue 697: QLoRA of the 13B model with 16 rows and offloading runs out of memory on one A100; a commenter advises 8
  rows for 40 GB. The 7B model at 8 rows must be, and is, below that.
- InternLM/xtuner issue 526 gives 48 GB as the minimum for LLaVA-7B in its recipes, which do not set the same batch.

## Checked against measured runs

Two real steps of `SFTTrainer` on the CPU, {rows} rows of {length} tokens with an image each; measured is the highest sum
that PyTorch's allocator handed out (memory events of torch.profiler). Largest error: {worst}.
"Resident" is the growth of the process's peak resident memory, which has malloc's rounding, thread buffers and oneDNN's
scratch memory in it: a second witness, not the same quantity.

{check}

The same code with CUDA's kernels put in makes the table above; it has not been compared with a run on a GPU.

## What is assumed

- CUDA context and libraries take {context}; the caching allocator cannot hand out {fragmentation} of what it holds. Both are
  usual values, not measured here. `overhead` is their sum.
- Attention on a GPU: flash in half precision without a mask, memory-efficient otherwise (PyTorch's own choice); its backward
  takes a float32 copy of the queries as workspace. "flash_attention_2" and other kernels from outside PyTorch are not run:
  estimate with "sdpa" and one row, which keeps the same tensors.
- bitsandbytes' layers and optimizers are stood in for by rule (block sizes 64 and 256; 256 for the states of optimizers);
  stored bytes equal those of bitsandbytes 0.50.2. Outlier columns of LLM.int8() are not counted, they depend on the data.
  Paged states are on the host, but for the largest. Adapters over a quantised model train in bfloat16 (TRL).
- The optimizer's states are those of the second step on. Trained weights have the dtype they were loaded in; only ZeRO adds
  float32 masters.
- Several processes: DDP adds buckets as large as the gradients; ZeRO and FSDP divide optimizer states, gradients and weights
  evenly, and hold two whole layers with divided weights. Their communication buffers are not counted.
- Rows are as long as said, each with its images; every row behind the first has one column of padding. With
  `assistant_only_loss` image tokens take no part in the loss, all others do.
- Not counted: evaluation during training, callbacks that copy weights, `torch.compile`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Peak memory of training runs; without options, of LLaVA-1.5-7B's."
    )
    parser.add_argument("--check", action="store_true", help="estimates against measured runs on the CPU")
    parser.add_argument("--docs", type=Path, help="folder to write memory.md and memory.json to (runs both)")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        for case in CHECK_CASES:
            if case.name in arguments.measure:
                # A child for each: what malloc keeps of one run is not there for the next to reuse unseen.
                child = multiprocessing.get_context("fork").Process(target=_print_measured, args=(case,))
                child.start()
                child.join()
        return
    checked = check() if arguments.check or arguments.docs else []
    if checked:
        _print_table("Estimated against measured", _CHECK_COLUMNS, map(_check_cells, checked))
    if arguments.docs or not arguments.check:
        cases = llava()
        _print_table("LLaVA-1.5-7B, GiB at the peak", _LLAVA_COLUMNS, map(_llava_cells, cases))
        if arguments.docs:
            write_docs(arguments.docs, checked, cases)


if __name__ == "__main__":
    main()
