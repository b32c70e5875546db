from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.full import Full
from omnilora.core.method import Card, Claim, Method
from omnilora.core.targets import Targets
from omnilora.optim.flora import FloraAdafactor, down, up
from omnilora.rules.accumulation import CompressedAccumulation

CARD = Card(
    key="flora_opt",
    title="FLORA: Low-Rank Adapters Are Secretly Gradient Compressors",
    section="foundations",
    kind="optimizer",
    equation=r"C \leftarrow \beta C + (1-\beta)\, u P^\top,\quad W \leftarrow W - \eta\,[(1-\beta) u + \beta\, C P],\quad "
    r"P_{ij} \sim \mathcal N(0, 1/r) \text{ drawn anew every } \kappa \text{ steps}",
    purpose="Trains whole weights; momentum and accumulated gradients are compressed by random projections from seeds.",
    arxiv="2402.03293",
    venue="ICML 2024",
    tags=frozenset({"zero_at_init", "mergeable", "scheduled", "trains_lm", "rows"}),
    defaults={"rank": 128, "gap": 1000, "beta": 0.9, "accumulation": False, "query": "exact"},
    cases=({"rank": 2, "gap": 4}, {"rank": 2, "gap": 3, "accumulation": True, "query": "paper"}),
    agreement=("Official torch optimizer, 23 updates with four projections (its seeds in place of ours), fp64: within 5e-16.",),
    differs=(
        "The momentum that is read is the exact current update plus the decompressed old state, as the official torch code; "
        "query='paper' reads the state that already holds the current one.",
        "At a new seed the state is projected with the new projection; the official JAX code projects with the old one.",
        "Weights train as the adapter's own copies, so that the base stays as it is.",
    ),
    limits=(
        "States are kept in fp32, not in 8-bit blocks. A saved run holds seeds, not projections.",
        "With accumulation the trainer's clipping does not see compressed gradients; Adafactor clips its own updates.",
        "The rate is relative to the size of each weight, so that LoRA's default rate is far too low or high: give lr.",
    ),
)  # fmt: skip


def flora_opt(rank: int = 128, gap: int = 1000, beta: float = 0.9, accumulation: bool = False, query: str = "exact",
              train_rest: bool = False) -> Method:  # fmt: skip
    """``gap``: κ, updates between two projections; ``accumulation``: compress the gradients of micro-batches too;
    ``train_rest``: embeddings, norms and head train as well."""
    targets = Targets(unfreeze=("embedding", "norm", "head")) if train_rest else None
    rule = CompressedAccumulation(FloraAdafactor, rank, accumulation, gap=gap, beta=beta, query=query)
    return Method("flora_opt", Full(), (rule,), targets, rate=3.0)


def _unbiased(broken: bool) -> float:
    """Relative error of the mean of 4000 estimates of one 20 × 30 matrix at r = 8; √((m + 1)/(r K)) is 0.0256
    (broken: one seed for all)."""
    G, mean = torch.randn(20, 30), torch.zeros(20, 30)
    for k in range(4000):
        seed = 0 if broken else k
        mean += up(down(G, seed, 8), seed, G.shape) / 4000
    return proofs.relative(mean, G)


def _rank(broken: bool) -> float:
    """Numerical rank of the change of a 16 × 16 weight after 8 compressed accumulations at rank 2 (broken: one seed for
    all, as LoRA with a frozen A)."""
    model = proofs.Stack(16, 16)
    method = flora_opt(rank=2, accumulation=True, beta=0.0)
    if broken:
        (rule,) = method.rules
        rule.after_step = lambda run: None  # type: ignore[method-assign]

    def plain(params: object, **_: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)  # type: ignore[arg-type]

    method.rules[0].cls, method.rules[0].options = plain, {}  # type: ignore[attr-defined]
    proofs.train(model, method, lambda step: (torch.randn(64, 16), torch.randn(64, 16)), 8)
    sigma = torch.linalg.svdvals(proofs.learned(model))
    return float((sigma > 1e-5 * sigma[0]).sum())


def _states(broken: bool) -> float:
    """Numbers of first moment kept for a 96 × 64 weight at rank 8 over m · n (broken: rank above the sides, so dense)."""
    model = proofs.Stack(64, 96)
    run = proofs.train(model, flora_opt(rank=65 if broken else 8), proofs.full_batch(torch.randn(4, 64), torch.randn(4, 96)), 2)
    assert run.optimizer is not None
    held = [v for s in run.optimizer.state.values() for k, v in s.items() if k in ("C", "mean")]
    return sum(t.numel() for t in held) / (96 * 64)


def claims() -> list[Claim]:
    return [
        Claim("unbiased", "the mean over seeds is the gradient, with the predicted variance", _unbiased,
              lambda f: abs(f - 0.0256) < 0.004, "one projection for all"),
        Claim("high rank from new seeds", "eight updates of rank 2 change a weight by full rank", _rank, lambda f: f == 16,
              "one projection for all: rank 2"),
        Claim("state size", "r · max(m, n) numbers in place of m · n", _states, lambda f: abs(f - 8 / 64) < 1e-9,
              "an uncompressed moment"),
    ]  # fmt: skip
