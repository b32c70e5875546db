from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import slots
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.gated import GatedLoRA
from omnilora.rules.proximal import Proximal, shrink

CARD = Card(
    key="sora",
    title="SoRA: Sparse Low-rank Adaptation of Pre-trained Language Models",
    section="foundations",
    kind="schedule",
    equation=r"W' = W + \tfrac{\alpha}{r} B\,\mathrm{diag}(g)\,A,\quad g \leftarrow \mathrm{sign}(g)\max(|g| - \xi, 0)",
    purpose="A gate for each rank, driven to exact zeros by a proximal step: every matrix finds its own rank.",
    arxiv="2311.11696",
    venue="EMNLP 2023",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 16.0, "xi": 3e-4, "times_lr": False},
    cases=({"r": 4, "alpha": 5.0, "xi": 1e-3},),
    agreement=(
        "Official LowRankLinear, fp64: outputs and all gradients within 2e-15.",
        "Official SparseAdamW (both files) on the gates beside AdamW, 200 updates, eps = 0, fp64: with the double threshold in place "
        "of ours within 2e-16; with ours the same until a gate falls below 2ξ, and the same number of zeros at the end.",
    ),
    differs=(
        "The official threshold shrinks first and then zeroes what is below ξ again, so that |g| < 2ξ vanishes; this is "
        "the proximal map of the paper.",
        "ξ is a constant by default; times_lr multiplies it by the learning rate (the paper's form, one of two files).",
        "The L1 term that the official code adds to the loss as well is left out: it would shrink twice.",
    ),
    limits=(
        "Pruning needs weight decay on A and B (0.1 in the paper), or a gate hides behind growing factors.",
        "The schedule of rising ξ is a sequence of runs: start each from the state of the last.",
    ),
)


def sora(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, xi: float = 3e-4, times_lr: bool = False,
         cut: bool = False) -> Method:  # fmt: skip
    """``cut``: ranks with a zero gate are cut out of the tensors at the end of training."""
    return Method("sora", GatedLoRA(r, alpha, dropout), (Proximal(xi, times_lr, cut),))


def _gates(broken: bool) -> float:
    """Gates that stay open on a target of rank 2, of 8 (broken: the proximal step never runs)."""
    model, target = proofs.Stack(16, 16), proofs.planted(16, 16, 2)
    x = torch.randn(256, 16)
    y = (model(x) + x @ target.mT).detach()

    def adamw(params: object, lr: float) -> torch.optim.Optimizer:
        for group in params:  # type: ignore[attr-defined]
            group["weight_decay"] = 0.0 if group["name"] == "gate" else 0.1
        return torch.optim.AdamW(params, lr=lr)  # type: ignore[arg-type]

    proofs.train(model, sora(r=8, alpha=8.0, xi=2e-3), proofs.full_batch(x, y), 3000, lr=1e-2, ticks=not broken,
                 optimizer=adamw)  # type: ignore[arg-type]  # fmt: skip
    return float((slots(model)[0].g != 0).sum())


def _threshold(broken: bool) -> float:
    """Largest error of the step on [0.5, 1.2, 1.5, 2.1, −2.5]·ξ (broken: the official double threshold)."""
    g, want = torch.tensor([0.5, 1.2, 1.5, 2.1, -2.5]), torch.tensor([0.0, 0.2, 0.5, 1.1, -1.5])
    done = shrink(g, 1.0)
    if broken:
        done = torch.where(done.abs() < 1.0, 0.0, done)
    return float((done - want).abs().max())


def claims() -> list[Claim]:
    return [
        Claim("rank is found", "of eight gates two stay open on a target of rank 2", _gates, lambda f: f == 2,
              "the proximal step never runs"),
        Claim("soft threshold", "the step is the proximal map of ξ‖g‖₁", _threshold, lambda f: f < 1e-6,
              "the official code's double threshold"),
    ]  # fmt: skip
