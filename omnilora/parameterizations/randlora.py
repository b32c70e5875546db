"""RandLoRA — Albert et al., ICLR 2025, arXiv:2502.00987.   ΔW = (α/r) Σ_j B_j diag(λ_j) A diag(γ_j)

A (r, d) and B_j (D, r), d = min(in, out), D = max(in, out), are frozen, random and one for all sites; d/r of them give full
rank. λ and γ are each site's own. Where in > out the product is turned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import Factored, Slot, Tensors, core, input_side, output_side, shared, zeros
from omnilora.core.site import Site
from omnilora.errors import NotExpressible


@lru_cache(maxsize=1)
def random_bases(seed: int, r: int, small: int, large: int) -> tuple[Tensor, Tensor]:
    """A (r, small), B (large, ⌈small/r⌉, r) of one generator, Kaiming-uniform over their deviation, drawn and divided in bf16:
    PEFT's numbers, bit for bit."""
    with torch.device("cpu"):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=g)

        a = draw(r, 1, small)
        b = torch.cat([draw(large, 1, r) for _ in range(math.ceil(small / r))], 1)
    return (a / a.std()).squeeze(1).float(), (b / b.std()).float()


@dataclass(frozen=True)
class RandLoRA(Factored):
    """The bases are drawn at the largest shapes among the adapter's sites and sliced."""

    r: int = 32
    alpha: float = 640.0
    seed: int = 0

    def rank(self) -> int:
        return 0  # full

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if site.batch:
            raise NotExpressible(f"{site.name} is a stack of weights; the bases are matrices.", "Leave it out.")
        wide, tall = max(s.fan_in for s in site.peers), max(s.fan_out for s in site.peers)
        small, large = min(wide, tall), max(wide, tall)
        blank = torch.empty(self.r, small), torch.empty(large, math.ceil(small / self.r), self.r)
        a, b = blank if zeros(1).is_meta else random_bases(self.seed, self.r, small, large)
        d, D = sorted((site.fan_in, site.fan_out))
        n = math.ceil(d / self.r)
        return Tensors(
            A=shared("A", input_side(a.clone())),
            B=shared("B", output_side(b.clone())),
            lam=core(zeros(self.r, n)),
            gamma=core(torch.full((n, d), 1 / max(n, d))),
        )

    def frozen(self) -> frozenset[str]:
        return frozenset("AB")

    def delta(self, p: Slot, ctx: Context) -> Op:
        n, d = p.gamma.shape
        D = max(p.site.fan_in, p.site.fan_out)
        small = (p.lam.unsqueeze(-1) * p.A[:, None, :d] * p.gamma).flatten(0, 1)  # (r·n, d)
        large = p.B[:D, :n].flatten(1)  # (D, n·r)
        B, A = (large, small) if d == p.site.fan_in else (small.mT, large.mT)
        return p.scale * chain(B, A, Dropout(self.dropout, p.training))
