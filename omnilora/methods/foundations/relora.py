from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.method import Card, Claim, Method
from omnilora.core.targets import Targets
from omnilora.parameterizations.accumulated import Accumulated
from omnilora.parameterizations.lora import LoRA
from omnilora.rules.restart import Restart

CARD = Card(
    key="relora",
    title="ReLoRA: High-Rank Training Through Low-Rank Updates",
    section="foundations",
    kind="schedule",
    equation=r"W' = W + \Delta_{acc} + \frac{\alpha}{r} B A;\quad "
    r"\text{every } K:\ \Delta_{acc} \mathrel{+}= \tfrac{\alpha}{r} BA,\ A \sim \text{Kaiming},\ B = 0",
    purpose="LoRA that is folded and redrawn every K updates, with optimizer surgery and a re-warm-up: high-rank training.",
    arxiv="2307.05695",
    venue="ICLR 2024",
    tags=frozenset({"zero_at_init", "mergeable", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r": 128, "alpha": 32.0, "dropout": 0.1, "every": 1000, "warmup": 100, "reset": "magnitude", "prune": 0.9},
    cases=({"r": 2, "alpha": 3.0, "dropout": 0.0, "every": 4, "warmup": 2},),
    agreement=(
        "Official ReLoRaLinear with merge_and_reinit, optimizer_reset (magnitude 0.9 and 0.83) and the jagged cosine, 60 updates of "
        "AdamW with three and four restarts, three shapes, fp64, same draws of A: weights within 4e-15 when the ramp's top is theirs.",
        "Rates of a whole run (20,000 updates, restarts every 1,000 and every 5,000): equal outside the ramps; on a ramp within "
        "2e-3 and 1e-2 of the peak rate.",
    ),
    differs=(
        "On the ramp the rate is the share of the cosine at that update; the official one is the share of the cosine at the ramp's "
        "end.",
        "The fold goes to the adapter's own accumulator, so that the saved file works on the original base.",
        "A is Kaiming-uniform from the start; the official wrapper zeroes A too, and nothing but norms learns in the "
        "first cycle.",
        "reset='zero' is a true zero; the official one prunes 99.9 % at random.",
        "Folds happen one update after the multiple of K, whose rate is 0, as in the official code.",
    ),
    limits=(
        "A run that is too short for one restart is plain LoRA: a warning says so.",
        "Pruning each moment by its own magnitude can keep a first moment whose second is gone: a two-layer toy at a rate of "
        "1e-2 with a warm-up of two updates diverged; reset='zero' did not.",
        "The full-rank warm start is ordinary training before the adapter is put on.",
        "The accumulator holds one dense fp32 matrix for each site.",
    ),
)


def relora(
    r: int = 128,
    alpha: float = 32.0,
    dropout: float = 0.1,
    every: int = 1000,
    warmup: int = 100,
    reset: str = "magnitude",
    prune: float = 0.9,
    train_rest: bool = False,
) -> Method:
    """``train_rest``: embeddings, norms and head learn too, as own copies (the paper's pre-training setting)."""
    targets = Targets(unfreeze=("embedding", "norm", "head")) if train_rest else None
    return Method("relora", Accumulated(LoRA(r, alpha, dropout)), (Restart(every, warmup, reset, prune),), targets)


def _trained(broken: bool) -> tuple[torch.Tensor, torch.Tensor]:
    model, target = proofs.Stack(16, 16), proofs.planted(16, 16, 8)
    x = torch.linalg.qr(torch.randn(64, 16)).Q * 8
    y = (model(x) + x @ target.mT).detach()
    how = relora(r=2, alpha=2.0, dropout=0.0, every=400, warmup=20, reset="zero")
    proofs.train(model, how, proofs.full_batch(x, y), 2400, lr=1e-2, ticks=not broken)
    return proofs.learned(model), target


def _rank(broken: bool) -> float:
    """Numerical rank of what rank-2 updates have learnt after five restarts (broken: restarts never tick)."""
    change, _ = _trained(broken)
    return float((torch.linalg.svdvals(change) > 1e-2).sum())


def _recovered(broken: bool) -> float:
    """Relative error on a rank-8 target with rank-2 updates (broken: restarts never tick)."""
    change, target = _trained(broken)
    return proofs.relative(change, target)


def _seam(broken: bool) -> float:
    """Change of the map over the update of a restart, over that of the update before it (broken: no ramp of the rate)."""
    model, x = proofs.Stack(12, 10), torch.randn(64, 12)
    how = relora(r=2, alpha=3.0, dropout=0.0, every=10, warmup=0 if broken else 5, reset="zero")
    seen: list[torch.Tensor] = []
    proofs.train(model, how, proofs.full_batch(x, torch.randn(64, 10)), 14, lr=1e-2,
                 watch=lambda run: seen.append(proofs.learned(model)))  # fmt: skip
    steps = [float((b - a).norm()) for a, b in zip(seen, seen[1:])]
    return steps[9] / steps[8]  # updates 11, at rate 0 with the fold, and 10


def claims() -> list[Claim]:
    return [
        Claim("rank grows by restarts", "the sum of rank-2 updates has rank 8 and more", _rank, lambda f: f >= 8,
              "restarts never tick"),
        Claim("rank-8 target", "rank-2 updates with restarts reach a rank-8 target", _recovered, lambda f: f < 0.02,
              "restarts never tick"),
        Claim("no seam", "the map does not move over the update of a restart", _seam, lambda f: f < 1e-4,
              "no ramp of the rate"),
    ]  # fmt: skip
