"""Parallel heads that are averaged into the weight — LoRA-the-Explorer, Huh et al., 2024, arXiv:2402.16828.

    head h:   W_h = W̄ + s (B_h A_h − B̂_h Â_h)          on its own chunk of the batch
    merged:   W' = W̄ + (s/H) Σ_h (B_h A_h − B̂_h Â_h),   W̄ = W + acc

Â, B̂ are the factors at the last merge (zero before the first). Merging is acc ← W' − W, Â ← A, B̂ ← B: it changes no W',
and right after it every W_h is W'. Without chunks (evaluation, saving, serving) the map is W'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.full import Dense
from omnilora.core.op import Dropout, Gate, Op, chain
from omnilora.core.parameterization import (
    Factored,
    Slot,
    Tensors,
    input_side,
    normal,
    output_side,
    own,
    positive_rank,
    zeros,
)
from omnilora.core.site import Site
from omnilora.errors import ContextError, NotExpressible


@dataclass(frozen=True)
class Heads(Factored):
    """``heads`` LoRAs side by side: A (H·r, in), B (out, H·r); rows of each A_h are orthonormal times √(in/r)."""

    heads: int = 4

    def check(self) -> None:
        super().check()
        positive_rank(self.heads, "heads")

    def rank(self) -> int:
        return self.heads * self.r

    def frozen(self) -> frozenset[str]:
        return frozenset({"A_hat", "B_hat", "acc"})

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if self.r > site.fan_in:
            raise NotExpressible(f"{site.name} has {site.fan_in} inputs, no {self.r} orthonormal rows.", "Lower r.")
        total, width = self.heads * self.r, site.fan_in
        A = [torch.linalg.qr(normal(1.0, width, self.r)).Q.mT * (width / self.r) ** 0.5 for _ in range(self.heads)]
        return Tensors(
            A=input_side(torch.cat(A)),
            B=output_side(zeros(site.fan_out, total)),
            A_hat=own(zeros(total, width)),
            B_hat=own(zeros(site.fan_out, total)),
            acc=own(zeros(site.fan_out, width)),
        )

    def delta(self, p: Slot, ctx: Context) -> Op:
        B, A = torch.cat((p.B, -p.B_hat), -1), torch.cat((p.A, p.A_hat), -2)  # (out, 2Hr), (2Hr, in)
        mine = ctx.get("heads")
        share = torch.full((A.shape[0],), 1 / self.heads, device=A.device)
        D = share if mine is None else Gate(lambda x: self.own_head(x, *mine))
        return Dense(p.acc) + p.scale * chain(B, D, A, Dropout(self.dropout, p.training))

    def own_head(self, x: Tensor, first: int, count: int) -> Tensor:
        """x (batch, …): a one-hot choice of head for each row, (batch, 1, …, 2Hr); heads first … first + count − 1."""
        if x.dim() == 2 and x.shape[0] % count:  # rows, or tokens of rows: only equal chunks are the same for both
            raise ContextError(f"{x.shape[0]} rows of tokens cannot be divided among {count} heads.",
                               "Choose a batch size that the number of heads divides.")  # fmt: skip
        head = first + torch.arange(x.shape[0], device=x.device) * count // x.shape[0]
        one = torch.nn.functional.one_hot(head, self.heads).repeat_interleave(self.r, -1).repeat(1, 2)
        return one.view(x.shape[0], *[1] * (x.dim() - 2), -1)
