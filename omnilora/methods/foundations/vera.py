from __future__ import annotations

import math

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import Parameterization
from omnilora.core.run import trainable
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.vera import VeRA, projections

CARD = Card(
    key="vera",
    title="VeRA: Vector-based Random Matrix Adaptation",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + \mathrm{diag}(b)\, B\, \mathrm{diag}(d)\, A",
    purpose="One frozen random pair for the whole model; each site learns two vectors.",
    arxiv="2310.11454",
    venue="ICLR 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "shared", "trains_lm", "rows"}),
    defaults={"r": 256, "d_init": 0.1, "seed": 0},
    cases=({"r": 6, "d_init": 0.3},),
    agreement=("PEFT 0.21.2: the drawn projections, forward and gradients of b and d equal to 2e-5.",),
    differs=(
        "A and B are drawn as PEFT draws them: one CPU generator, A first, at the largest shapes, then sliced.",
        "AdapterHub stores b and d as full square matrices and multiplies by α/r: not followed.",
    ),
    limits=(
        "The projections are saved with the adapter; a file of vectors and a seed alone is not written yet.",
        "Needs a high learning rate: 20 updates of a 135 M model at 1e-3 lower the loss by 0.013 ± 0.003, at 1e-2 by "
        "0.48 ± 0.04. The trainer's default rate is ten times LoRA's.",
    ),
)


def vera(r: int = 256, d_init: float = 0.1, dropout: float = 0.0, seed: int = 0) -> Method:
    """ΔW = diag(b) B diag(d) A with A, B shared and frozen."""
    return Method("vera", VeRA(r, d_init, dropout, seed), rate=10.0)


def _family(how: Parameterization) -> float:
    """Relative error on a target diag(b) B diag(d) A of VeRA's own family; ∞ where more than 28 numbers learn."""
    model = proofs.Stack(12, 12)
    a, b = projections(0, 16, 12, 12)
    target = torch.linspace(0.5, 1.5, 12).unsqueeze(1) * (b * torch.linspace(-0.2, 0.2, 16)) @ a
    x = torch.linalg.qr(torch.randn(64, 12)).Q * 8
    y = (model(x) + x @ target.mT).detach()
    proofs.train(model, Method("x", how), proofs.full_batch(x, y), 3000, lr=1e-2)
    learning = sum(p.numel() for p in trainable(model))
    return proofs.relative(proofs.learned(model), target) if learning <= 12 + 16 else math.inf


def _inside(broken: bool) -> float:
    """Error with VeRA r = 16, 28 parameters (broken: LoRA of rank 1, 24 parameters)."""
    return _family(LoRA(1, 1.0) if broken else VeRA(16))


def _storage(broken: bool) -> float:
    """Distinct matrices behind the A of four sites of different shapes (broken: LoRA)."""
    model = proofs.Stack(8, 12, 10, 6, 4)
    adapt(model, Method("x", LoRA(4) if broken else VeRA(4)))
    return float(len({s.A.data_ptr() for s in slots(model)}))


def claims() -> list[Claim]:
    return [
        Claim("target inside the family", "a target of the shared random subspace is reached with 28 numbers", _inside,
              lambda f: f < 1e-3, "LoRA of equal size"),
        Claim("one pair for all sites", "every site reads slices of the same frozen A", _storage, lambda f: f == 1,
              "LoRA"),
    ]  # fmt: skip
