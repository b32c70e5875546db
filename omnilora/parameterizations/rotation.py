"""Chunks shared by rotation — PRoLoRA, Wang et al., ACL 2024, arXiv:2402.16902.

A = [A₀ | roll(A₀, σ) | roll(A₀, 2σ) | …] along the input, rolled along the rank, σ_A = max(⌊r'/m⌋, 1);  B likewise along
the output with n chunks;  u of the r ranks are not shared.   ΔW = (α/r) [B  B_u] [A; A_u]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import (
    Factored,
    Slot,
    Tensors,
    input_side,
    output_side,
    positive_rank,
    zeros,
)
from omnilora.core.site import Site
from omnilora.errors import BadValue


def rolled(chunk: Tensor, count: int, shift: int, length: int) -> Tensor:
    """(r', c) → (r', length): ``count`` copies side by side, copy k holding row j + k·shift at row j; cut to length."""
    return torch.cat([torch.roll(chunk, -k * shift, 0) for k in range(count)], 1)[:, :length]


@dataclass(frozen=True)
class RotatedLoRA(Factored):
    """``m`` chunks of A, ``n`` of B, ``u`` unshared ranks of ``r``. ``rotate`` False: plain repetition."""

    u: int = 1
    m: int = 4
    n: int = 4
    rotate: bool = True

    def check(self) -> None:
        super().check()
        positive_rank(self.m, "m")
        positive_rank(self.n, "n")
        if not 0 <= self.u <= self.r:
            raise BadValue(f"u = {self.u!r} of r = {self.r!r}.", "Give 0 … r unshared ranks.")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        bound, shared = 1 / math.sqrt(site.fan_in), self.r - self.u  # the bound of the full fan-in, not the chunk's
        wide, tall = math.ceil(site.fan_in / self.m), math.ceil(site.fan_out / self.n)
        return Tensors(
            A=input_side(torch.empty(shared, wide).uniform_(-bound, bound)),
            B=output_side(zeros(tall, shared)),
            Au=input_side(torch.empty(self.u, site.fan_in).uniform_(-bound, bound)),
            Bu=output_side(zeros(site.fan_out, self.u)),
        )

    def delta(self, p: Slot, ctx: Context) -> Op:
        shared, fan_in, fan_out = self.r - self.u, p.Au.shape[1], p.Bu.shape[0]
        step_a, step_b = (max(shared // k, 1) if self.rotate else 0 for k in (self.m, self.n))
        A = torch.cat((rolled(p.A, self.m, step_a, fan_in), p.Au))  # (r, in)
        B = torch.cat((rolled(p.B.mT, self.n, step_b, fan_out).mT, p.Bu), 1)  # (out, r)
        return p.scale * chain(B, A, Dropout(self.dropout, p.training))
