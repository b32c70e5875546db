"""The weights of bitsandbytes' linear layers, read without changing the layer.

On a CPU with AVX512-BF16 an evaluation forward of a Linear4bit reorders its codes in place, rounds the block scales to
bf16 for good, and from then on passes no gradient to its input (a warning only). :func:`keep_layout` prevents that.
Read in bitsandbytes 0.50, nn/modules.py and csrc/cpu_ops.cpp; nothing here imports it before a layer of its is given.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.errors import AttachError, BadValue, need
from omnilora.stores.nf4 import codebook

_KINDS = {"Linear4bit": 4, "Linear8bitLt": 8}
_TILE = 32  # rows that the reordered layout interleaves


def bits_of(layer: nn.Module) -> int | None:
    """4 or 8 for bitsandbytes' linear layers and subclasses of them, by class name; None for any other layer."""
    names = (c.__name__ for c in type(layer).__mro__ if c.__module__.partition(".")[0] == "bitsandbytes")
    return next((_KINDS[name] for name in names if name in _KINDS), None)


def dequantized(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """W (out, in), the values that the layer's forward multiplies its input with, as it stands now.

    4 bits: the product of code and scale rounded to ``dtype``, by default the layer's compute dtype (until the first
    forward fixes that: the dtype of the quantized weight); a reordered weight: fp32, the exact product of bf16 code and
    bf16 scale. 8 bits: CB · SCB/127, fp32; in evaluation the layer rounds its input to int8 too, no weight shows that.

    Values are those of bitsandbytes' own kernel, right or wrong: with AVX-512 it takes another block's scale where the
    input width is a multiple of 16 but not of the block size.

    Raises: :class:`BadValue` for another kind of layer, or one not quantized yet.
    """
    bits = bits_of(layer)
    if bits is None:
        raise BadValue(f"{type(layer).__name__} is no linear layer of bitsandbytes.", "Read its weight directly.")
    with torch.no_grad():
        return _four(layer, dtype) if bits == 4 else _eight(layer, dtype)


def reordered(layer: nn.Module) -> bool:
    """Whether a Linear4bit holds the layout of the CPU's evaluation kernel."""
    return bool(getattr(_quant_state(layer), "packing_format_for_cpu", False))


def keep_layout(layer: nn.Module) -> None:
    """Keep a Linear4bit's codes and scales as they were stored, whatever forward runs: exact, and gradients pass.

    Raises: :class:`AttachError` where an evaluation forward has already rounded the scales.
    """
    if reordered(layer):
        raise AttachError(
            "An evaluation forward reordered this 4-bit weight: scales are rounded to bf16, gradients are cut.",
            "Load the model again and adapt it before its first forward.",
        )
    if "support_avx512bf16_for_cpu" in vars(layer):
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _quant_state(layer: Any) -> Any:
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def _four(layer: Any, dtype: torch.dtype | None) -> Tensor:
    state = _quant_state(layer)
    if state is None:
        raise BadValue("This Linear4bit is not quantized yet.", "Move it to its device first.")
    if reordered(layer):
        weight = _tiled(layer.weight.data, state)
        return weight if dtype is None else weight.to(dtype)
    functional = need("bitsandbytes", "quant").functional
    state = copy.copy(state)
    state.dtype = dtype or layer.compute_dtype or state.dtype
    value: Tensor = functional.dequantize_4bit(layer.weight.data, state)
    return value.reshape(state.shape)


def _tiled(packed: Tensor, state: Any) -> Tensor:
    """W (N, K) fp32 of the reordered layout.

    Byte [N/32, K/2, 16, 2]: low nibble row r, high nibble row 16 + r of the tile, last index the parity of the column.
    Scales (K/blocksize, N) bf16; the kernel's table is the codebook rounded to bf16.
    """
    rows, columns = state.shape
    byte = packed.view(torch.uint8).view(rows // _TILE, columns // 2, _TILE // 2, 2)
    code = torch.stack([byte & 15, byte >> 4], 1).permute(0, 1, 3, 2, 4).reshape(rows, columns)
    table = codebook(state.quant_type).to(packed.device).bfloat16().float()
    return table[code.int()] * state.absmax.float().t().repeat_interleave(state.blocksize, 1)


def _eight(layer: Any, dtype: torch.dtype | None) -> Tensor:
    weight, state = layer.weight, layer.state
    codes = state.CB if weight.CB is None else weight.CB
    scale = state.SCB if weight.SCB is None else weight.SCB
    if state.has_fp16_weights and layer.training and weight.grad is None:
        codes = None  # such a forward quantizes the float weight again
    if codes is None or scale is None:
        if not weight.is_floating_point():
            raise BadValue("This Linear8bitLt has int8 codes without scales.", "Load its SCB entry too.")
        codes, scale, _ = need("bitsandbytes", "quant").functional.int8_vectorwise_quant(weight.data.half())
    return (codes.float() * (scale.float().unsqueeze(1) * (1.0 / 127.0))).to(dtype or torch.float32)
