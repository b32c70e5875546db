"""Tied outer factors with a private core — LoTR, Bershatsky et al., 2024, arXiv:2402.01376.   ΔW_ℓ = s B G_ℓ A"""

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
    shared,
    zeros,
)
from omnilora.core.site import Site
from omnilora.errors import BadValue


@dataclass(frozen=True)
class Tucker(Parameterization):
    """A (r, in) and B (out, r) ~ N(0, 1), tied over sites of one "shape" or one "type"; G (r, r) private, zero at first."""

    r: int = 8
    alpha: float = 1.0
    dropout: float = 0.0
    group: str = "shape"

    def check(self) -> None:
        positive_rank(self.r)
        finite(self.alpha, "alpha")
        finite(self.dropout, "dropout", 0.0, 0.999)
        if self.group not in ("shape", "type"):
            raise BadValue(f"group = {self.group!r}.", "Give 'shape' or 'type'.")

    def rank(self) -> int:
        return self.r

    def first_scale(self, site: Site) -> float:
        return self.alpha / self.r

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
