"""Elementwise products.

LoHa (FedPara) — Hyeon-Woo et al., ICLR 2022, arXiv:2108.06098; LyCORIS.     ΔW = (α/r) (B₁ A₁) ⊙ (B₂ A₂)
HiRA — Huang et al., ICLR 2025.                                              ΔW = W ⊙ (B A)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.full import Dense
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import (
    Factored,
    Parameterization,
    Slot,
    Tensors,
    input_side,
    kaiming,
    normal,
    output_side,
    positive_rank,
    zeros,
)
from omnilora.core.site import Site


def pairs(u: Tensor, v: Tensor) -> Tensor:
    """(…, n, r), (…, n, r) → (…, n, r²): the products of every column of u with every column of v."""
    return (u.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)


@dataclass(frozen=True)
class LoHa(Factored):
    """(B₁A₁) ⊙ (B₂A₂) is a product of rank r²: the (out, in) matrix is never formed."""

    def rank(self) -> int:
        return self.r**2

    def init(self, site: Site, seen: Any = None) -> Tensors:
        n_in, n_out = (*site.batch, self.r, site.fan_in), (*site.batch, site.fan_out, self.r)
        return Tensors(
            A1=input_side(normal(1.0, *n_in)),
            B1=output_side(normal(0.1, *n_out)),
            A2=input_side(normal(1.0, *n_in)),
            B2=output_side(zeros(*n_out)),
        )

    def delta(self, p: Slot, ctx: Context) -> Op:
        B, A = pairs(p.B1, p.B2), pairs(p.A1.mT, p.A2.mT).mT  # (out, r²), (r², in)
        return p.scale * chain(B, A, Dropout(self.dropout, p.training))


@dataclass(frozen=True)
class HiRA(Parameterization):
    """The change has the zeros of W and up to r times its rank; W is read, and ΔW formed, at every forward."""

    r: int = 32
    reads_weight = True

    def check(self) -> None:
        positive_rank(self.r)

    def init(self, site: Site, seen: Any = None) -> Tensors:
        n_in, n_out = (*site.batch, self.r, site.fan_in), (*site.batch, site.fan_out, self.r)
        return Tensors(A=input_side(kaiming(*n_in)), B=output_side(zeros(*n_out)))

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        return W + Dense(W.dense().detach() * (p.B @ p.A))
