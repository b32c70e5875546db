from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import Run
from omnilora.parameterizations.accumulated import Accumulated
from omnilora.parameterizations.lora import LoRA
from omnilora.rules.folding import Chain

CARD = Card(
    key="cola",
    title="Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning",
    section="foundations",
    kind="schedule",
    equation=r"W' = W + \sum_{m=1}^{M} s\, B_m A_m,\quad \text{link } m \text{ learns after links } 1 \dots m-1 \text{ are folded}",
    purpose="LoRA in M links: tune, fold, start a fresh LoRA with a fresh optimizer on the residual.",
    arxiv="2401.04151",
    tags=frozenset({"zero_at_init", "mergeable", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"links": 3, "r": 8, "alpha": 16.0},
    cases=({"links": 3, "r": 2, "alpha": 3.0},),
    differs=("Links are folded into the adapter's own accumulator; the base is not written to.",),
    limits=(
        "There is no official code; abstracts are the source. The learning-rate schedule goes on across knots.",
        "The accumulator is one dense fp32 matrix a site; all links have one rank.",
    ),
)


def cola(links: int = 3, r: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> Method:
    """``links``: M, of equal length in updates."""
    return Method("cola", Accumulated(LoRA(r, alpha, dropout)), (Chain(links),))


def _chain(broken: bool, watch: list[torch.Tensor] | None = None) -> float:
    """Error on a target of singular values 8 6 5 4 3 2 1.5 1 after four links of rank 2 (broken: knots never tick)."""
    model = proofs.Stack(16, 16)
    u, v = torch.linalg.qr(torch.randn(16, 8)).Q, torch.linalg.qr(torch.randn(16, 8)).Q
    target = (u * torch.tensor([8, 6, 5, 4, 3, 2, 1.5, 1])) @ v.mT
    x = torch.eye(16) * 4
    y = (model(x) + x @ target.mT).detach()

    def look(run: Run) -> None:
        if watch is not None:
            watch.append(model(x).detach())

    proofs.train(model, cola(links=4, r=2, alpha=2.0), proofs.full_batch(x, y), 4000, lr=2e-2, ticks=not broken, watch=look)
    return proofs.relative(proofs.learned(model), target)


def _recovers(broken: bool) -> float:
    """Error after four links of rank 2 on a rank-8 target (broken: knots never tick)."""
    return _chain(broken)


def _continuous(broken: bool) -> float:
    """Largest relative change of the outputs over the update at a knot (broken: what was folded does not count)."""
    seen: list[torch.Tensor] = []
    fold = Accumulated.delta
    if broken:
        Accumulated.delta = lambda self, p, ctx: self.inner.delta(p.inner, ctx)  # type: ignore[method-assign]
    try:
        _chain(False, seen)
    finally:
        Accumulated.delta = fold  # type: ignore[method-assign]
    return max(proofs.relative(seen[k], seen[k - 1]) for k in (999, 1999, 2999))


def claims() -> list[Claim]:
    return [
        Claim("rank recovery", "four links of rank 2 reach a target of rank 8; one LoRA stays at 0.603", _recovers,
              lambda f: f < 1e-2, "knots never tick"),
        Claim("continuity", "outputs do not jump where a link is folded", _continuous, lambda f: f < 0.05,
              "links are dropped instead of folded"),
    ]  # fmt: skip
