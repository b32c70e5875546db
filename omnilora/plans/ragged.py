"""The native low-rank update of few tokens: y += s B (A x), every run of tokens with its own A, B, s and rank (``ragged.cpp``)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from omnilora.plans import native, rules


@lru_cache(maxsize=8)
def function(dtype: torch.dtype) -> Callable[[int, int, int], None] | None:
    """The native call for data of ``dtype``: addresses of x, y and of a :class:`Job`."""
    library = native.library(native.RAGGED) if dtype in native.DTYPES else None
    if library is None:
        return None
    found = getattr(library, f"ragged_{native.DTYPES[dtype]}")
    found.argtypes = [ctypes.c_void_p] * 3
    found.restype = None
    return found  # type: ignore[no-any-return]


@lru_cache(maxsize=8)
def few(dtype: torch.dtype) -> int:
    """Up to how many tokens of one adapter the native call is worth it."""
    return 0 if function(dtype) is None else rules.native_tokens(dtype)


class Job:
    """What one native call reads, in memory of its own (``Job`` in ragged.cpp).

    Args:
        shape: (in, out).
        positions, per: rows, and tokens of each.
        order: (positions,), the row at each position; None: as they come.
        spans: first and last position of each run.
        terms: of each run A (r, in), B (out, r), both contiguous, and s; None: nothing to add.
    """

    def __init__(self, shape: tuple[int, int], positions: int, per: int, order: Tensor | None, spans: Sequence[tuple[int, int]],
                 terms: Sequence[tuple[Tensor, Tensor, float] | None]) -> None:  # fmt: skip
        rows = [(0, 0, 0) if t is None else (t[0].data_ptr(), t[1].data_ptr(), t[0].shape[0]) for t in terms]
        table = [n for span in spans for n in span] + [n for row in rows for n in row]
        self.numbers = torch.tensor(table or [0], dtype=torch.int64, device="cpu")
        self.factors = torch.tensor([0.0 if t is None else t[2] for t in terms], dtype=torch.float32, device="cpu")
        self.order, self.terms = order, terms  # kept alive
        at = self.numbers.data_ptr()
        where = [0 if order is None else order.data_ptr(), len(spans), at, at + 16 * len(spans), self.factors.data_ptr()]
        self.head = torch.tensor([*shape, positions, per, *where], dtype=torch.int64, device="cpu")
        self.address = self.head.data_ptr()
