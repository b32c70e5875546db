from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import adapt
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.hadamard import HiRA
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="hira",
    title="HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + W \odot (B A)",
    purpose="Modulates the entries of W by a low-rank matrix: a change of high rank from LoRA's numbers.",
    venue="ICLR 2025",
    tags=frozenset({"zero_at_init", "mergeable", "trains_lm", "rows"}),
    defaults={"r": 32},
    cases=({"r": 3},),
    agreement=("PEFT 0.21.2, linear: forward and gradients equal to 1e-5 (tests/test_agreement_relatives.py).",),
    differs=("There is no scale α/r, as in PEFT.", "An embedding starts with B = 0 as all layers do; PEFT sets A = 0 there."),
    limits=(
        "ΔW is formed at every forward: one more (out, in) matrix while a layer runs.",
        "A zero of W stays zero. A quantized W is read, and so dequantized, at every forward.",
    ),
)


def hira(r: int = 32) -> Method:
    """ΔW = W ⊙ (BA) with A Kaiming-uniform and B zero at the start."""
    return Method("hira", HiRA(r), rate=3.0)


def _rank(broken: bool) -> float:
    """Rank of ΔW at r = 1 on a full-rank 24 × 20 weight (broken: LoRA of rank 1)."""
    model = proofs.Stack(24, 20)
    adapt(model, Method("x", LoRA(1)) if broken else hira(r=1))
    shake(model)
    return float(torch.linalg.matrix_rank(proofs.learned(model)))


def _modulated(broken: bool) -> float:
    """Relative error on a target W ⊙ (b aᵀ), r = 1 (broken: LoRA of equal size)."""
    model = proofs.Stack(20, 16)
    target = model.layers[0].weight.detach() * torch.outer(torch.randn(16), torch.randn(20))
    x = torch.linalg.qr(torch.randn(64, 20)).Q * 8
    y = (model(x) + x @ target.mT).detach()
    proofs.train(model, Method("x", LoRA(1, 1.0)) if broken else hira(r=1), proofs.full_batch(x, y), 600, lr=3e-2)
    return proofs.relative(proofs.learned(model), target)


def claims() -> list[Claim]:
    return [
        Claim("high rank", "a rank-1 modulation changes W by full rank", _rank, lambda f: f == 20, "LoRA of rank 1"),
        Claim("its own family", "a modulation of W is learnt with the numbers of rank-1 LoRA", _modulated,
              lambda f: f < 0.01, "LoRA of equal size"),
    ]  # fmt: skip
