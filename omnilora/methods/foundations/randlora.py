from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.randlora import RandLoRA

CARD = Card(
    key="randlora",
    title="RandLoRA: Full-Rank Parameter-Efficient Fine-Tuning of Large Models",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + \tfrac{\alpha}{r} \sum_j B_j\,\mathrm{diag}(\lambda_j)\,A\,\mathrm{diag}(\gamma_j)",
    purpose="Frozen random bases, one set for the model, mixed by learnt diagonals: an update of full rank.",
    arxiv="2502.00987",
    venue="ICLR 2025",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "shared", "trains_lm", "rows"}),
    defaults={"r": 32, "alpha": 640.0, "seed": 0},
    cases=({"r": 2, "alpha": 5.0}, {"r": 4, "alpha": 6.0, "dropout": 0.1}),
    agreement=(
        "PEFT 0.21.2: the drawn bases bit for bit, forward and gradients of λ and γ equal to 1e-5 "
        "(tests/test_agreement_relatives.py).",
    ),
    differs=(
        "As in PEFT the flattened bases pair the columns of all B_j with the rows of A in another order than the formula; "
        "the columns are independent draws, so the family is the same.",
        "The sparse and very sparse bases of PEFT are not offered.",
    ),
    limits=(
        "Its factors have rank min(in, out) or more: a forward costs about two dense products.",
        "The bases are saved with the adapter; a file of vectors and a seed alone is not written yet.",
    ),
)


def randlora(r: int = 32, alpha: float = 640.0, dropout: float = 0.0, seed: int = 0) -> Method:
    """``r``: rank of one basis; ⌈min(in, out)/r⌉ of them are mixed. λ is zero at the start."""
    return Method("randlora", RandLoRA(r, alpha, dropout, seed))


def _rank(broken: bool) -> float:
    """Rank of ΔW on 24 × 20 with tensors at random, r = 4 (broken: LoRA of equal size, rank 3)."""
    model = proofs.Stack(24, 20)
    adapt(model, Method("x", LoRA(3)) if broken else randlora(r=4))
    shake(model)
    return float(torch.linalg.matrix_rank(proofs.learned(model)))


def _reached(broken: bool) -> float:
    """Relative error on a full-rank target of its own family, 16 × 16, 80 numbers (broken: LoRA of rank 3, 96 numbers)."""
    teacher, model = proofs.Stack(16, 16), proofs.Stack(16, 16)
    adapt(teacher, randlora(r=4, alpha=4.0))
    (s,) = slots(teacher)
    with torch.no_grad():
        s.lam.normal_()
        s.gamma.normal_()
    target = proofs.learned(teacher)
    target = 3 * target / target.norm()
    x = torch.linalg.qr(torch.randn(64, 16)).Q * 8
    y = (model(x) + x @ target.mT).detach()
    how = Method("x", LoRA(3, 3.0)) if broken else randlora(r=4, alpha=4.0)
    proofs.train(model, how, proofs.full_batch(x, y), 1500, lr=2e-2)
    return proofs.relative(proofs.learned(model), target)


def claims() -> list[Claim]:
    return [
        Claim("full rank", "bases of rank 4 add up to rank 20", _rank, lambda f: f == 20, "LoRA of equal size"),
        Claim("its own family", "a full-rank target of the shared bases is reached", _reached, lambda f: f < 0.1,
              "LoRA of more numbers"),
    ]  # fmt: skip
