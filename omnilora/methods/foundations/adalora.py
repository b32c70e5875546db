from __future__ import annotations

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.core.attach import slots
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.svd import SVD
from omnilora.rules.budget import Budget, Orthogonal

CARD = Card(
    key="adalora",
    title="AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
    section="foundations",
    kind="schedule",
    equation=r"W' = W + \frac{\alpha}{r} P\,\mathrm{diag}(\lambda)\,Q,\quad "
    r"\lambda_i \leftarrow 0 \text{ outside the } b(t) \text{ largest scores}",
    purpose="Singular triplets compete across all layers for a rank budget that shrinks on a cubic schedule.",
    arxiv="2303.10512",
    venue="ICLR 2023",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r": 12, "target": 8, "alpha": 16.0, "t_init": 0.1, "t_final": 0.5, "every": 10, "orthogonal": 0.1},
    cases=({"r": 4, "target": 2, "alpha": 6.0},),
    limits=(
        "λ, P and Q all start near zero: 20 updates of a 135 M model at LoRA's rate of 1e-3 learn nothing (loss −0.000 ± "
        "0.003), at 5e-3 they do (−0.64 ± 0.04). The trainer's default rate is five times LoRA's.",
    ),
    not_with={"lora_plus": "LoRA+'s rates would scale the sensitivity that ranks triplets."},
    agreement=(
        "PEFT 0.21.2, 40 updates of SGD: budget, pruned triplets and all tensors equal to 1e-5 at every step. PEFT also "
        "prunes at step T − t_f where that is no multiple of ΔT; the official code does not, nor do we.",
    ),
    differs=(
        "The regularizer is the unsquared norm averaged over all P and Q, as both public codes have it; "
        "orthogonal_form='paper' gives the squared sum.",
        "The scale keeps the initial rank for the whole run (the authors' answer in their issue 12), also after compaction.",
        "Ties at the threshold are broken by position, so that exactly b(t) triplets survive.",
        "The phases default to shares of the run, after the MNLI script (8,000 and 50,000 of 86,000 steps).",
    ),
)


def adalora(
    r: int = 12,
    target: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    t_init: float = 0.1,
    t_final: float = 0.5,
    every: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonal: float = 0.1,
    orthogonal_form: str = "code",
    compact: bool = False,
) -> Method:
    """SVD form + Budget + Orthogonal. ``t_init`` and ``t_final``: steps (int) or shares of the run (< 1)."""
    rules = (Budget(target, t_init, t_final, every, beta1, beta2, compact), Orthogonal(orthogonal, orthogonal_form))
    return Method("adalora", SVD(r, alpha, dropout), rules, rate=5.0)


class _Pair(nn.Module):
    """Two layers side by side that read the same x."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.first(x), self.second(x)), -1)


def _allocation(broken: bool) -> float:
    """Rank of the first layer minus that of the second, when only the first needs a rank-4 change (broken: no ticks)."""
    model, x = _Pair(), torch.randn(1024, 16)
    change = torch.cat((proofs.planted(16, 16, 4), torch.zeros(16, 16)))
    y = (model(x) + x @ change.mT).detach()
    how = adalora(r=4, target=2, alpha=4.0, t_init=100, t_final=300, every=10)
    proofs.train(model, how, proofs.minibatches(x, y, 32, noise=0.1), 800, lr=1e-2, ticks=not broken)
    ranks = [int((s.lam != 0).sum()) for s in slots(model)]
    return float(ranks[0] - ranks[1])


def _orthogonality(broken: bool) -> float:
    """Mean ‖PᵀP − I‖_F at the end of training (broken: γ = 0)."""
    model, target = proofs.Stack(24, 20), proofs.planted(20, 24, 3)
    x = torch.randn(128, 24)
    y = (model(x) + x @ target.mT).detach()
    how = adalora(r=4, target=3, alpha=4.0, orthogonal=0.0 if broken else 0.1, t_init=50, t_final=100)
    proofs.train(model, how, proofs.full_batch(x, y), 600, lr=1e-2)
    (s,) = slots(model)
    gaps = [s.P.mT @ s.P, s.Q @ s.Q.mT]
    return float(torch.stack([(g - torch.eye(4)).norm() for g in gaps]).mean().detach())


def claims() -> list[Claim]:
    return [
        Claim("ranks follow need", "the budget moves to the layer that needs it: ranks end 4 and 0", _allocation,
              lambda f: f == 4, "the schedule never ticks"),
        Claim("orthogonal singular vectors", "the regularizer keeps P and Q near orthonormal", _orthogonality,
              lambda f: f < 0.3, "γ = 0"),
    ]  # fmt: skip
