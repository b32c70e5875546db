from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import adapt
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.kronecker import LoKr
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="lokr",
    title="Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation (LoKr)",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + s\,(w_1 \otimes w_2),\quad w_2 = w_{2a} w_{2b}\ \text{where}\ r\ \text{is small},\ s = \alpha / r",
    purpose="A Kronecker product of a small and a low-rank matrix: high rank from very few numbers.",
    arxiv="2309.14859",
    venue="ICLR 2024",
    tags=frozenset({"zero_at_init", "mergeable", "additive", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 8.0, "factor": -1, "both": False},
    cases=({"r": 1, "alpha": 3.0}, {"r": 1, "alpha": 3.0, "both": True, "dropout": 0.1}, {"r": 4, "alpha": 5.0, "factor": 2}),
    agreement=("PEFT 0.21.2, linear and 2-D convolution: forward and gradients equal to 1e-5 (tests/test_agreement_relatives.py).",),
    differs=(
        "The product is applied as w₁ X w₂ᵀ on the reshaped input; LyCORIS and PEFT form ΔW. Convolutions and embeddings form "
        "it here too.",
        "Where neither matrix is factored the scale is 1, as in LyCORIS; PEFT keeps α/r.",
        "Starts as LyCORIS does, w₁ Kaiming-uniform and w₂ zero; PEFT's default sets w₁ to zero.",
        "A convolution's kernel belongs to w₂, unfolded; the CP form of LyCORIS is not offered.",
    ),
    limits=("A stack of experts' weights is not adapted.",),
)


def lokr(r: int = 8, alpha: float = 8.0, dropout: float = 0.0, factor: int = -1, both: bool = False) -> Method:
    """``factor``: sides of w₁ (−1: the most balanced division); ``both``: w₁ is factored too where r is small enough."""
    return Method("lokr", LoKr(r, alpha, dropout, factor, both))


def _rank(broken: bool) -> float:
    """Rank of ΔW on 64 × 64 with w₁ 8 × 8 and w₂ of rank 2, 96 numbers (broken: LoRA of rank 1, 128 numbers)."""
    model = proofs.Stack(64, 64)
    adapt(model, Method("x", LoRA(1)) if broken else lokr(r=2))
    shake(model)
    return float(torch.linalg.matrix_rank(proofs.learned(model)))


def _reached(broken: bool) -> float:
    """Relative error on a Kronecker target of 24 × 24 with 52 numbers or fewer (broken: LoRA of rank 2, 96 numbers)."""
    model = proofs.Stack(24, 24)
    target = torch.kron(torch.randn(4, 4), torch.outer(torch.randn(6), torch.randn(6))) / 4
    x = torch.linalg.qr(torch.randn(64, 24)).Q * 8
    y = (model(x) + x @ target.mT).detach()
    how = Method("x", LoRA(2, 2.0)) if broken else lokr(r=1, alpha=1.0)
    proofs.train(model, how, proofs.full_batch(x, y), 1000, lr=2e-2)
    return proofs.relative(proofs.learned(model), target)


def claims() -> list[Claim]:
    return [
        Claim("rank multiplies", "8 × 8 and rank 2 give a change of rank 16", _rank, lambda f: f == 16,
              "LoRA of more numbers"),
        Claim("its own family", "a Kronecker target is reached", _reached, lambda f: f < 0.05, "LoRA of more numbers"),
    ]  # fmt: skip
