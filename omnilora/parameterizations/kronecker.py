"""Kronecker products — LoKr, Yeh et al., ICLR 2024, arXiv:2309.14859 (LyCORIS).   ΔW = s (w₁ ⊗ w₂),  w₂ = w₂ₐ w₂ᵦ where r is small"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Geometry, Op, chain
from omnilora.core.parameterization import Factored, Slot, Tensors, core, input_side, kaiming, output_side, zeros
from omnilora.core.site import Site
from omnilora.errors import BadValue, NotExpressible


@dataclass(frozen=True, eq=False)
class Kron(Op):
    """a ⊗ b, a (l, m), b (k, n): on rows x (…, m·n) it is a X bᵀ of the matrix X (m, n), never formed."""

    a: Tensor
    b: Tensor

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        if not geo.plain:
            return geo.full(x, geo.visible(self.matrix(geo)))
        h = x.unflatten(-1, (self.a.shape[1], self.b.shape[1]))
        return (self.a.to(h.dtype) @ (h @ self.b.to(h.dtype).mT)).flatten(-2)

    def matrix(self, geo: Geometry) -> Tensor:
        return geo.visible(torch.kron(self.a, self.b))

    def transpose(self) -> Op:
        return Kron(self.a.mT, self.b.mT)


def divided(n: int, factor: int = -1) -> tuple[int, int]:
    """n as a product (small, large): ``factor`` itself where it divides n, else the most balanced pair (with the small
    one at most ``factor``, if that is positive)."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    small = max(d for d in range(1, int(n**0.5) + 1) if n % d == 0 and (factor < 0 or d <= factor))
    return small, n // small


@dataclass(frozen=True)
class LoKr(Factored):
    """``factor``: of the small matrix's sides (−1: balanced). ``both``: w₁ is factored too where r is small enough.

    A convolution's columns divide as channels · kernel: w₂ takes the kernel. The scale is α/r, and 1 where neither matrix
    is factored.
    """

    factor: int = -1
    both: bool = False

    def check(self) -> None:
        super().check()
        if self.factor == 0 or self.factor < -1:
            raise BadValue(f"factor = {self.factor!r}.", "Give a positive integer, or −1.")

    def rank(self) -> int:
        return 0

    def sides(self, site: Site) -> tuple[tuple[int, int], tuple[int, int], int, bool, bool]:
        """(l, k), (m, n), columns a channel, and which of w₁, w₂ are factored."""
        channels = site.store.shape()[1] if site.kind == "conv" else site.fan_in
        (l, k), (m, n) = divided(site.fan_out, self.factor), divided(channels, self.factor)
        return (l, k), (m, n), site.fan_in // channels, self.both and self.r < max(l, m) / 2, self.r < max(k, n) / 2

    def first_scale(self, site: Site) -> float:
        *_, first, second = self.sides(site)
        return self.alpha / self.r if first or second else 1.0

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if site.batch:
            raise NotExpressible(f"{site.name} is a stack of weights, the product is one matrix.", "Leave it out.")
        (l, k), (m, n), per, first, second = self.sides(site)
        made = Tensors()
        if first:
            made["w1a"], made["w1b"] = output_side(kaiming(l, self.r)), input_side(kaiming(self.r, m))
        else:
            made["w1"] = core(kaiming(l, m))
        if second:
            made["w2a"], made["w2b"] = output_side(kaiming(k, self.r)), input_side(zeros(self.r, n * per))
        else:
            made["w2"] = core(zeros(k, n * per))
        return made

    def delta(self, p: Slot, ctx: Context) -> Op:
        w1 = p.w1 if "w1" in p.roles else p.w1a @ p.w1b
        w2 = p.w2 if "w2" in p.roles else p.w2a @ p.w2b
        return p.scale * chain(Kron(w1, w2), Dropout(self.dropout, p.training))
