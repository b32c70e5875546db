from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.core.attach import slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import Parameterization, positive_rank
from omnilora.core.site import Site
from omnilora.parameterizations.lora import LoRA
from omnilora.rules.pruning import PruneA

CARD = Card(
    key="prilora",
    title="PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation",
    section="foundations",
    kind="schedule",
    equation=r"r_\ell = r_s + (r_f - r_s)\tfrac{\ell - 1}{N - 1},\quad S_{kj} = |A_{kj}|\,\bar x_j,\quad "
    r"A_{kj} \leftarrow 0 \text{ for the lowest } S",
    purpose="Ranks grow linearly from the first block to the last, and half of every row of A is pruned again and again.",
    arxiv="2401.11316",
    venue="Findings of EACL 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r_start": 4, "r_end": 12, "every": 40, "share": 0.5, "beta": 0.9},
    cases=({"r_start": 3, "r_end": 3, "alpha": 5.0, "every": 4},),
    differs=("There is no public code. Each row keeps the same density (group='row'), the group of the score it borrows.",),
    limits=(
        "Interval, share, β and the scale α/r of each block are not in the abstract and its review; the values are ours.",
        "The block of a site is the first number in its path. Embeddings and read weights are not pruned.",
    ),
)


def prilora(r_start: int = 4, r_end: int = 12, alpha: float = 16.0, dropout: float = 0.0, every: int = 40,
            share: float = 0.5, beta: float = 0.9, group: str = "row") -> Method:  # fmt: skip
    """``r_start``, ``r_end``: ranks of the first and the last block; the budget is their mean."""
    positive_rank(r_start, "r_start")
    positive_rank(r_end, "r_end")

    def arrange(sites: Sequence[Site], how: Parameterization) -> list[Parameterization | None]:
        ranks = growing(sites, r_start, r_end)
        return [dataclasses.replace(how, r=r) for r in ranks]  # type: ignore[call-arg]

    return Method("prilora", LoRA(r_end, alpha, dropout), (PruneA(every, share, beta, group),), arrange=arrange)


def growing(sites: Sequence[Site], first: int, last: int) -> list[int]:
    """The rank of every site: linear in the place of its block among all blocks, rounded to the nearest integer."""
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", s.name) for s in sites]
    blocks = [int(m[1]) if m else 0 for m in found]
    order = {b: k for k, b in enumerate(sorted(set(blocks)))}
    steps = max(len(order) - 1, 1)
    return [int(first + (last - first) * order[b] / steps + 0.5) for b in blocks]


def _ranks(broken: bool) -> float:
    """Sum of ranks of twelve blocks, 4 → 12; eight each is 96 (broken: a constant rank of the first block)."""
    model = proofs.Stack(*[16] * 13)
    proofs.train(model, prilora(alpha=8.0, r_end=4 if broken else 12), proofs.full_batch(torch.randn(8, 16), torch.randn(8, 16)), 1)
    ranks = [s.how.rank() for s in slots(model)]
    assert broken or ranks == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    return float(sum(ranks))


class _Scaled(nn.Module):
    """A linear layer whose inputs 0 … 3 are a hundred times larger than the others."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.layer, self.size = nn.Linear(16, 16), torch.ones(16) if same else torch.cat((torch.full((4,), 100.0), torch.ones(12)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.size)


def _survivors(broken: bool) -> float:
    """Share of the entries of A on the four large inputs that survive pruning of half of every row (broken: equal inputs,
    so that magnitude alone decides)."""
    model = _Scaled(same=broken)
    proofs.train(model, prilora(4, 4, alpha=4.0, every=1), proofs.full_batch(torch.randn(64, 16), torch.randn(64, 16)), 5, lr=1e-3)
    A = slots(model)[0].A
    assert bool(((A == 0).sum(-1) == 8).all())
    return float((A[:, :4] != 0).float().mean())


def claims() -> list[Claim]:
    return [
        Claim("ranks increase within the budget", "4 → 12 over twelve blocks sums to 12 · 8", _ranks, lambda f: f == 96,
              "the rank of the first block everywhere"),
        Claim("inputs decide", "entries of A on large inputs survive, whatever their size", _survivors, lambda f: f == 1,
              "all inputs of one size"),
    ]  # fmt: skip
