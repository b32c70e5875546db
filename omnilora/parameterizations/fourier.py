"""FourierFT — Gao et al., ICML 2024, arXiv:2405.03003.   ΔW = s Re(IDFT₂(S)),  S zero but for n learnt coefficients"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.full import Dense
from omnilora.core.op import Op
from omnilora.core.parameterization import Parameterization, Slot, Tensors, core, finite, positive_rank, zeros
from omnilora.core.site import Site
from omnilora.errors import NotExpressible


@lru_cache(maxsize=256)
def _drawn(seed: int, total: int, n: int) -> Tensor:
    with torch.device("cpu"):
        return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n].clone()


@torch.library.custom_op("omnilora::places", mutates_args=(), schema="(Tensor like, int seed, int total, int n) -> Tensor")
def places(like: Tensor, seed: int, total: int, n: int) -> Tensor:
    """n different numbers below ``total``, the same for the same seed, on the device of ``like``: PEFT's draw."""
    return _drawn(seed, total, n).to(like.device, copy=True)


places.register_fake(lambda like, seed, total, n: like.new_empty(n, dtype=torch.int64))


@dataclass(frozen=True)
class FourierFT(Parameterization):
    """``n`` places of the spectrum, drawn by ``seed`` from the shape alone; only the coefficients are stored."""

    n: int = 1000
    alpha: float = 150.0
    seed: int = 777

    def check(self) -> None:
        positive_rank(self.n, "n")
        finite(self.alpha, "alpha")

    def first_scale(self, site: Site) -> float:
        return self.alpha

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if self.n > site.fan_out * site.fan_in or site.batch:
            raise NotExpressible(f"{site.name} of {site.fan_out} × {site.fan_in} has no spectrum of {self.n} places.",
                                 "Give a smaller n, or leave it out.")  # fmt: skip
        return Tensors(c=core(zeros(self.n)))

    def delta(self, p: Slot, ctx: Context) -> Op:
        total = p.site.fan_out * p.site.fan_in
        S = p.c.new_zeros(total).index_copy(0, places(p.c, self.seed, total, self.n), p.c)
        return p.scale * Dense(torch.fft.ifft2(S.view(p.site.fan_out, p.site.fan_in)).real)
