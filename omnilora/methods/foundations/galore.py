from __future__ import annotations

import torch
from torch import nn

from omnilora import proofs
from omnilora.core.full import Full
from omnilora.core.method import Card, Claim, Method
from omnilora.core.targets import Targets
from omnilora.optim.galore import GaLoreAdamW
from omnilora.rules.own_optimizer import OwnOptimizer

CARD = Card(
    key="galore",
    title="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    section="foundations",
    kind="optimizer",
    equation=r"W_{t+1} = W_t - \eta\,\kappa\, P\, \mathrm{Adam}(P^\top G_t),\quad P = \text{top } r \text{ singular vectors of } G",
    purpose="Trains whole weights, but Adam's moments live in a rank-r subspace of the gradient, renewed every T steps.",
    arxiv="2403.03507",
    venue="ICML 2024",
    tags=frozenset({"zero_at_init", "mergeable", "scheduled", "trains_lm", "rows"}),
    defaults={"rank": 128, "gap": 200, "scale": 0.25, "train_rest": False},
    cases=({"rank": 2, "gap": 4},),
    agreement=(
        "Official AdamW with GaLoreProjector (std), 30 updates of a 12 × 8 and an 8 × 12 weight in fp64: within 5e-7, the "
        "rounding of its fp32 SVD.",
    ),
    differs=(
        "Weights train as the adapter's own copies, so that the base stays as it is and the result is a file to switch.",
        "The side of the projection follows the shape of W and is fixed; the official code infers it from the small tensor.",
        "Moments are not rotated to a new basis, as in the official code.",
    ),
    limits=(
        "Own copies cost one fp32 weight each on top of the base; the saving is in optimizer states.",
        "One optimizer for all tensors: the per-layer hook mode and 8-bit states are not offered.",
        "Only matrices are projected (no Tucker form for convolutions).",
    ),
)


def galore(rank: int = 128, gap: int = 200, scale: float = 0.25, train_rest: bool = False) -> Method:
    """``gap``: steps between two bases; ``train_rest``: embeddings, norms and head train too, with plain Adam."""
    targets = Targets(unfreeze=("embedding", "norm", "head")) if train_rest else None
    return Method("galore", Full(), (OwnOptimizer(GaLoreAdamW, rank=rank, gap=gap, scale=scale),), targets)


def _refresh(broken: bool) -> float:
    """Relative error of W → T, a random 24 × 24 matrix, with r = 4 and a basis every 20 steps (broken: never renewed)."""
    target, model = torch.randn(24, 24), nn.Linear(24, 24, bias=False)
    nn.init.zeros_(model.weight)
    opt = GaLoreAdamW(model.parameters(), lr=0.05, rank=4, gap=10**9 if broken else 20, scale=1.0)
    slower = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1 - t / 3000)
    for _ in range(3000):
        opt.zero_grad()
        (model.weight - target).square().mean().backward()
        opt.step()
        slower.step()
    return proofs.relative(model.weight.detach(), target)


def _states(broken: bool) -> float:
    """Numbers in the optimizer's state of a 256 × 64 weight at rank 8 over Adam's (broken: rank 64, not projected)."""
    model, x = proofs.Stack(64, 256), torch.randn(32, 64)
    run = proofs.train(model, galore(rank=64 if broken else 8), proofs.full_batch(x, torch.randn(32, 256)), 2)
    assert run.optimizer is not None
    held = sum(t.numel() for s in run.optimizer.state.values() for t in s.values() if t.dim())
    return held / (2 * 64 * 256)


def claims() -> list[Claim]:
    return [
        Claim("renewed subspaces", "rank-4 steps reach a full-rank target when the basis is renewed", _refresh,
              lambda f: f < 1e-4, "one basis for good: the best rank-4 error is the floor"),
        Claim("state size", "2·r·max(m, n) + r·min(m, n) numbers in place of 2·m·n", _states,
              lambda f: abs(f - (2 * 8 * 256 + 8 * 64) / (2 * 64 * 256)) < 1e-6, "a rank of the full side"),
    ]  # fmt: skip
