"""Group-pooled LoRA of QA-LoRA — Xu et al., ICLR 2024, arXiv:2309.14717.   ΔW = s B A P,  P pools L inputs to one"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Geometry, Op, Part, chain
from omnilora.core.parameterization import (
    Factored,
    Slot,
    Tensors,
    input_side,
    one_of,
    output_side,
    positive_rank,
    zeros,
)
from omnilora.core.site import Site
from omnilora.errors import NotExpressible


@dataclass(frozen=True)
class PooledLoRA(Factored):
    """A (r, ⌈in/L⌉): one column for each ``group`` of L inputs, a last group may be shorter. ``pool``: "mean" or "sum"."""

    group: int = 32
    pool: str = "mean"

    def check(self) -> None:
        super().check()
        positive_rank(self.group, "group")
        one_of(self.pool, "pool", "mean", "sum")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if site.kind == "embedding":
            raise NotExpressible(f"{site.name}: neighbouring token ids have nothing in common to pool.", "Leave it out.")
        groups = -(-site.fan_in // self.group)
        bound = math.sqrt(6 / (groups + self.r))  # Xavier-uniform
        A = torch.empty(*site.batch, self.r, groups).uniform_(-bound, bound)
        return Tensors(A=input_side(A), B=output_side(zeros(*site.batch, site.fan_out, self.r)))

    def delta(self, p: Slot, ctx: Context) -> Op:
        n = p.site.fan_in
        A = p.A.repeat_interleave(self.group, -1)[..., :n]  # A P, (r, in)
        if self.pool == "mean":
            last = n % self.group or self.group
            A = A / torch.cat([A.new_full((n - last,), self.group), A.new_full((last,), last)])
        return p.scale * chain(p.B, A, GroupDropout(self.dropout, self.group, p.training))


@dataclass(frozen=True, eq=False)
class GroupDropout(Part):
    """Dropout of pooled features: the inputs of a group are kept or dropped together. The identity in matrices."""

    p: float
    group: int
    training: bool = False
    merges = True

    def __call__(self, h: Tensor, x: Tensor, geo: Geometry, entered: bool) -> Tensor:
        if self.p == 0.0 or not self.training:
            return h
        if not geo.plain:
            return geo.drop(h, self.p)
        kept = F.dropout(torch.ones(*h.shape[:-1], -(-h.shape[-1] // self.group), dtype=h.dtype, device=h.device), self.p)
        return h * kept.repeat_interleave(self.group, -1)[..., : h.shape[-1]]
