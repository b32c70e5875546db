from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.hadamard import LoHa
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="loha",
    title="FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning (LoHa)",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + \frac{\alpha}{r}\,(B_1 A_1) \odot (B_2 A_2)",
    purpose="A Hadamard product of two rank-r products: rank up to r² from the numbers of rank 2r.",
    arxiv="2108.06098",
    venue="ICLR 2022",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 8.0},
    cases=({"r": 2, "alpha": 5.0}, {"r": 2, "alpha": 3.0, "dropout": 0.1}),
    agreement=("PEFT 0.21.2, linear and 2-D convolution: forward and gradients equal to 1e-5 (tests/test_agreement_relatives.py).",),
    differs=(
        "The product is applied as factors of rank r², B (out, r²) and A (r², in); LyCORIS and PEFT form ΔW.",
        "Starts as LyCORIS does: A₁, A₂ ~ N(0, 1), B₁ ~ N(0, 0.1²), B₂ = 0. PEFT draws Kaiming and sets A₂ = 0.",
        "A convolution's kernel is unfolded; the CP form of LyCORIS for kernels is not offered.",
    ),
    limits=("Above r ≈ √min(in, out) the r² features cost more than ΔW itself would.", "No rank or module dropout."),
)


def loha(r: int = 8, alpha: float = 8.0, dropout: float = 0.0) -> Method:
    """ΔW = (α/r) (B₁A₁) ⊙ (B₂A₂); B₂ is zero at the start."""
    return Method("loha", LoHa(r, alpha, dropout))


def _rank(broken: bool) -> float:
    """Rank of ΔW with tensors at random, r = 3 (broken: LoRA of equal size, rank 6)."""
    model = proofs.Stack(24, 20)
    adapt(model, Method("x", LoRA(6)) if broken else loha(r=3))
    shake(model)
    return float(torch.linalg.matrix_rank(proofs.learned(model)))


def _product(broken: bool) -> float:
    """Gap of ΔW to s (B₁A₁) ⊙ (B₂A₂) spelled out (broken: the sum of the two products, LoRA of rank 2r)."""
    model = proofs.Stack(24, 20)
    adapt(model, loha(r=3, alpha=5.0))
    shake(model)
    (s,) = slots(model)
    with torch.no_grad():
        first, second = s.B1 @ s.A1, s.B2 @ s.A2
        return proofs.relative(proofs.learned(model), 5.0 / 3 * (first + second if broken else first * second))


def claims() -> list[Claim]:
    return [
        Claim("rank r²", "3 + 3 columns give a change of rank 9", _rank, lambda f: f == 9, "LoRA of equal size"),
        Claim("elementwise product", "ΔW is the Hadamard product of the two", _product, lambda f: f < 1e-5,
              "LoRA of equal size, same tensors"),
    ]  # fmt: skip
