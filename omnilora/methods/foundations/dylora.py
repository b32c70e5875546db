from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, context, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.prefix import PrefixLoRA
from omnilora.rules.prefix import DrawRank

CARD = Card(
    key="dylora",
    title="DyLoRA: Parameter Efficient Tuning using Dynamic Search-Free Low-Rank Adaptation",
    section="foundations",
    kind="schedule",
    equation=r"W' = W + \frac{\alpha}{b} B_{:,:b} A_{:b},\quad b \sim \mathcal U\{1..r\} \text{ at each update}",
    purpose="A random prefix rank at each update, so that one training gives a working adapter at every rank ≤ r.",
    arxiv="2210.07558",
    venue="EACL 2023",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 16.0, "only_last": True, "scale": "alpha/b"},
    cases=({"r": 3, "alpha": 5.0}, {"r": 3, "alpha": 4.0, "use": 2, "scale": "constant", "only_last": False}),
    agreement=(
        "Official loralib Linear, every rank of five, frozen and not, training and evaluation, fp64: outputs and gradients within "
        "2e-14; 60 updates of Adam with drawn ranks: within 7e-16.",
    ),
    differs=(
        "only_last stops the gradient of the earlier directions; with momentum they still drift by stale moments, as in "
        "the official code.",
        "With α/b no set of prefixes can fit one target at all ranks (they are rescaled copies); scale='constant' can.",
        "The official layer puts √(r/b) on each factor; the product is the same.",
    ),
)


def dylora(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, low: int = 1, law: str = "uniform",
           only_last: bool = True, scale: str = "alpha/b", use: int | None = None) -> Method:  # fmt: skip
    """``use``: the rank of forwards that name none (ol.context(model, rank=b) does); training draws low … r."""
    how = PrefixLoRA(r, alpha, dropout, use=use, only_last=only_last, scale=scale)
    return Method("dylora", how, (DrawRank(low, r, law),))


def _nested(broken: bool) -> float:
    """Largest excess of a prefix's relative error over the best of its rank, b = 1 … 8 (broken: LoRA, truncated)."""
    model = proofs.Stack(24, 24)
    target = proofs.planted(24, 24, 8)
    x = torch.eye(24)
    y = (model(x) + x @ target.mT).detach()
    how = dylora(r=8, alpha=8.0, scale="constant", only_last=False)
    if broken:
        how = Method("x", PrefixLoRA(8, 8.0, scale="constant", only_last=False))
    proofs.train(model, how, proofs.full_batch(x, y), 8000, lr=4e-3,
                 loss=lambda a, b: (a - b).square().sum())  # fmt: skip
    s = torch.linalg.svdvals(target).square()
    worst = 0.0
    for b in range(1, 9):
        with torch.no_grad(), context(model, rank=b):
            best = float((s[b:].sum() / s.sum()).sqrt())
            worst = max(worst, proofs.relative(model(x) - y + x @ target.mT, x @ target.mT) - best)
    return worst


def _last_only(broken: bool) -> float:
    """Rows of A with a gradient, over updates with drawn ranks (broken: the whole prefix learns)."""
    model, x = proofs.Stack(12, 12), torch.randn(32, 12)
    adapt(model, Method("x", PrefixLoRA(6, 6.0, only_last=not broken)))
    (s,) = slots(model)
    with torch.no_grad():
        s.B.normal_()
    model.train()
    worst = 0
    for b in (1, 3, 6):
        model.zero_grad()
        with context(model, rank=b):
            model(x).square().sum().backward()
        worst = max(worst, int((s.A.grad.abs().sum(1) > 0).sum()))
    return float(worst)


def claims() -> list[Claim]:
    return [
        Claim("every prefix works", "each prefix is near the best matrix of its rank", _nested, lambda f: f < 0.05,
              "plain LoRA of rank 8, truncated"),
        Claim("only direction b learns", "of the drawn prefix only the last direction gets a gradient", _last_only,
              lambda f: f == 1, "only_last off"),
    ]  # fmt: skip
