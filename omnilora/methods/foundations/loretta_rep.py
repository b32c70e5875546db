from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import trainable
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.tensor_train import TrainedFactors, contract, train_of

CARD = Card(
    key="loretta_rep",
    title="LoRETTA: Low-Rank Economic Tensor-Train Adaptation (LoRETTA-rep)",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + \tfrac{\alpha}{r}\, B A,\quad A^\top = \mathrm{TT}(in \times r),\ B^\top = \mathrm{TT}(r \times out)",
    purpose="LoRA whose A and B are a tensor train each: hundreds of numbers where LoRA has tens of thousands.",
    arxiv="2402.11417",
    venue="NAACL 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 8, "tensor_rank": 5, "alpha": 16.0, "zero": True},
    cases=({"r": 4, "tensor_rank": 2, "alpha": 3.0},),
    agreement=(
        "Official Linear with its tensorized layers, autocast off, three shapes, fp64: outputs and gradients of all cores within 1e-15.",
    ),
    differs=(
        "The official code starts both trains at random, so that ΔW ≠ 0; here the last core of B is zero (zero=False "
        "gives the code's start).",
        "Modes separate input from output and are factored from any size; the code has a table keyed on one width.",
        "The official merge reads `.weight` of a train, which does not exist, and crashes.",
    ),
    limits=(
        "The paper also trains norms and a tensor-train classifier: pass unfreeze=['norm']; the head is not offered.",
        "The default rate is five times LoRA's: 20 updates of SmolLM2-135M lower the loss by 0.59, and by 0.07 at LoRA's rate. The "
        "published runs are long ones at 1e-4.",
    ),
)


def loretta_rep(r: int = 8, tensor_rank: int = 5, alpha: float = 16.0, dropout: float = 0.0, zero: bool = True) -> Method:
    """``r``: rank of the update; ``tensor_rank``: inner ranks of the two trains."""
    return Method("loretta_rep", TrainedFactors(r, alpha, dropout, tensor_rank, zero=zero), rate=5.0)


def _size(broken: bool) -> float:
    """Trainable numbers of a 768 × 768 site over LoRA's 12,288 of rank 8 (broken: LoRA)."""
    with torch.device("meta"):
        model = proofs.Stack(768, 768)
    adapt(model, Method("x", LoRA(8)) if broken else loretta_rep())
    return sum(t.numel() for t in trainable(model)) / 12_288


def _deviation(broken: bool) -> float:
    """Standard deviation of A's entries times √(768 + 64) (broken: cores of deviation 1)."""
    model = proofs.Stack(768, 64)
    adapt(model, loretta_rep(r=64, zero=False))
    cores = train_of(slots(model)[0], "A")
    if broken:
        cores = [torch.randn_like(c) for c in cores]
    return float(contract(cores).std().detach()) * (768 + 64) ** 0.5


def _learns(broken: bool) -> float:
    """Error on a target made by a LoRETTA of the same shape (broken: a random target of equal rank)."""
    torch.manual_seed(1)
    model, teacher = proofs.Stack(24, 24), proofs.Stack(24, 24)
    adapt(teacher, loretta_rep(r=4, tensor_rank=3, alpha=4.0, zero=False))
    target = proofs.planted(24, 24, 4) if broken else proofs.learned(teacher)
    target = target / target.norm() * 3
    x = torch.linalg.qr(torch.randn(64, 24)).Q * 8
    y = (model(x) + x @ target.mT).detach()
    proofs.train(model, loretta_rep(r=4, tensor_rank=3, alpha=4.0), proofs.full_batch(x, y), 2500, lr=1e-2)
    return proofs.relative(proofs.learned(model), target)


def claims() -> list[Claim]:
    return [
        Claim("size", "a tenth of LoRA's numbers at the same rank", _size, lambda f: f < 0.11, "LoRA of equal rank"),
        Claim("entry deviation", "entries of a train start with the deviation 1/√(in + r)", _deviation,
              lambda f: 0.6 < f < 1.5, "cores of deviation 1"),
        Claim("its own family", "a target of the family is learnt, an unstructured one of equal rank is not", _learns,
              lambda f: f < 0.05, "an unstructured target of equal rank"),
    ]  # fmt: skip
