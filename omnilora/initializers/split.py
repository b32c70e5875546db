"""W ≈ Q + s B A with Q in few bits: one routine for LoftQ, LQ-LoRA and LQER.

    LoftQ    arXiv:2310.08659   Q₁ = q(W), then (B, A) = SVD_r(W − Q_t), Q_{t+1} = q(W − B A)       order "quantize"
    LQ-LoRA  arXiv:2311.12023   Q₀ = 0, then (B, A) = SVD_r(W − Q_{t−1}), Q_t = q(W − B A)          order "factor"
    LQER     arXiv:2402.02446   order "quantize", once, columns weighted by the size of the inputs

With weights the error is ‖diag(row) (W − Q − B A) diag(col)‖, and SVD_r is that of the weighted matrix, unweighted
afterwards. B and A come back divided by √s, so that s B A is the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omnilora.errors import BadValue
from omnilora.stores.codecs import Codec

OVERSAMPLED = 10


@dataclass(frozen=True, eq=False)
class Split:
    """``held``: tensors of the codec (empty without one), ``Q`` what they decode to; ``errors``: by iteration."""

    held: dict[str, Tensor]
    Q: Tensor
    B: Tensor
    A: Tensor
    errors: tuple[float, ...]


def top(M: Tensor, r: int, row: Tensor | None = None, col: Tensor | None = None, *, random: bool = False,
        balance: bool = True, pick: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B (out, r), A (r, in)): B A is the best rank-r approximation of M under diagonal weights row (out,), col (in,).

    Args:
        random: a randomized SVD with 10 directions more than r.
        balance: √Σ on both sides; else Σ on B.
        pick: numbers of the singular triplets to take in place of the first r.
    """
    weighted = M if row is None else row[:, None] * M
    weighted = weighted if col is None else weighted * col
    if random and pick is None and r + OVERSAMPLED < min(M.shape):
        u, sigma, v = torch.svd_lowrank(weighted, r + OVERSAMPLED, niter=4)
        vh = v.mT
    else:
        u, sigma, vh = torch.linalg.svd(weighted, full_matrices=False)
    at = torch.arange(min(r, len(sigma)), device=M.device) if pick is None else pick
    u, sigma, vh = u[:, at], sigma[at], vh[at]
    left, right = (sigma.sqrt(), sigma.sqrt()) if balance else (sigma, torch.ones_like(sigma))
    B, A = u * left, right[:, None] * vh
    if (short := r - B.shape[1]) > 0 and pick is None:
        B, A = torch.nn.functional.pad(B, (0, short)), torch.nn.functional.pad(A, (0, 0, 0, short))
    return B if row is None else B / row[:, None], A if col is None else A / col


def split(W: Tensor, codec: Codec | None, r: int, iterations: int = 5, *, order: Literal["quantize", "factor"] = "quantize",
          row: Tensor | None = None, col: Tensor | None = None, s: float = 1.0, best: bool = False, patience: bool = False,
          random: bool = False, balance: bool = True) -> Split:  # fmt: skip
    """Split W (out, in) into Q in the codec's bits and a rank-r product.

    Args:
        codec: None: the identity, Q = its argument.
        iterations: 0: Q = q(W), B A = 0.
        row, col: positive weights (out,), (in,).
        s: the scale that the adapter will multiply B A with.
        best: return the iterate with the smallest error, else the last.
        patience: stop when an error exceeds the one before.
        random, balance: of the SVD, see :func:`top`.

    Raises: :class:`BadValue` on a matrix that is not finite, weights that are not positive, s ≤ 0.
    """
    if order not in ("quantize", "factor") or iterations < 0 or not s > 0 or not math.isfinite(s):
        raise BadValue(f"order = {order!r}, iterations = {iterations!r}, s = {s!r}.",
                       "order 'quantize' or 'factor', iterations ≥ 0, a finite s > 0.")  # fmt: skip
    for name, weight in (("row", row), ("col", col)):
        if weight is not None and not (weight.isfinite().all() and (weight > 0).all()):
            raise BadValue(f"The {name} weights are not all positive.", "Clamp them above zero.")
    W = W.detach() if W.dtype == torch.float64 else W.detach().float()
    row, col = (None if t is None else t.to(W.dtype) for t in (row, col))

    def rounded(M: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        if codec is None:
            return {}, M
        held = codec.encode(M)
        return held, codec.decode(held, tuple(M.shape), M.dtype)

    def error(E: Tensor) -> float:
        E = E if row is None else row[:, None] * E
        return float((E if col is None else E * col).norm())

    B, A = W.new_zeros(W.shape[0], r), W.new_zeros(r, W.shape[1])
    held, Q = rounded(W)
    if iterations == 0:
        return Split(held, Q, B, A, (error(W - Q),))
    Q = torch.zeros_like(W) if order == "factor" else Q
    errors: list[float] = []
    kept: tuple[dict[str, Tensor], Tensor, Tensor, Tensor] | None = None
    for t in range(iterations):
        if order == "quantize" and t > 0:
            held, Q = rounded(W - B @ A)
        B, A = top(W - Q, r, row, col, random=random, balance=balance)
        if order == "factor":
            held, Q = rounded(W - B @ A)
        errors.append(error(W - Q - B @ A))
        if kept is None or not best or errors[-1] <= min(errors):
            kept = held, Q, B, A
        if patience and len(errors) > 1 and errors[-1] > errors[-2]:
            break
    assert kept is not None
    held, Q, B, A = kept
    return Split(held, Q, B / math.sqrt(s), A / math.sqrt(s), tuple(errors))
