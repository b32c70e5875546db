from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import trainable
from omnilora.parameterizations.blocks import BlockLoRA
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="melora",
    title="MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + \frac{\alpha}{r}\,\mathrm{blockdiag}(B_1 A_1, \dots, B_n A_n)",
    purpose="n small LoRAs, each from one slice of the input to one slice of the output: rank n·r at the cost of rank r.",
    arxiv="2402.17263",
    venue="ACL 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"n": 2, "r": 8, "alpha": 16.0, "dropout": 0.0},
    cases=({"n": 2, "r": 2, "alpha": 3.0}, {"n": 3, "r": 1, "alpha": 2.0}),
    agreement=(
        "Official Linear, n = 1, 2 and 4, three shapes, fp64: outputs and all gradients within 5e-15.",
    ),
    differs=(
        "Where n does not divide a side, the first slices are one longer; the official code needs divisibility.",
        "All mini-adapters have one rank and α; the official code allows a list.",
        "The official merge calls the formula of a single LoRA and fails.",
    ),
)


def melora(n: int = 2, r: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> Method:
    """``n`` mini-LoRAs of rank ``r``."""
    return Method("melora", BlockLoRA(r, alpha, dropout, n))


def _target() -> torch.Tensor:
    return torch.block_diag(*[proofs.planted(4, 4, 2, seed=k) for k in range(4)])


def _learns(broken: bool) -> float:
    """Error on a block-diagonal target of rank 8 with 64 parameters (broken: LoRA of rank 2, also 64)."""
    model, target = proofs.Stack(16, 16), _target()
    x = torch.linalg.qr(torch.randn(64, 16)).Q * 8
    y = (model(x) + x @ target.mT).detach()
    how = Method("x", LoRA(2, 2.0)) if broken else melora(n=4, r=2, alpha=2.0)
    proofs.train(model, how, proofs.full_batch(x, y), 800, lr=2e-2)
    assert sum(t.numel() for t in trainable(model)) == 64
    return proofs.relative(proofs.learned(model), target)


def _rank(broken: bool) -> float:
    """Rank of ΔW at random tensors, 4 minis of rank 2 (broken: LoRA of equal size)."""
    model = proofs.Stack(16, 16)
    adapt(model, Method("x", LoRA(2)) if broken else melora(n=4, r=2))
    with torch.no_grad():
        for s in slots(model):
            for _, t in s.tensors():
                t.normal_()
    return float(torch.linalg.matrix_rank(proofs.learned(model)))


def claims() -> list[Claim]:
    return [
        Claim("block-diagonal target", "a rank-8 target of four blocks is reached with the size of rank 2", _learns,
              lambda f: f < 1e-3, "LoRA of equal size"),
        Claim("rank n·r", "the update has rank 8 at the cost of rank 2", _rank, lambda f: f == 8, "LoRA of equal size"),
    ]  # fmt: skip
