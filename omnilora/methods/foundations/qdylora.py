from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import context
from omnilora.core.method import Card, Claim, Method
from omnilora.methods.foundations.dylora import dylora
from omnilora.methods.foundations.qlora import qlora

CARD = Card(
    key="qdylora",
    title="QDyLoRA: Quantized Dynamic Low-Rank Adaptation for Efficient Large Language Model Tuning",
    section="foundations",
    kind="schedule",
    equation=r"y = x\,\mathrm{dq}(\hat W)^\top + b + \tfrac{\alpha}{b}\,(x A_{:b}^\top) B_{:,:b}^\top,\quad b \sim p",
    purpose="DyLoRA's nested ranks over QLoRA's 4-bit base: one training on one device serves every rank up to r.",
    arxiv="2402.10462",
    venue="EMNLP 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "quantized", "trains_lm", "rows"}),
    defaults={"r": 64, "alpha": 16.0, "dropout": 0.0, "quant_type": "nf4", "double": True, "law": "uniform"},
    cases=({"r": 3, "alpha": 5.0},),
    differs=(
        "There is no code. The composition of QLoRA's base with DyLoRA's form and rule; the law of the ranks is a choice.",
        "Whether the paper freezes earlier directions is unverified; only_last follows DyLoRA.",
    ),
    limits=("All published figures are unverified: only the abstract and summaries could be read.",),
)


def qdylora(r: int = 64, alpha: float = 16.0, dropout: float = 0.0, low: int = 1, law: str = "uniform",
            only_last: bool = True, scale: str = "alpha/b", use: int | None = None, quant_type: str = "nf4",
            double: bool = True, blocksize: int = 64, paged: bool = False) -> Method:  # fmt: skip
    """DyLoRA over a base that ``ol.adapt`` quantizes first. ``use``, ``low``, ``law``: as in dylora."""
    base = qlora(r, alpha, dropout, quant_type, double, blocksize, paged)
    nested = dylora(r, alpha, dropout, low, law, only_last, scale, use)
    return Method("qdylora", nested.parameterization, nested.rules, store=base.store, optimizer=base.optimizer)


def _nested(broken: bool) -> float:
    """Largest excess of a prefix's error over the best of its rank, in ‖target‖, on a 4-bit base (broken: QLoRA, truncated)."""
    model = proofs.Stack(24, 24)
    x = torch.eye(24)
    made = qdylora(r=6, alpha=6.0, scale="constant", only_last=False)
    made = Method("x", made.parameterization, () if broken else made.rules, store=made.store)
    target = proofs.planted(24, 24, 6)
    assert made.store is not None
    made.store(model, [])
    y = (model(x) + x @ target.mT).detach()
    proofs.train(model, made, proofs.full_batch(x, y), 3000, lr=8e-3, loss=lambda a, b: (a - b).square().sum())
    sigma = torch.linalg.svdvals(target).square()
    worst = 0.0
    for b in range(1, 7):
        with torch.no_grad(), context(model, rank=b):
            best = float((sigma[b:].sum() / sigma.sum()).sqrt())
            worst = max(worst, proofs.relative(model(x) - y + x @ target.mT, x @ target.mT) - best)
    return worst


def _equals(broken: bool) -> float:
    """Gap to qlora after 50 steps where r_min = r_max (broken: ranks drawn from 1 … r)."""
    x = torch.randn(64, 24)
    y = x @ proofs.planted(24, 24, 4).mT
    ends = []
    for made in (qlora(r=4, alpha=6.0), qdylora(r=4, alpha=6.0, low=1 if broken else 4, only_last=False)):
        torch.manual_seed(1)
        model = proofs.Stack(24, 24)
        proofs.train(model, made, proofs.full_batch(x, y), 50)
        ends.append(model(x).detach())
    return proofs.relative(ends[1], ends[0])


def claims() -> list[Claim]:
    return [
        Claim("every prefix works over 4 bits", "each prefix is near the best matrix of its rank", _nested,
              lambda f: f < 0.05, "QLoRA of rank 6, truncated"),
        Claim("equals QLoRA at one rank", "with r_min = r_max the run is QLoRA's", _equals, lambda f: f < 1e-6,
              "ranks drawn from 1 … r"),
    ]  # fmt: skip
