"""Bilevel training — BiLoRA, Qiang et al., 2024, arXiv:2403.13037; the solver is DARTS' one unrolled step.

    lower:  min_V L(V, a; D₁) + γ₁ Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖²        upper:  min_a L(V*(a), a; D₂) + γ₂ R₂(λ)
    V′ = V − ξ ∇_V L₁,   h = ∇_a L₂(V′, a) − ξ ∇²_{aV} L₁ · g,   g = ∇_{V′} L₂
    ∇²_{aV} L₁ · g ≈ (∇_a L₁(V + εg, a) − ∇_a L₁(V − εg, a)) / 2ε,   ε = 0.01/‖g‖
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from omnilora.core.parameterization import finite
from omnilora.core.rule import Evaluate, Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue
from omnilora.rules.budget import Orthogonal

Loss = Callable[[], Tensor]


def hypergradient(V: Sequence[Tensor], a: Sequence[Tensor], lower: Loss, upper: Loss, xi: float) -> tuple[list[Tensor], Tensor]:
    """(h for each of ``a``, the upper loss at V′). V comes back bit for bit; ξ = 0 is the first-order gradient."""
    first = _gradients(lower(), V) if xi else [torch.zeros_like(v) for v in V]
    kept = [v.detach().clone() for v in V]
    try:
        _set(V, kept, first, -xi)
        value = upper()
        parts = _gradients(value, [*V, *a])
        g, h = parts[: len(V)], parts[len(V) :]
        size = torch.stack([t.norm() for t in g]).norm()
        if xi and size > 0:
            eps = float(0.01 / size)
            _set(V, kept, g, eps)
            plus = _gradients(lower(), a)
            _set(V, kept, g, -eps)
            minus = _gradients(lower(), a)
            h = [t - xi * (p - m) / (2 * eps) for t, p, m in zip(h, plus, minus)]
    finally:
        _set(V, kept, kept, 0.0)
    return h, value.detach()


def _gradients(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, list(tensors), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found)]


@torch.no_grad()
def _set(V: Sequence[Tensor], at: Sequence[Tensor], along: Sequence[Tensor], step: float) -> None:
    for v, base, d in zip(V, at, along):
        v.copy_(base + step * d if step else base)


class Bilevel(Rule):
    """Blocks of ``lower`` updates of the vectors on the training data and ``upper`` updates of the values (role core)
    on the part that was set apart.

    Args:
        share: of the training data for the upper level.
        gamma: weight of the orthogonality of P and Q in the lower level.
        binary: weight of the entropy −Σ λ log λ + (1−λ) log(1−λ) in the upper level ("binary" form).
        second_order: False for ξ = 0.
    """

    one_process = True

    def __init__(self, lower: int = 1, upper: int = 1, share: float = 0.2, gamma: float = 0.1, binary: float = 0.0,
                 second_order: bool = True) -> None:  # fmt: skip
        if lower < 1 or upper < 1:
            raise BadValue(f"lower = {lower!r}, upper = {upper!r}.", "Give at least one update of each level.")
        finite(share, "share", 0.01, 0.99)
        finite(gamma, "gamma", 0.0)
        finite(binary, "binary", 0.0)
        self.lower, self.upper, self.gamma, self.binary = lower, upper, gamma, binary
        self.second_order, self.other_share = second_order, share
        self._round = Orthogonal(gamma, "paper")

    def update(self, run: Run, batches: Sequence[Any], loss: Evaluate) -> float:
        V = [t for s in run.slots() for _, t in s.tensors() if t.requires_grad and t not in _values(run)]
        a = list(_values(run))
        for t in [*V, *a]:
            t.grad = None

        def lower() -> Tensor:
            value = torch.stack([loss(b)[0] for b in batches]).sum()
            return value + self._round.loss(run, None, None) if self.gamma else value

        if run.step % (self.lower + self.upper) < self.lower:
            value = lower()
            for t, g in zip(V, _gradients(value, V)):
                t.grad = g
            return float(value.detach())
        other = [run.other() for _ in batches]

        def upper() -> Tensor:
            value = torch.stack([loss(b)[0] for b in other]).mean()
            return value + self.binary * self._entropy(run) if self.binary else value

        assert run.optimizer is not None
        xi = next(g["lr"] for g in run.optimizer.param_groups if any(p is V[0] for p in g["params"]))
        h, value = hypergradient(V, a, lower, upper, xi if self.second_order else 0.0)
        for t, g in zip(a, h):
            t.grad = g
        return float(value)

    def _entropy(self, run: Run) -> Tensor:
        lam = torch.cat([s.how.lam(t) for s in run.slots() for _, t in s.by_role("core")])  # type: ignore[attr-defined]
        return -(torch.xlogy(lam, lam) + torch.xlogy(1 - lam, 1 - lam)).sum()


class _Set(list[Tensor]):
    def __contains__(self, t: object) -> bool:
        return any(t is other for other in self)


def _values(run: Run) -> _Set:
    """The upper level's tensors."""
    return _Set(t for s in run.slots() for _, t in s.by_role("core") if t.requires_grad)
