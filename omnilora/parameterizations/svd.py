"""The SVD-like form of AdaLoRA — Zhang et al., ICLR 2023, arXiv:2303.10512.   W' = W + s P Λ Q"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import (
    Parameterization,
    Slot,
    Tensors,
    core,
    finite,
    input_side,
    normal,
    output_side,
    positive_rank,
    zeros,
)
from omnilora.core.site import Site


@dataclass(frozen=True)
class SVD(Parameterization):
    """ΔW = (α/r) P diag(λ) Q with λ = 0 and P, Q ~ N(0, std²) at the start; r is the initial rank for good."""

    r: int = 12
    alpha: float = 16.0
    dropout: float = 0.0
    std: float = 0.02

    def check(self) -> None:
        positive_rank(self.r)
        finite(self.alpha, "alpha")
        finite(self.dropout, "dropout", 0.0, 0.999)

    def rank(self) -> int:
        return self.r

    def first_scale(self, site: Site) -> float:
        return self.alpha / (self.r + 1e-5)

    def init(self, site: Site, seen: Any = None) -> Tensors:
        return Tensors(
            P=output_side(normal(self.std, site.fan_out, self.r)),
            lam=core(zeros(self.r)),
            Q=input_side(normal(self.std, self.r, site.fan_in)),
        )

    def delta(self, p: Slot, ctx: Context) -> Op:
        return p.scale * chain(p.P, p.lam, p.Q, Dropout(self.dropout, p.training))
