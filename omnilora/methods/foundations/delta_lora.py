from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import kaiming
from omnilora.parameterizations.delta import DeltaLoRA
from omnilora.rules.folding import Snapshot

CARD = Card(
    key="delta_lora",
    title="Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices",
    section="foundations",
    kind="schedule",
    equation=r"W_{t+1} = W_t + \lambda s\,(B_{t+1}A_{t+1} - B_tA_t)\ (t \ge K)\ \Rightarrow\ "
    r"W' = W + s B A + \lambda s\,(\bar B \bar A - B_K A_K)",
    purpose="The pretrained weight moves too, by λ times the change of BA; here in closed form, with the base untouched.",
    arxiv="2309.02411",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 16.0, "lam": 2.0, "start": 500},
    cases=({"r": 2, "alpha": 3.0, "lam": 1.5, "start": 3},),
    agreement=(
        "No official code exists. The paper's loop, which writes to W after every step, spelled out: K = 0 and 7, SGD and AdamW with "
        "decay, 80 updates, fp64: outputs and gradients of the input within 2e-15.",
    ),
    differs=(
        "The post-step writes telescope, so nothing is written to W: the same map, exact on quantized bases, and a file "
        "of two low-rank pairs.",
        "K counts updates done; the paper's loop counts from 0 and starts one later.",
        "The only public implementation takes its first snapshot after the first step and leaves dropout on.",
    ),
    limits=(
        "A run of K updates or fewer is plain LoRA: a warning says so.",
        "The total update has rank ≤ 2r: 'high-rank parameters are learnt' does not hold literally.",
        "With K = 0 and Adam the trajectory is that of LoRA with the scale s(1 + λ).",
    ),
)


def delta_lora(r: int = 8, alpha: float = 16.0, lam: float = 2.0, start: int = 500) -> Method:
    """``lam``: λ; ``start``: K, updates before the second term begins. Dropout is not allowed."""
    return Method("delta_lora", DeltaLoRA(r, alpha, lam=lam), (Snapshot(start),))


def _inplace(broken: bool) -> float:
    """Gap to W + sBA of the literal algorithm that writes to W after every SGD step (broken: no detach)."""
    target, x = proofs.planted(10, 12, 4), torch.randn(64, 12)
    model = proofs.Stack(12, 10)
    w0 = model.layers[0].weight.detach().clone()
    y = (model(x) + x @ target.mT).detach()
    how = Method("x", DeltaLoRA(3, 3.0, lam=2.0, detached=not broken), (Snapshot(5),))
    torch.manual_seed(5)
    proofs.train(model, how, proofs.full_batch(x, y), 60, lr=0.2, optimizer=torch.optim.SGD)
    torch.manual_seed(5)
    a, b = kaiming(3, 12), torch.zeros(10, 3)
    w = w0.clone()
    for t in range(60):
        a.requires_grad_(True)
        b.requires_grad_(True)
        loss = (x @ (w + b @ a).mT - y).square().mean()
        ga, gb = torch.autograd.grad(loss, (a, b))
        na, nb = (a - 0.2 * ga).detach(), (b - 0.2 * gb).detach()
        if t >= 5:
            w = w + 2.0 * (nb @ na - (b @ a).detach())
        a, b = na, nb
    return proofs.relative(proofs.learned(model), w + b @ a - w0)


def _moves(broken: bool) -> float:
    """Share of the update that is not s B A (broken: λ = 0)."""
    model, x = proofs.Stack(12, 10), torch.randn(64, 12)
    proofs.train(model, delta_lora(r=3, alpha=3.0, lam=0.0 if broken else 2.0, start=5),
                 proofs.full_batch(x, torch.randn(64, 10)), 60)  # fmt: skip
    (s,) = slots(model)
    change = proofs.learned(model)
    return proofs.relative(s.scale * (s.B @ s.A).detach(), change)


def claims() -> list[Claim]:
    return [
        Claim("the written weight", "equals the algorithm that writes to W after every step", _inplace,
              lambda f: f < 1e-4, "the second term is not detached"),
        Claim("the base's part", "a part of the update is beyond s B A", _moves, lambda f: f > 0.1, "λ = 0"),
    ]  # fmt: skip
