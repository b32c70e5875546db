"""Linear mixtures of LoRA experts: one LoRA of rank E·r whose diagonal depends on the token.

y = W x + s Σ_e g_e(x) B_e A_e x  =  W x + s B (g ⊗ 1_r) A x,   A (E·r, in), B (out, E·r)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Gate, Op, chain, softmax
from omnilora.core.parameterization import (
    Factored,
    Slot,
    Tensors,
    input_side,
    kaiming,
    normal,
    output_side,
    positive_rank,
    router,
    zeros,
)
from omnilora.core.site import Site
from omnilora.errors import BadValue, NotExpressible


@dataclass(frozen=True)
class MixtureOfLoRA(Factored):
    """``experts`` LoRAs of rank r, mixed by p = softmax(R x); ``top_k`` keeps the k largest without renormalizing."""

    r: int = 4
    experts: int = 10
    top_k: int | None = None
    init_A: str = "normal"
    std: float = 0.02
    mergeable = False

    def check(self) -> None:
        super().check()
        positive_rank(self.experts, "experts")
        if self.top_k is not None and not 1 <= self.top_k <= self.experts:
            raise BadValue(f"top_k = {self.top_k!r} of {self.experts} experts.", "Give 1 … experts, or None.")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if not site.called or site.kind == "embedding":
            raise NotExpressible(f"{site.name} hands no tokens to a router.", "Leave it out of the targets.")
        width, total = site.fan_in, self.experts * self.r
        if site.kind == "conv":
            width = site.store.shape()[1] * site.geometry.groups  # type: ignore[attr-defined]
        a = normal(self.std, total, site.fan_in) if self.init_A == "normal" else kaiming(total, site.fan_in)
        return Tensors(
            A=input_side(a),
            B=output_side(zeros(site.fan_out, total)),
            R=router(normal(self.std, self.experts, width)),
        )

    def gates(self, p: Slot, ctx: Context, logits: Tensor) -> Tensor:
        """Logits of the router (..., E) → gates (..., E·r); reports the logits."""
        ctx.emit(p.site.name, "router_logits", logits)
        g = softmax(logits)
        if self.top_k is not None and self.top_k < self.experts:
            kept = g.topk(self.top_k, -1).indices
            g = g * torch.zeros_like(g).scatter(-1, kept, 1.0)
        return g.repeat_interleave(self.r, -1)

    def delta(self, p: Slot, ctx: Context) -> Op:
        gate = Gate(lambda logits: self.gates(p, ctx, logits), p.R)
        return p.scale * chain(p.B, gate, p.A, Dropout(self.dropout, p.training))
