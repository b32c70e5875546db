"""Tied outer factors with a private core — LoTR, Bershatsky et al., 2024, arXiv:2402.01376.   ΔW_ℓ = s B G_ℓ A"""

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
    one_of,
    output_side,
    shared,
    zeros,
)
from omnilora.core.site import Site


@dataclass(frozen=True)
class Tucker(Factored):
    """A (r, in) and B (out, r) ~ N(0, 1), tied over sites of one "shape" or one "type"; G (r, r) private, zero at first."""

    alpha: float = 1.0
    group: str = "shape"

    def check(self) -> None:
        super().check()
        one_of(self.group, "group", "shape", "type")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        key = f"{site.fan_out}x{site.fan_in}"
        key = f"{site.name.split('.')[-1]}/{key}" if self.group == "type" else key
        return Tensors(
            A=shared(f"A/{key}", input_side(normal(1.0, self.r, site.fan_in))),
            B=shared(f"B/{key}", output_side(normal(1.0, site.fan_out, self.r))),
            G=core(zeros(self.r, self.r)),
        )

    def delta(self, p: Slot, ctx: Context) -> Op:
        return p.scale * chain(p.B, p.G, p.A, Dropout(self.dropout, p.training))
