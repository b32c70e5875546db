"""Compressed momentum and accumulation — FLORA, Hao et al., ICML 2024, arXiv:2402.03293.

    P (r, n) or (r, m) ~ N(0, 1/r) from a seed, never stored;  the smaller side of G (m, n) is compressed:
    down(G) = G Pᵀ (m, r) or P G (r, n),   up(C) = C P or Pᵀ C,   E[up(down(G))] = G

    momentum:      W ← W − η clip[(1−β) u + β up(C)],   C ← β C + (1−β) down(u),   u Adafactor's update
                   every ``gap`` steps C ← down'(up(C)) with a new seed
    accumulation:  C ← C + down(G_k) for each micro-batch,  Ĝ = up(C),  a new seed for each update
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from omnilora.errors import BadValue


def projection(seed: int, r: int, n: int, like: Tensor) -> Tensor:
    """P (r, n), entries N(0, 1/r): the same for the same seed, on any device."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(r, n, generator=g) / r**0.5).to(like)


def down(G: Tensor, seed: int, r: int) -> Tensor:
    """G (m, n) → (m, r) where n is the smaller side, else (r, n)."""
    m, n = G.shape
    return projection(seed, r, m, G) @ G if m < n else G @ projection(seed, r, n, G).mT


def up(C: Tensor, seed: int, shape: torch.Size) -> Tensor:
    """The unbiased estimate of what was compressed to C."""
    m, n = shape
    return projection(seed, C.shape[0], m, C).mT @ C if m < n else C @ projection(seed, C.shape[1], n, C)


class FloraAdafactor(torch.optim.Optimizer):
    """Adafactor whose first moment is compressed to ``rank`` for matrices with both sides at least ``rank`` and sides
    within a factor of 4; other tensors keep a dense one.

    ``query``: "exact" adds the current update as it is (the official torch code); "paper" reads it back from the state.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, beta: float = 0.9, decay: float = -0.8, clip: float = 1.0,
                 eps: tuple[float, float] = (1e-30, 1e-3), weight_decay: float = 0.0, rank: int = 128, gap: int = 1000,
                 relative: bool = True, query: str = "exact", seed: int = 0) -> None:  # fmt: skip
        if rank < 1 or gap < 1 or query not in ("exact", "paper"):
            raise BadValue(f"rank = {rank!r}, gap = {gap!r}, query = {query!r}.", "rank, gap ≥ 1; 'exact' or 'paper'.")
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay, "clip": clip, "eps": eps, "rank": rank, "gap": gap,
                                  "weight_decay": weight_decay, "relative": relative, "query": query, "seed": seed})  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is not None:
                    self._update(p, group, number)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state["seed"] = group["seed"] * 1_000_003 + number
        state["step"] += 1
        u = self._preconditioned(p, state, group)
        rate = group["lr"] * (max(group["eps"][1], float(rms(p))) if group["relative"] else 1.0)
        move = self._smoothed(u, state, group, p)
        move = move / max(1.0, float(rms(move)) / group["clip"])
        if group["weight_decay"]:
            p.mul_(1 - group["weight_decay"] * rate)
        p.add_(move, alpha=-rate)

    def _preconditioned(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """Adafactor's g / √v̂; the second moment of a matrix is kept by rows and columns."""
        g = p.grad
        assert g is not None
        g = g if g.dtype == torch.float64 else g.float()
        b2, squares = 1 - float(state["step"]) ** group["decay"], g.square() + group["eps"][0]
        if p.dim() == 2:
            row, col = squares.mean(-1), squares.mean(-2)
            row = state["row"].lerp_(row, 1 - b2) if "row" in state else state.setdefault("row", row)
            col = state["col"].lerp_(col, 1 - b2) if "col" in state else state.setdefault("col", col)
            return g * (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
        else:
            v: Tensor = state["sq"].lerp_(squares, 1 - b2) if "sq" in state else state.setdefault("sq", squares)
            return g * v.rsqrt()

    def _smoothed(self, u: Tensor, state: dict[str, Any], group: dict[str, Any], p: Tensor) -> Tensor:
        beta, r = group["beta"], group["rank"]
        if not compressible(p, r):
            if "mean" not in state:
                state["mean"] = torch.zeros_like(u)
            return state["mean"].mul_(beta).add_(u, alpha=1 - beta)
        seed = state["seed"]
        if "C" not in state:
            state["C"] = torch.zeros_like(down(u, seed, r))
        before = up(state["C"], seed, p.shape)
        if int(state["step"]) % group["gap"] == 0:
            seed = state["seed"] = seed + 1_000_000_007
            state["C"] = down(before, seed, r)
        state["C"].mul_(beta).add_(down(u, seed, r), alpha=1 - beta)
        return (1 - beta) * u + beta * before if group["query"] == "exact" else up(state["C"], seed, p.shape)


def compressible(p: Tensor, r: int) -> bool:
    return p.dim() == 2 and min(p.shape) >= r and max(p.shape) <= 4 * min(p.shape)


def rms(t: Tensor) -> Tensor:
    return t.norm() / t.numel() ** 0.5
