"""Adam on projected gradients — GaLore, Zhao et al., ICML 2024, arXiv:2403.03507, algorithm 2.

    m ≥ n:  Q = top r right singular vectors of G (r, n),  R = G Qᵀ (m, r),  back(N) = N Q
    m < n:  P = top r left singular vectors of G (m, r),   R = Pᵀ G (r, n),  back(N) = P N
    W ← W − η √(1−β₂ᵗ)/(1−β₁ᵗ) κ back(M / (√V + ε)),  the basis renewed every ``gap`` steps, moments kept as they are
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from omnilora.errors import BadValue


def basis_of(g: Tensor, rank: int) -> Tensor:
    """The top singular vectors of the smaller side of G (m, n): (r, n) or (m, r)."""
    u, _, vh = torch.linalg.svd(g.float() if g.dtype != torch.float64 else g, full_matrices=False)
    return (vh[:rank] if g.shape[0] >= g.shape[1] else u[:, :rank]).to(g.dtype).contiguous()


class GaLoreAdamW(torch.optim.Optimizer):
    """Matrices with both sides above ``rank`` are projected; everything else gets plain AdamW."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-6, weight_decay: float = 0.0, rank: int = 128, gap: int = 200,
                 scale: float = 0.25) -> None:  # fmt: skip
        if rank < 1 or gap < 1 or not scale > 0:
            raise BadValue(f"rank = {rank!r}, gap = {gap!r}, scale = {scale!r}.", "rank, gap ≥ 1 and scale > 0.")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank,
                                  "gap": gap, "scale": scale})  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        state, g = self.state[p], p.grad
        assert g is not None
        if "step" not in state:
            state["step"] = torch.zeros(())
        projected = p.dim() == 2 and min(p.shape) > group["rank"]
        tall = p.dim() == 2 and p.shape[0] >= p.shape[1]
        if projected:
            if int(state["step"]) % group["gap"] == 0:
                state["basis"] = basis_of(g, group["rank"])
            q = state["basis"]
            g = g @ q.mT if tall else q.mT @ g
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
        state["step"] += 1
        (b1, b2), t = group["betas"], int(state["step"])
        m, v = state["exp_avg"].lerp_(g, 1 - b1), state["exp_avg_sq"].mul_(b2).addcmul_(g, g, value=1 - b2)
        n = m / (v.sqrt() + group["eps"])
        size = group["lr"] * math.sqrt(1 - b2**t) / (1 - b1**t)
        if projected:
            n = group["scale"] * (n @ q if tall else q @ n)
        p.add_(n, alpha=-size)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
