"""OFT with a truncated series for the Cayley transform, PEFT's default since 0.16.

W' = W Rᵀ,  R = blockdiag(R_i),  R_i = I + 2 Q + 2 Q² + … + 2 Q^{t−2} + Q^{t−1},  Qᵀ = −Q,  t terms of (I + Q)(I − Q)⁻¹

R is a rotation up to the rest of the series only. With t = 3 PEFT computes what t = 4 gives, with t = 2 it is I + 2 Q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Op
from omnilora.core.parameterization import Parameterization, Slot, Tensors, core, positive_rank, zeros
from omnilora.core.site import Site
from omnilora.errors import BadValue, NotExpressible
from omnilora.parameterizations.orthogonal import Blocks, fitting, rotate, turned


def series(q: Tensor, k: int, terms: int) -> Tensor:
    """(n, k(k−1)/2) above the diagonal of a skew Q → R (n, k, k)."""
    rows, columns = torch.triu_indices(k, k, 1, device=q.device)
    flat = q.new_zeros(*q.shape[:-1], k * k).index_copy(-1, rows * k + columns, q)
    upper = flat.unflatten(-1, (k, k))
    Q = upper - upper.mT
    R = torch.eye(k, dtype=q.dtype, device=q.device).expand_as(Q)
    if terms < 2:
        return R
    R, power = R + 2 * Q, Q
    for _ in range(2, max(terms, 4) - 1 if terms > 2 else 2):
        power = power @ Q
        R = R + 2 * power
    return R + power @ Q if terms > 2 else R


@dataclass(frozen=True)
class NeumannOFT(Parameterization):
    """``block``: size of a rotation, or the nearest divisor of the features. ``terms``: of the series."""

    block: int = 32
    terms: int = 5

    def check(self) -> None:
        positive_rank(self.block, "block")
        positive_rank(self.terms, "terms")
        if self.block < 2:
            raise BadValue(f"block = {self.block!r}.", "A rotation needs two features: give at least 2.")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        n = turned(site)
        k = fitting(n, self.block)
        if not k or site.batch:
            raise NotExpressible(f"{site.name} has {n} feature(s) to rotate.", "Leave it out of the targets.")
        return Tensors(q=core(zeros(n // k, k * (k - 1) // 2)))

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        n = turned(p.site)
        return rotate(W, p.site, [Blocks(series(p.q, n // p.q.shape[0], self.terms).mT)])
