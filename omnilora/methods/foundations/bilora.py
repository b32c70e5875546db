from __future__ import annotations

import itertools

import torch

from omnilora import proofs
from omnilora.core.attach import slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import Run
from omnilora.parameterizations.simplex import SimplexSVD
from omnilora.rules.bilevel import Bilevel, hypergradient

CARD = Card(
    key="bilora",
    title="BiLoRA: A Bi-level Optimization Framework for Overfitting-Resilient Low-Rank Adaptation",
    section="foundations",
    kind="procedure",
    equation=r"\min_a L(V^*(a), a; D_2),\quad V^*(a) = \arg\min_V L(V, a; D_1) + \gamma \sum \|P^\top P - I\|^2 + \|Q Q^\top - I\|^2,"
    r"\quad W' = W + s P \,\mathrm{diag}(\lambda(a))\, Q",
    purpose="Singular vectors learn on one part of the data, singular values on another by hypergradient: less overfitting.",
    arxiv="2403.13037",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r": 8, "form": "softmax", "share": 0.2, "lower": 1, "upper": 1, "gamma": 0.1},
    cases=({"r": 4, "alpha": 5.0}, {"r": 3, "form": "real", "second_order": False}, {"r": 3, "form": "binary", "binary": 0.1}),
    differs=(
        "There is no official code, and the solver is not specified: one unrolled step with a finite difference, as the "
        "group's follow-up has it.",
        "λ = r · softmax(a), so that it starts at 1 as in LoRA; plain=True is the paper's softmax.",
    ),
    limits=(
        "Lower and upper updates both count as updates of the run. One process only. With dropout the finite difference "
        "compares two draws.",
        "The penalty of the binary form is the entropy; its exact form is not in the sources that were read.",
    ),
)


def bilora(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, form: str = "softmax", share: float = 0.2, lower: int = 1,
           upper: int = 1, gamma: float = 0.1, binary: float = 0.0, second_order: bool = True, plain: bool = False) -> Method:  # fmt: skip
    """``form``: of λ: "softmax", "real" or "binary"; ``share``: of the data for the upper level; ``lower``, ``upper``:
    updates of each level in turn; ``gamma``, ``binary``: weights of the two regularizers."""
    rule = Bilevel(lower, upper, share, gamma, binary, second_order)
    return Method("bilora", SimplexSVD(r, alpha, dropout, form, plain), (rule,))


def _overfit(broken: bool) -> float:
    """Test error of a rank-8 student of a rank-2 teacher, 40 rows with label noise 0.5 (broken: joint training on all 40)."""
    g, found = torch.Generator().manual_seed(0), []
    for seed in range(2):
        model, target = proofs.Stack(16, 16), proofs.planted(16, 16, 2, seed=seed)
        x, new = torch.randn(40, 16, generator=g), torch.randn(512, 16, generator=g)
        y = (model(x) + x @ target.mT).detach() + 0.5 * torch.randn(40, 16, generator=g)
        want = (model(new) + new @ target.mT).detach()
        how = bilora(r=8, alpha=8.0, gamma=0.0)
        if broken:
            proofs.train(model, how, proofs.full_batch(x, y), 750, lr=1e-2, ticks=False)
        else:
            proofs.train(model, how, proofs.full_batch(x[:32], y[:32]), 1500, lr=1e-2, other=[(x[32:], y[32:])])
        found.append(float((model(new) - want).square().mean().detach()))
    return sum(found) / len(found)


def _finite_difference(broken: bool) -> float:
    """Relative error of h on L₁ = ½‖v − λc‖², L₂ = ½‖v − d‖², where h = (v′ − d)·ξc (broken: ξ = 0)."""
    v, c, d = (torch.randn(9, dtype=torch.float64) for _ in range(3))
    v, lam, xi = v.requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True), 0.1

    def lower() -> torch.Tensor:
        return 0.5 * (v - lam * c).square().sum()

    want = ((v.detach() - xi * (v.detach() - lam.detach() * c) - d) @ (xi * c)).detach()
    h, _ = hypergradient([v], [lam], lower, lambda: 0.5 * (v - d).square().sum(), 0.0 if broken else xi)
    return proofs.relative(h[0], want)


def _separate(broken: bool) -> float:
    """Updates in which both levels move, of 20 (broken: one level for both)."""
    model, moved = proofs.Stack(8, 8), []
    x, y = torch.randn(16, 8), torch.randn(16, 8)
    before: list[torch.Tensor] = []

    def watch(run: Run) -> None:
        (s,) = slots(model)
        now = [s.P.detach().clone(), s.a.detach().clone()]
        if before:
            moved.append(all(not torch.equal(p, q) for p, q in zip(now, before)))
        before[:] = now

    how = bilora(r=2, alpha=2.0)
    proofs.train(model, how, proofs.full_batch(x, y), 21, other=itertools.repeat((x, y), 100), ticks=not broken, watch=watch,
                 optimizer=torch.optim.SGD)  # fmt: skip
    return float(sum(moved))


def claims() -> list[Claim]:
    return [
        Claim("overfitting-resilient", "values learnt on data of their own generalize better from 40 noisy rows", _overfit,
              lambda f: f < 0.1, "all tensors learn jointly on all rows"),
        Claim("hypergradient", "the finite difference is exact for quadratic losses", _finite_difference, lambda f: f < 1e-9,
              "the first-order gradient"),
        Claim("two levels", "an update moves the vectors or the values, never both", _separate, lambda f: f == 0,
              "one level for both"),
    ]  # fmt: skip
