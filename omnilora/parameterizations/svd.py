"""The SVD-like form of AdaLoRA — Zhang et al., ICLR 2023, arXiv:2303.10512.   W' = W + s P Λ Q"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import (
    Factored,
    Slot,
    Tensors,
    core,
    input_side,
    normal,
    output_side,
    zeros,
)
from omnilora.core.site import Site


@dataclass(frozen=True)
class SVD(Factored):
    """ΔW = (α/r) P diag(λ) Q with λ = 0 and P, Q ~ N(0, std²) at the start; r is the initial rank for good."""

    r: int = 12
    std: float = 0.02

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
