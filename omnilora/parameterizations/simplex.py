"""Singular values from weights — BiLoRA, Qiang et al., 2024, arXiv:2403.13037.   ΔW = s P Λ Q,  Λ = diag(λ(a))

    λ = a ("real"),  r · softmax(a) ("softmax"; without r: plain=True),  sigmoid(a) ("binary")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain, softmax
from omnilora.core.parameterization import (
    Factored,
    Slot,
    Tensors,
    core,
    input_side,
    kaiming,
    normal,
    one_of,
    output_side,
    zeros,
)
from omnilora.core.site import Site

FORMS = ("softmax", "real", "binary")


@dataclass(frozen=True)
class SimplexSVD(Factored):
    """P (out, r), a (r,), Q (r, in). "real" starts as AdaLoRA (λ = 0, P and Q ~ N(0, 0.02²)), the others with a = 0,
    Q Kaiming and P = 0."""

    form: str = "softmax"
    plain: bool = False

    def check(self) -> None:
        super().check()
        one_of(self.form, "form", *FORMS)

    def init(self, site: Site, seen: Any = None) -> Tensors:
        real = self.form == "real"
        return Tensors(
            P=output_side(normal(0.02, site.fan_out, self.r) if real else zeros(site.fan_out, self.r)),
            a=core(zeros(self.r)),
            Q=input_side(normal(0.02, self.r, site.fan_in) if real else kaiming(self.r, site.fan_in)),
        )

    def lam(self, a: Tensor) -> Tensor:
        """λ (r,)."""
        if self.form == "softmax":
            return softmax(a).to(a.dtype) * (1 if self.plain else self.r)
        return torch.sigmoid(a) if self.form == "binary" else a

    def delta(self, p: Slot, ctx: Context) -> Op:
        return p.scale * chain(p.P, self.lam(p.a), p.Q, Dropout(self.dropout, p.training))
