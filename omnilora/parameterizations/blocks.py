"""Block-diagonal updates — MELoRA, Ren et al., ACL 2024, arXiv:2402.17263.   ΔW = s · blockdiag(B_1 A_1, …, B_n A_n)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import (
    Factored,
    Slot,
    Tensors,
    input_side,
    kaiming,
    output_side,
    positive_rank,
    zeros,
)
from omnilora.core.site import Site
from omnilora.errors import NotExpressible


def sizes(total: int, n: int) -> list[int]:
    """Lengths of n consecutive slices; the first ones are longer where n does not divide."""
    return [total // n + (k < total % n) for k in range(n)]


@dataclass(frozen=True)
class BlockLoRA(Factored):
    """``n`` LoRAs of rank ``r``, from the k-th slice of the input to the k-th slice of the output: rank n·r."""

    n: int = 2

    def check(self) -> None:
        super().check()
        positive_rank(self.n, "n")

    def rank(self) -> int:
        return self.n * self.r

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if self.n > min(site.fan_in, site.fan_out):
            raise NotExpressible(f"{site.name} of {site.fan_out}×{site.fan_in} has no {self.n} slices.", "Give a smaller n.")
        made = Tensors()
        for k, (i, o) in enumerate(zip(sizes(site.fan_in, self.n), sizes(site.fan_out, self.n))):
            made[f"A{k}"] = input_side(kaiming(self.r, i))
            made[f"B{k}"] = output_side(zeros(o, self.r))
        return made

    def delta(self, p: Slot, ctx: Context) -> Op:
        A = torch.block_diag(*[p.get_parameter(f"A{k}") for k in range(self.n)])  # (n·r, in)
        B = torch.block_diag(*[p.get_parameter(f"B{k}") for k in range(self.n)])  # (out, n·r)
        return p.scale * chain(B, A, Dropout(self.dropout, p.training))
