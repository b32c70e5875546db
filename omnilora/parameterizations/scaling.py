"""Vectors that rescale what a layer reads or makes.

(IA)³ — Liu et al., NeurIPS 2022, arXiv:2205.05638.     y' = l ⊙ (W x + b), or y = W (l ⊙ x) + b
SSF — Lian et al., NeurIPS 2022, arXiv:2210.08823.      y' = γ ⊙ (W x + b) + β
A bias for layers that have none:                       y' = W x + β
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from omnilora.core.context import Context
from omnilora.core.op import Op, chain
from omnilora.core.parameterization import (
    Parameterization,
    Slot,
    Tensors,
    core,
    finite,
    magnitude,
    normal,
    one_of,
    zeros,
)
from omnilora.core.site import Site, replaced
from omnilora.errors import NotExpressible


@dataclass(frozen=True)
class IA3(Parameterization):
    """``side``: "output" (keys, values) or "input" (the layer that leaves the feed-forward). l starts at 1."""

    side: str = "output"

    def check(self) -> None:
        one_of(self.side, "side", "output", "input")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if site.batch:
            raise NotExpressible(f"{site.name} is a stack of weights, l is one vector.", "Leave it out.")
        if self.side == "output":
            return Tensors(l=magnitude(torch.ones(site.fan_out)))
        if site.kind == "embedding" or site.geometry.separate:
            raise NotExpressible(f"{site.name}: its inputs are no features to rescale one by one.", "Use side = 'output'.")
        return Tensors(l=core(torch.ones(site.store.shape()[1] if site.kind == "conv" else site.fan_in)))

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        if self.side == "output":
            return chain(p.l, W)
        if p.site.geometry.plain:
            return chain(W, p.l)
        per = p.site.fan_in // p.l.shape[0]  # columns of the matrix that read one channel
        return replaced(W, W.dense().detach() * p.l.repeat_interleave(per))


@dataclass(frozen=True)
class SSF(Parameterization):
    """γ starts at 1 and β at 0, with deviation ``std``."""

    std: float = 0.0

    def check(self) -> None:
        finite(self.std, "std", 0.0)

    def init(self, site: Site, seen: Any = None) -> Tensors:
        n = shifted(site)
        return Tensors(gamma=magnitude(torch.ones(n) + normal(self.std, n)), beta=magnitude(normal(self.std, n)))

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        return chain(p.gamma, W).shift(p.beta)


@dataclass(frozen=True)
class Shift(Parameterization):
    """β starts at 0."""

    def init(self, site: Site, seen: Any = None) -> Tensors:
        return Tensors(beta=magnitude(zeros(shifted(site))))

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        return W.shift(p.beta)


def shifted(site: Site) -> int:
    """How many outputs of the site a shift moves."""
    if not site.called or site.kind == "embedding":
        raise NotExpressible(f"{site.name} ({site.kind}) has no place for a shift.", "Leave it out of the targets.")
    return site.fan_out
