"""Which of two ways to compute the same is the cheaper one.

Rules, no measurements while running: runs must repeat each other. The numbers were measured on one processor (AVX-512 with products of
bf16, no tiles, two cores). Where they do not fit another one, something is slower there and nothing is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnilora.plans import native

NATIVE_TOKENS = {torch.float32: 32, torch.bfloat16: 64}  # of one adapter, up to which a native call costs no more than two products
BLOCK_TOKENS = 16  # below which a block without gradients is cheaper layer by layer
WRITTEN = 8  # what writing one number of W + s B A costs, in multiplications of a narrow convolution (between 4 and 18)
THIN = 16  # ranks below which the library is slow at products of fp32 with B (out, r) as it lies


def native_tokens(dtype: torch.dtype) -> int:
    """Up to how many tokens of one adapter the native call is worth it where there is one."""
    if dtype is torch.bfloat16 and not native.computes_bf16():
        return 1 << 30  # products are emulated, and cost ten times as much at any size
    return NATIVE_TOKENS[dtype]


def thin(b: Tensor) -> bool:
    """Whether the library is slow at products with b (out, r) as it lies."""
    return b.dtype == torch.float32 and b.shape[1] < THIN


def sums_kernels(positions: int, A: Tensor, weight: Tensor) -> bool:
    """Whether W + s B A once costs less than the narrow convolutions at all positions."""
    return positions * (A.shape[1] + len(weight)) > WRITTEN * weight.numel()


def stacks(tokens: int, rank: int, fan_in: int, dtype: torch.dtype) -> bool:
    """Whether all rows with all adapters (of ranks that sum up to ``rank``) under a mask cost less than products group by group of up
    to ``tokens``: everywhere those of single tokens do, and where tiles are multiplied in hardware many small products in bf16."""
    if tokens <= 4:
        return rank <= 2 * fan_in
    return dtype == torch.bfloat16 and native.multiplies_tiles() and 2 * rank <= fan_in
