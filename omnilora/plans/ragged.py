"""The native low-rank update of few tokens: y += s B (A x), every run of tokens with its own A, B, s and rank (``ragged.cpp``)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from omnilora.plans import native

FEW = {torch.float32: 32, torch.bfloat16: 64}  # tokens of one adapter up to which the native call costs no more than two products


@lru_cache(maxsize=8)
def function(dtype: torch.dtype) -> Callable[[int, int, int], None] | None:
    """The native call for data of ``dtype``: addresses of x, y and of a :func:`job`."""
    library = native.library(native.RAGGED) if dtype in native.DTYPES else None
    if library is None:
        return None
    found = getattr(library, f"ragged_{native.DTYPES[dtype]}")
    found.argtypes = [ctypes.c_void_p] * 3
    found.restype = None
    return found  # type: ignore[no-any-return]


@lru_cache(maxsize=8)
def few(dtype: torch.dtype) -> int:
    """Up to how many tokens of one adapter the native call is worth it. A rule, no measurement: runs must repeat each other."""
    if function(dtype) is None:
        return 0
    if dtype is torch.bfloat16 and not native.computes_bf16():
        return 1 << 30  # products are emulated, and cost ten times as much at any size
    return FEW[dtype]


def job(fan_in: int, fan_out: int, positions: int, per: int, order: Tensor | None, spans: Tensor, terms: Tensor, factors: Tensor) -> Tensor:
    """What the native call reads (``Job`` in ragged.cpp); the caller keeps the tensors alive.

    ``positions`` rows of ``per`` tokens; ``order`` (positions,): the row at each; ``spans`` (k, 2): first and last position of each
    run; ``terms`` (k, 3): addresses of A (r, in) and B (out, r), and r; ``factors`` (k,): each s. Integers are of 64 bits.
    """
    at = 0 if order is None else order.data_ptr()
    return torch.tensor([fan_in, fan_out, positions, per, at, len(spans), spans.data_ptr(), terms.data_ptr(), factors.data_ptr()])
