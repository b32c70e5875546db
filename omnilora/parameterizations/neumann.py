"""OFT with a truncated series for the Cayley transform, PEFT's default since 0.16.

W' = W Rᵀ,  R = blockdiag(R_i),  R_i = I + 2 Q + 2 Q² + … + 2 Q^{t−2} + Q^{t−1},  Qᵀ = −Q,  t terms of (I + Q)(I − Q)⁻¹

R is a rotation up to the rest of the series only. With t = 3 PEFT computes what t = 4 gives, with t = 2 it is I + 2 Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Op
from omnilora.core.parameterization import Slot, positive_rank
from omnilora.parameterizations.orthogonal import OFT, Blocks, rotate, skew, turned


def series(q: Tensor, k: int, terms: int) -> Tensor:
    """(n, k(k−1)/2) above the diagonal of a skew Q → R (n, k, k)."""
    Q = skew(q, k)
    R = torch.eye(k, dtype=q.dtype, device=q.device).expand_as(Q)
    if terms < 2:
        return R
    R, power = R + 2 * Q, Q
    for _ in range(2, max(terms, 4) - 1 if terms > 2 else 2):
        power = power @ Q
        R = R + 2 * power
    return R + power @ Q if terms > 2 else R


@dataclass(frozen=True)
class NeumannOFT(OFT):
    """OFT with ``terms`` of the series."""

    terms: int = 5

    def check(self) -> None:
        super().check()
        positive_rank(self.terms, "terms")

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        n = turned(p.site)
        return rotate(W, p.site, [Blocks(series(p.q, n // p.q.shape[0], self.terms).mT)])
