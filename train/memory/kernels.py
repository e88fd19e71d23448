"""Stand-ins for CUDA kernels, which keep other tensors for the backward than the CPU's kernels do.

They put in what CUDA would run: flash or memory-efficient attention, dropout's boolean mask, autocast's list of float32
operations, TRL's Triton loss. TRL's loss is TRL's own code: 1.16 or newer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import trl.kernels.chunked_logprob
import trl.trainer.utils
from torch.nn import functional

aten = torch.ops.aten


def workspace_bytes(func: object, args: Sequence) -> int:
    """Bytes that a kernel allocates for itself, which the dispatcher does not see.

    The backward of flash and of memory-efficient attention sums the queries' gradient in float32, beside one float32
    per query and head (`dq_accum`, `softmax_d` in aten/native/transformers/cuda/flash_attn/flash_api.cpp; `gq_workspace`
    and `delta` in mem_eff_attention/kernel_backward.h).
    """
    if func in (
        aten._scaled_dot_product_flash_attention_backward.default,
        aten._scaled_dot_product_efficient_attention_backward.default,
    ):
        query = args[1]
        return 4 * query.numel() + 4 * query.numel() // query.shape[-1]
    return 0


def gpu_kernels() -> contextlib.AbstractContextManager:
    """Replaces the functions of torch.nn.functional whose CUDA kernels keep other tensors than the CPU's."""
    return mock.patch.multiple(
        functional,
        scaled_dot_product_attention=_gpu_attention,
        dropout=_gpu_dropout,
        # Autocast runs these in float32 on CUDA (torch.amp's documentation), and not on the CPU.
        layer_norm=_in_float32(functional.layer_norm),
        softmax=_in_float32(functional.softmax),
    )


def _in_float32(function: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        values = [value.float() if is_half(value) else value for value in args]
        named = {name: value.float() if is_half(value) else value for name, value in kwargs.items()}
        return function(*values, **named)

    return call


def is_half(value: object) -> bool:
    """Whether the value is a tensor in half precision."""
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)


def _gpu_dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _gpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that CUDA would choose (`_fused_sdp_choice`, aten/native/transformers/cuda/sdp_utils.cpp): flash for
    half precision without a mask, memory-efficient otherwise; the mask becomes a bias in the queries' dtype, its last
    dimension padded to 16 (`convert_boolean_attn_mask`, `pad_bias` in aten/native/transformers/attention.cpp)."""
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        if attn_mask is not None or not is_half(query):
            key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    if attn_mask is None and is_half(query):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[
            0
        ]
    if attn_mask is not None:
        width = attn_mask.shape[-1]
        bias = torch.empty(attn_mask.shape, dtype=query.dtype)
        if width % 16:
            bias = functional.pad(bias, (0, 16 - width % 16))[..., :width]
        attn_mask = bias.expand(*query.shape[:2], query.shape[2], width)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )[0]


class _Launches:
    """Stands in for a Triton kernel, which writes into its arguments and allocates nothing."""

    def __getitem__(self, grid: object) -> Callable:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def triton_loss() -> Iterator[None]:
    """Makes TRL's loss take its GPU branch: it drops ignored positions, Triton kernels change tiles of logits in place,
    and cuBLAS adds float32 sums in place (`_addmm_fp32`)."""
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
