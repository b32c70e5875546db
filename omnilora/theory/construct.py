"""Adapters that turn one network into another, in closed form — Zeng & Lee, ICLR 2024, arXiv:2310.17513.

A chain W_L ⋯ W_1 (W_1 meets the input) and a target W̄, E = W̄ − W_L ⋯ W_1 = U Σ Vᵀ. Layer l owns the next R right
singular vectors V_l of E, and with M_l = W_L ⋯ W_{l+1} (frozen) and N_{l−1} the adapted product before l:

    B_l = M_l⁻¹ E V_l,   A_l = V_lᵀ N_{l−1}⁻¹,   W_l' = W_l + B_l A_l    ⇒    ‖W̄ − Π W_l'‖₂ = σ_{RL+1}(E)

Exact if and only if R L ≥ rank(E); no adapters of rank R do better, trained or constructed. Everything is fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from omnilora.core.parameterization import positive_rank
from omnilora.errors import BadValue

Factors = tuple[Tensor, Tensor]  # B (out, R), A (R, in)


@dataclass(frozen=True)
class Built:
    """Factors for each layer, in the order of the input's way, and offsets where the layer has one."""

    factors: tuple[Factors, ...]
    offsets: tuple[Tensor, ...] = ()

    @property
    def rank(self) -> int:
        return max(A.shape[0] for _, A in self.factors)


def product(weights: Sequence[Tensor], width: int) -> Tensor:
    """W_L ⋯ W_1, the identity of ``width`` for none."""
    start = torch.eye(width, dtype=torch.float64, device=weights[0].device if len(weights) else None)
    return reduce(lambda done, w: w @ done, weights, start)


def error_bound(weights: Sequence[Tensor], target: Tensor, rank: int) -> float:
    """σ_{RL+1}(E): the least spectral error of any adapters of ``rank`` on the chain."""
    sigma = torch.linalg.svdvals(_wide(target) - product(_all(weights), weights[0].shape[1]))
    at = rank * len(weights)
    return float(sigma[at]) if at < len(sigma) else 0.0


def smallest_rank(weights: Sequence[Tensor], target: Tensor, tolerance: float = 1e-9) -> int:
    """The least R with spectral error ≤ ``tolerance`` · ‖W̄‖₂ on the chain; 0 where nothing must change."""
    sigma = torch.linalg.svdvals(_wide(target) - product(_all(weights), weights[0].shape[1]))
    left = int((sigma > tolerance * torch.linalg.matrix_norm(_wide(target), 2)).sum())
    return -(-left // len(weights))


def linear_chain(weights: Sequence[Tensor], target: Tensor, rank: int) -> Built:
    """Adapters of ``rank`` on square matrices (D, D), the first one meeting the input, so that their product is
    ``target`` up to σ_{RL+1}(E). Raises :class:`BadValue` where a partial product cannot be inverted."""
    positive_rank(rank, "rank")
    W, goal = _all(weights), _wide(target)
    width = _square(W, goal)
    E = goal - product(W, width)
    _, _, Vh = torch.linalg.svd(E)
    done, factors = product([], width).to(goal.device), []
    for layer, w in enumerate(W):
        V = Vh[layer * rank : (layer + 1) * rank].mT  # (D, R); fewer columns where the singular vectors have run out
        after = product(W[layer + 1 :], width) if layer + 1 < len(W) else torch.eye(width, dtype=torch.float64, device=goal.device)
        B = _solve(after, E @ V, layer)
        A = _solve(done.mT, V, layer).mT
        factors.append((B, A))
        done = (w + B @ A) @ done
    return Built(tuple(factors))


def relu_network(weights: Sequence[Tensor], offsets: Sequence[Tensor], targets: Sequence[Tensor],
                 target_offsets: Sequence[Tensor], rank: int, x: Tensor) -> Built:  # fmt: skip
    """Adapters and offsets so that a ReLU network of L layers equals one of L̄ layers on inputs like ``x`` (n, D).

    Layers fall into L̄ groups of ⌊L/L̄⌋ (the last takes the rest); inside a group every ReLU is kept active by an offset
    of −2 · min(0, least pre-activation over x). Exact where rank · (layers of a group) ≥ D on inputs whose
    pre-activations stay above twice that minimum. Both networks end with a ReLU.
    """
    count, groups = len(weights), len(targets)
    if not groups or groups > count:
        raise BadValue(f"{groups} target layers and {count} layers.", "The network must be at least as deep as its target.")
    size = count // groups
    W, h = _all(weights), _wide(x)
    factors: list[Factors] = []
    out: list[Tensor] = []
    for i, (goal, c) in enumerate(zip(_all(targets), _all(target_offsets), strict=True)):
        first, end = i * size, count if i == groups - 1 else (i + 1) * size
        made = linear_chain(W[first:end], goal, rank)
        adapted = [w + B @ A for w, (B, A) in zip(W[first:end], made.factors, strict=True)]
        factors += made.factors
        shift, z = torch.zeros_like(c), h
        for w in adapted[:-1]:
            z = z @ w.mT
            b = -2 * z.amin(0).clamp_max(0.0)
            z = z + b
            out.append(b)
            shift = w @ shift + b
        out.append(c - adapted[-1] @ shift)
        h = torch.relu(h @ goal.mT + c)
    return Built(tuple(factors), tuple(out))


def _all(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_wide(t) for t in tensors]


def _wide(t: Tensor) -> Tensor:
    return t.detach().to(torch.float64)


def _square(weights: Sequence[Tensor], target: Tensor) -> int:
    width = target.shape[0]
    wrong = [tuple(w.shape) for w in (*weights, target) if tuple(w.shape) != (width, width)]
    if not weights or wrong:
        raise BadValue(f"The chain has matrices of shape {wrong or 'none'}.", f"Give square matrices of one width ({width}).")
    return width


def _solve(m: Tensor, rhs: Tensor, layer: int) -> Tensor:
    found, info = torch.linalg.solve_ex(m, rhs)
    gap = float((m @ found - rhs).norm() / rhs.norm().clamp_min(1e-30)) if rhs.numel() else 0.0
    if int(info) or not gap < 1e-6:
        raise BadValue(f"A product of layers around layer {layer + 1} cannot be inverted (relative residual {gap:.2g}).",
                       "The construction needs invertible products; perturb the weights or use fewer layers.")  # fmt: skip
    return found
