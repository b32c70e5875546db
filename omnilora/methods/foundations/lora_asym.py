from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.errors import BadValue
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="lora_asym",
    title="Asymmetry in Low-Rank Adapters of Foundation Models",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + s\, B\, \hat Q,\quad \hat Q \hat Q^\top = I \text{ frozen}",
    purpose="A hardly matters, B does: freeze a random orthonormal A and train B alone, at half the parameters.",
    arxiv="2402.16842",
    venue="ICML 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 16.0, "train": "B", "init_A": "orthonormal"},
    cases=({"r": 3, "alpha": 5.0}, {"r": 2, "alpha": 3.0, "init_A": "svd"}),
    agreement=(
        "Official Linear with its A ('rand', 'V', 'he') in both, fp64: outputs and the gradient of B within 2e-15. On one weight its "
        "'V' has 0.22 of A inside the top right singular subspace, init_A='svd' has all.",
    ),
    differs=(
        "The README's example string is parsed the other way round by the official code (B frozen at random, A trained).",
        "The official 'V' init takes columns of Vᴴ, and of a weight that is not the pretrained one; here it is the top "
        "right singular subspace of W.",
        "Orthonormal rows come from the QR of a Gaussian, not from the SVD of a uniform matrix.",
    ),
    limits=("The arms that train A with a frozen B are not offered: they are the paper's losing comparison.",),
)


def lora_asym(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, init_A: str = "orthonormal", train: str = "B") -> Method:
    """``init_A``: "orthonormal", "svd", "gaussian" or "kaiming"; ``train``: "B" (the method) or "AB"."""
    if train not in ("B", "AB"):
        raise BadValue(f"train = {train!r}.", "Give 'B' or 'AB'.")
    return Method("lora_asym", LoRA(r, alpha, dropout, train=train, init_A=init_A))


def _optimum(broken: bool) -> float:
    """Gap of the trained ΔW to ΔΣQᵀ(QΣQᵀ)⁻¹Q, the best for a frozen Q (broken: A learns too)."""
    model, target = proofs.Stack(12, 10), proofs.planted(10, 12, 6)
    x = torch.linalg.qr(torch.randn(96, 12)).Q * torch.logspace(0.3, -0.3, 12) * 8
    y = (model(x) + x @ target.mT).detach()
    start: list[torch.Tensor] = []
    how = lora_asym(r=4, alpha=4.0, train="AB" if broken else "B")
    proofs.train(model, how, proofs.full_batch(x, y), 1500, lr=2e-2,
                 watch=lambda run: start.append(run.slots()[0].A.detach().clone()))  # fmt: skip
    q, cov = start[0], x.mT @ x
    best = target @ cov @ q.mT @ torch.linalg.inv(q @ cov @ q.mT) @ q
    return proofs.relative(proofs.learned(model), best)


def _rows(broken: bool) -> float:
    """‖QQᵀ − I‖ of A after training (broken: Kaiming A, as LoRA-FA)."""
    model, x = proofs.Stack(12, 10), torch.randn(64, 12)
    proofs.train(model, lora_asym(r=4, init_A="kaiming" if broken else "orthonormal"),
                 proofs.full_batch(x, torch.randn(64, 10)), 20)  # fmt: skip
    a = slots(model)[0].A.detach()
    return float((a @ a.mT - torch.eye(4)).norm())


def _subspace(broken: bool) -> float:
    """Share of A's rows inside the top right singular subspace of W (broken: of Wᴴ's columns, the official reading)."""
    model = proofs.Stack(12, 12)
    adapt(model, lora_asym(r=3, init_A="svd"))
    (s,) = slots(model)
    vh = torch.linalg.svd(s.site.W.dense().detach()).Vh
    top = vh[:, :3].mT if broken else vh[:3]
    return float((s.A.detach() @ top.mT).square().sum() / 3)


def claims() -> list[Claim]:
    return [
        Claim("optimum for a frozen A", "training B reaches the closed-form best update in A's row space", _optimum,
              lambda f: f < 1e-3, "A learns too"),
        Claim("orthonormal rows", "A Aᵀ = I before and after training", _rows, lambda f: f < 1e-5, "a Kaiming A"),
        Claim("singular subspace", "init_A='svd' spans the top right singular subspace of W", _subspace,
              lambda f: f > 0.999, "the official code's columns of Vᴴ"),
    ]  # fmt: skip
