"""Shared random or tied factors with private vectors.

VeRA — Kopiczko et al., ICLR 2024, arXiv:2310.11454.      W' = W + diag(b) B diag(d) A,  A, B frozen, one for all sites
Tied-LoRA — Renduchintala et al., NAACL 2024, arXiv:2311.09578.  W' = W + s diag(v) B diag(u) A,  A, B tied by shape
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import (
    Factored,
    Parameterization,
    Slot,
    Tensors,
    core,
    finite,
    input_side,
    kaiming,
    magnitude,
    one_of,
    output_side,
    positive_rank,
    shared,
    zeros,
)
from omnilora.core.site import Site
from omnilora.errors import BadValue


@lru_cache(maxsize=1)
def projections(seed: int, r: int, fan_in: int, fan_out: int) -> tuple[Tensor, Tensor]:
    """A (r, fan_in) then B (fan_out, r) of one generator, U(±√(6/fan_in)) and U(±√(6/r)): PEFT's draw, bit for bit."""
    with torch.device("cpu"):
        g = torch.Generator().manual_seed(seed)
        a = torch.empty(r, fan_in).uniform_(-(bound := math.sqrt(6 / fan_in)), bound, generator=g)
        b = torch.empty(fan_out, r).uniform_(-(bound := math.sqrt(6 / r)), bound, generator=g)
    return a, b


@dataclass(frozen=True)
class VeRA(Parameterization):
    """A and B are drawn at the largest shapes among the adapter's sites and sliced."""

    r: int = 256
    d_init: float = 0.1
    dropout: float = 0.0
    seed: int = 0
    save_projection: bool = True

    def check(self) -> None:
        positive_rank(self.r)
        finite(self.d_init, "d_init")
        finite(self.dropout, "dropout", 0.0, 0.999)

    def rank(self) -> int:
        return self.r

    def frozen(self) -> frozenset[str]:
        return frozenset("AB")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        fan_in, fan_out = max(s.fan_in for s in site.peers), max(s.fan_out for s in site.peers)
        a, b = (torch.empty(self.r, fan_in), torch.empty(fan_out, self.r)) if zeros(1).is_meta else projections(
            self.seed, self.r, fan_in, fan_out)  # fmt: skip
        return Tensors(
            A=shared("A", input_side(a.clone())),
            B=shared("B", output_side(b.clone())),
            d=core(torch.full((self.r,), self.d_init)),
            b=magnitude(zeros(site.fan_out)),
        )

    def delta(self, p: Slot, ctx: Context) -> Op:
        B, A = p.B[: p.b.shape[0]], p.A[:, : p.site.fan_in]
        return p.scale * chain(p.b, B, p.d, A, Dropout(self.dropout, p.training))


@dataclass(frozen=True)
class TiedLoRA(Factored):
    """``train``: which of A, B (tied), u (r,), v (out,) (private) learn; frozen vectors are 1.

    ``group``: sites of one "shape" share A and B, or of one "type" (the last component of their names).
    """

    alpha: float = 8.0
    train: str = "ABuv"
    group: str = "shape"

    def check(self) -> None:
        super().check()
        if not self.train or set(self.train) - set("ABuv"):
            raise BadValue(f"train = {self.train!r}.", "Name some of the letters A, B, u, v.")
        one_of(self.group, "group", "shape", "type")
        if not set(self.train) & set("Bv"):
            raise BadValue(f"train = {self.train!r}: nothing that starts at zero learns.", "Train B or v.")

    def frozen(self) -> frozenset[str]:
        return frozenset("ABuv") - frozenset(self.train)

    def init(self, site: Site, seen: Any = None) -> Tensors:
        group = f"{site.fan_out}x{site.fan_in}"
        if self.group == "type":
            group = f"{site.name.split('.')[-1]}/{group}"
        tied_b = zeros(site.fan_out, self.r) if "B" in self.train else kaiming(site.fan_out, self.r)
        v = torch.ones(site.fan_out) if "B" in self.train else zeros(site.fan_out)
        return Tensors(
            A=shared(f"A/{group}", input_side(kaiming(self.r, site.fan_in))),
            B=shared(f"B/{group}", output_side(tied_b)),
            u=core(torch.ones(self.r)),
            v=magnitude(v),
        )

    def delta(self, p: Slot, ctx: Context) -> Op:
        return p.scale * chain(p.v, p.B, p.u, p.A, Dropout(self.dropout, p.training))
