"""Two maps of LyCORIS that read the weight.

ButterflyOFT  W' = diag(s) F_m ⋯ F_1 W,  F_i = P_iᵀ blockdiag((I + Q)(I − Q)⁻¹) P_i,  Qᵀ = −Q;  the bias stays.  P_i brings rows
              that are 2^{i−1} · b/2 apart side by side, b the block
ProductLoRA   W' = W + s (W a₁ a₂ + B C):  GLoRA with A as a matrix product — Chavan et al., 2023, arXiv:2306.07967
"""

from __future__ import annotations

from dataclasses import dataclass
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
    output_side,
    positive_rank,
    zeros,
)
from omnilora.core.site import Site, replaced
from omnilora.errors import BadValue, NotExpressible
from omnilora.parameterizations.lycoris import channels_of


def mixed(R: Tensor, M: Tensor, step: int) -> Tensor:
    """blockdiag(R) on the rows of M, R (n, b, b), rows ``step`` apart side by side."""
    rows = M.unflatten(0, (-1, 2, step)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, R.shape[-1]))
    rows = torch.einsum("nij,njc->nic", R, rows).flatten(0, 1)
    return rows.unflatten(0, (-1, step, 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class ButterflyOFT(Parameterization):
    """``factors``: m, of blocks of size ``block``. ``constraint``: c, the norm of all Q is at most c · outputs (0: no bound).
    ``rescaled``: s learns."""

    block: int = 4
    factors: int = 1
    constraint: float = 0.0
    rescaled: bool = False
    reads_weight = True

    def check(self) -> None:
        positive_rank(self.block, "block")
        positive_rank(self.factors, "factors")
        finite(self.constraint, "constraint", 0.0)
        if self.block % 2:
            raise BadValue(f"block = {self.block!r}.", "A butterfly's blocks have even size.")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if site.fan_out % self.block or site.fan_out % (2**self.factors * self.block // 2) or site.batch:
            raise NotExpressible(f"{site.name} has {site.fan_out} outputs, which {self.factors} factors of blocks of "
                                 f"{self.block} do not divide.", "Give other sizes, or leave it out.")  # fmt: skip
        made = Tensors(X=core(zeros(self.factors, site.fan_out // self.block, self.block, self.block)))
        return Tensors({**made, "s": magnitude(torch.ones(site.fan_out))}) if self.rescaled else made

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        Q, I = p.X - p.X.mT, torch.eye(self.block, dtype=p.X.dtype, device=p.X.device)
        if self.constraint:
            Q = Q * (self.constraint * p.X[0, ..., 0].numel() / (Q.norm() + 1e-8)).clamp_max(1.0)
        R = torch.linalg.solve(I - Q, I + Q, left=False)
        M = W.dense().to(R.dtype)
        for i in range(self.factors):
            M = mixed(R[i], M, 2**i * self.block // 2)
        return replaced(W, M * p.s.unsqueeze(1) if self.rescaled else M)


@dataclass(frozen=True)
class ProductLoRA(Factored):
    """a₁ (channels, r), a₂ (r, channels) mix what W reads; C (r, in) and B (out, r) are LoRA's."""

    reads_weight = True

    def init(self, site: Site, seen: Any = None) -> Tensors:
        channels, _ = channels_of(site)
        if site.geometry.separate:
            raise NotExpressible(f"{site.name} is grouped: its groups read channels of their own.", "Leave it out.")
        return Tensors(a1=core(kaiming(channels, self.r)), a2=input_side(zeros(self.r, channels)),
                       B=output_side(kaiming(site.fan_out, self.r)), C=input_side(zeros(self.r, site.fan_in)))  # fmt: skip

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        drop = Dropout(self.dropout, p.training)
        D = chain(p.B, p.C, drop)
        if p.site.geometry.plain:
            return W + p.scale * (chain(W.linear, p.a1, p.a2, drop) + D)
        M = W.dense().detach()
        through = torch.einsum("oik,ir,rc->ock", M.unflatten(1, (p.a1.shape[0], -1)).to(p.a1.dtype), p.a1, p.a2)
        return replaced(W, M.to(through.dtype) + p.scale * through.flatten(1)) + p.scale * D
