"""Rotations of what a layer reads.

OFT — Qiu et al., NeurIPS 2023, arXiv:2306.07280.     W' = W Rᵀ,  R = blockdiag(R_1 … R_n),  R_i = (I − Q_i)(I + Q_i)⁻¹,  Qᵀ = −Q
BOFT — Liu et al., ICLR 2024, arXiv:2311.06243.       W' = diag(s) W (F_m ⋯ F_1)ᵀ,  F_i = P_i blockdiag(…) P_iᵀ a butterfly

The columns of the stored matrix are rotated: of a convolution those of (out, in·kernel), so that R turns the unfolded patch;
of an embedding the features it makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Geometry, Op, chain, like
from omnilora.core.parameterization import Parameterization, Slot, Tensors, core, magnitude, positive_rank, zeros
from omnilora.core.site import Site, replaced
from omnilora.errors import BadValue, NotExpressible


@dataclass(frozen=True, eq=False)
class Blocks(Op):
    """P blockdiag(m) Pᵀ, m (n, k, k). P gathers, in groups of ``g`` blocks, first the even and then the odd half-blocks
    (g = 1: the identity)."""

    m: Tensor
    g: int = 1

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        n, k, _ = self.m.shape
        if self.g > 1:  # Pᵀ
            x = x.unflatten(-1, (-1, 2, self.g, k // 2)).transpose(-3, -2).flatten(-4)
        y = torch.einsum("...nk,nck->...nc", x.unflatten(-1, (n, k)), like(self.m, x)).flatten(-2)
        return y if self.g == 1 else y.unflatten(-1, (-1, self.g, 2, k // 2)).transpose(-3, -2).flatten(-4)

    def matrix(self, geo: Geometry) -> Tensor:
        n, k, _ = self.m.shape
        return self.apply(torch.eye(n * k, dtype=self.m.dtype, device=self.m.device), geo).mT

    def transpose(self) -> Op:
        return Blocks(self.m.mT, self.g)


def skew(q: Tensor, k: int) -> Tensor:
    """(…, k(k−1)/2) above the diagonal → Q (…, k, k), Qᵀ = −Q."""
    rows, columns = torch.triu_indices(k, k, 1, device=q.device)
    flat = q.new_zeros(*q.shape[:-1], k * k).index_copy(-1, rows * k + columns, q)
    upper = flat.unflatten(-1, (k, k))
    return upper - upper.mT


def cayley(q: Tensor, k: int) -> Tensor:
    """(…, k(k−1)/2) above the diagonal of a skew Q → (I − Q)(I + Q)⁻¹ (…, k, k)."""
    Q, I = skew(q, k), torch.eye(k, dtype=q.dtype, device=q.device)
    return torch.linalg.solve(I + Q, I - Q, left=False)


def fitting(n: int, block: int, halves: int = 1) -> int:
    """The divisor of n nearest to ``block`` (the smaller of two), such that n is a multiple of it times ``halves``."""
    able = [d for d in range(2, n + 1) if n % (d * halves) == 0 and (halves == 1 or d % 2 == 0)]
    return min(able, key=lambda d: (abs(d - block), d), default=0)


def turned(site: Site) -> int:
    """How many features are rotated."""
    return site.fan_out if site.kind == "embedding" else site.fan_in


def rotate(W: Op, site: Site, factors: Sequence[Op]) -> Op:
    """W · factors, lazily where the layer reads rows of features; of an embedding factors · W."""
    if site.kind == "embedding":
        return chain(*factors, W)
    if site.geometry.plain:
        return chain(W, *factors)
    return replaced(W, chain(W.linear, *factors).dense())


@dataclass(frozen=True)
class OFT(Parameterization):
    """``block``: size of a rotation, or the nearest divisor of the features. R = I at the start."""

    block: int = 32

    def check(self) -> None:
        positive_rank(self.block, "block")
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
        R = cayley(p.q, n // p.q.shape[0])
        return rotate(W, p.site, [Blocks(R.mT)])


@dataclass(frozen=True)
class BOFT(Parameterization):
    """``factors``: butterfly levels m; each mixes blocks twice as far apart, all m of them 2^{m−1} blocks. s = 1 at the start."""

    block: int = 4
    factors: int = 2

    def check(self) -> None:
        positive_rank(self.block, "block")
        positive_rank(self.factors, "factors")
        if self.block < 2:
            raise BadValue(f"block = {self.block!r}.", "A rotation needs two features: give at least 2.")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        n = turned(site)
        k = fitting(n, self.block, 2 ** (self.factors - 1))
        if not k or site.batch:
            raise NotExpressible(f"{site.name}: {n} feature(s) do not divide into {self.factors} levels of even blocks.",
                                 "Lower factors, or leave it out.")  # fmt: skip
        return Tensors(q=core(zeros(self.factors, n // k, k * (k - 1) // 2)), s=magnitude(torch.ones(site.fan_out)))

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        R = cayley(p.q, turned(p.site) // p.q.shape[1])
        turns = [Blocks(r.mT, 2**i) for i, r in enumerate(R)]  # F_1ᵀ ⋯ F_mᵀ
        return chain(p.s, rotate(W.linear, p.site, turns)).shift(W.offset)
