from __future__ import annotations

import torch
from torch import nn

from omnilora import proofs
from omnilora.core.attach import slots
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.heads import Heads
from omnilora.parameterizations.lora import LoRA
from omnilora.rules.parallel_heads import ParallelHeads, product

CARD = Card(
    key="lte",
    title="Training Neural Networks from Scratch with Parallel Low-Rank Adapters",
    section="foundations",
    kind="schedule",
    equation=r"W_h = \bar W + s (B_h A_h - \hat B_h \hat A_h),\quad "
    r"\bar W \leftarrow \bar W + \tfrac{s}{H} \sum_h (B_h A_h - \hat B_h \hat A_h),\; \hat A \leftarrow A,\; \hat B \leftarrow B",
    purpose="H LoRA heads learn on H shards of the data and are averaged into the weight every T updates: pre-training too.",
    arxiv="2402.16828",
    tags=frozenset({"zero_at_init", "mergeable", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"heads": 32, "r": 32, "alpha": 4096.0, "every": 10},
    cases=({"heads": 2, "r": 2, "alpha": 3.0, "every": 4},),
    agreement=(
        "Official ddp layer, three heads, twelve updates of Adam with three merges, fp64: outputs, gradients, merged weight and "
        "evaluation within 1e-15.",
    ),
    differs=(
        "The map outside training is the merge of the heads as they are, so that nothing is lost between two merges; the "
        "official code evaluates the weight of the last merge.",
        "The average lies in the adapter's own accumulator; the base is not written to.",
        "The official copies of the weight for each head (dmp) are not made: one weight and snapshots, as its ddp form.",
    ),
    limits=(
        "Layers that are not targets stay frozen or train as shared own copies; the official replicas of such layers, one "
        "for each head, are not offered.",
        "α = 4096 is for training from scratch; the default here is smaller. Batches must divide by the number of heads.",
        "In several processes a checkpoint holds the other processes' heads as of the last merge, and the optimizer's "
        "states of the first process.",
    ),
)


def lte(heads: int = 4, r: int = 8, alpha: float = 64.0, dropout: float = 0.0, every: int = 10) -> Method:
    """``every``: T, updates between two merges. Started by ``accelerate launch`` each process owns its share of heads."""
    return Method("lte", Heads(r, alpha, dropout, heads), (ParallelHeads(heads, every),))


def _from_scratch(broken: bool) -> float:
    """Loss of a random 24 → 24 → 24 network on a teacher, each linear layer frozen but for the adapter of rank 2
    (broken: one LoRA of rank 2)."""
    g = torch.Generator().manual_seed(2)
    teacher, model = proofs.Stack(24, 24, 24, act=torch.tanh), proofs.Stack(24, 24, 24, act=torch.tanh)
    x = torch.randn(256, 24, generator=g)
    y = teacher(x).detach()
    how = Method("lora", LoRA(2, 16.0)) if broken else lte(heads=8, r=2, alpha=16.0, every=10)
    proofs.train(model, how, proofs.full_batch(x, y), 600, lr=3e-3)
    return float((model(x) - y).square().mean().detach() / y.square().mean())


def _meet(broken: bool) -> float:
    """Largest distance, relative to W', between the weights of the heads right after the third merge (broken: never merged)."""
    model = proofs.Stack(12, 10)
    x, y = torch.randn(32, 12), torch.randn(32, 10)
    how = lte(heads=4, r=2, alpha=4.0, every=10**9 if broken else 5)
    if broken:
        how.rules[0].merge = lambda slot: None  # type: ignore[attr-defined]
    proofs.train(model, how, proofs.full_batch(x, y), 15, lr=1e-2)
    (s,) = slots(model)
    gaps = [s.B[:, h : h + 2] @ s.A[h : h + 2] - s.B_hat[:, h : h + 2] @ s.A_hat[h : h + 2] for h in range(0, 8, 2)]
    assert product(s).shape == (10, 12)
    return float(torch.stack([g.norm() for g in gaps]).max().detach() / nn.Module.get_parameter(s, "acc").norm().clamp_min(1e-9))


def _rank(broken: bool) -> float:
    """Numerical rank of W' − W after four merges of two heads of rank 1 that see different targets (broken: one head)."""
    model = proofs.Stack(16, 16)
    how = lte(heads=1 if broken else 2, r=1, alpha=4.0, every=25)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(step)
        x = torch.randn(64, 16, generator=g)
        return x, x @ proofs.planted(16, 16, 16, scale=2.0).mT

    proofs.train(model, how, batch, 100, lr=5e-2)
    sigma = torch.linalg.svdvals(proofs.learned(model))
    return float((sigma > 1e-3 * sigma[0]).sum())


def claims() -> list[Claim]:
    return [
        Claim("from scratch", "eight heads of rank 2 train a random network where one LoRA of rank 2 cannot", _from_scratch,
              lambda f: f < 0.3, "one LoRA of the same rank"),
        Claim("heads meet", "right after a merge every head's weight is the merged weight", _meet, lambda f: f < 1e-6,
              "no merges"),
        Claim("rank of the average", "the change has the heads' ranks together, not one head's", _rank, lambda f: f > 1,
              "one head"),
    ]  # fmt: skip
