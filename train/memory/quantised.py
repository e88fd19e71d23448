"""Stand-ins for bitsandbytes' quantised linear layers: the same bytes stored, kept for the backward and passed through."""

import math
import re
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from trl import ModelConfig


def packed_bytes(numel: int, nested: bool) -> int:
    """Bytes of a matrix in 4 bits: half a byte a weight, one scale for 64 of them.

    Scales are float32, or, nested, 8 bits with a float32 scale for 256 of them and an offset; QLoRA (Dettmers et al.
    2023, section 3), `quantize_4bit` of bitsandbytes/functional.py. Two code books (16 and, nested, 256 float32).
    """
    scales = math.ceil(numel / 64)
    size = math.ceil(numel / 2) + 4 * 16
    return size + (scales + 4 * math.ceil(scales / 256) + 4 + 4 * 256 if nested else 4 * scales)


class _QuantisedLinear(nn.Module):
    """Stands in for bitsandbytes' `Linear4bit` or `Linear8bitLt`: the same bytes stored, kept and passed through."""

    def __init__(self, linear: nn.Linear, options: ModelConfig) -> None:
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
        self.weight = self.packed  # peft reads its device
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
    def forward(ctx: Any, x: torch.Tensor, layer: _QuantisedLinear) -> torch.Tensor:
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
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ _dequantised(ctx.layer, gradient.dtype), None


def _dequantised(layer: _QuantisedLinear, dtype: torch.dtype) -> torch.Tensor:
    weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
    if not layer.eight_bit:
        scales = torch.empty(weight.numel() // 64, dtype=torch.float32)
        del scales
    return weight


def quantise(model: nn.Module, options: ModelConfig) -> None:
    """Puts the linear layers of the language model in 4 or 8 bits and, as TRL does, what trains in bfloat16."""
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
