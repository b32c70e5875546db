from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import finite
from omnilora.initializers.olora import orthonormal
from omnilora.initializers.starting import shifted
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.shifted import ShiftedLoRA

CARD = Card(
    key="olora",
    title="OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
    section="foundations",
    kind="initialization",
    equation=r"W' = W + s\,(B A - B_0 A_0),\quad B_0 = Q_{:,1:r},\; A_0 = R_{1:r,:},\quad W = Q R",
    purpose="B starts with orthonormal columns, A with the rows of R: the first part of the weight's QR decomposition.",
    arxiv="2406.01775",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 32, "alpha": 16.0},
    cases=({"r": 2, "alpha": 3.0},),
    differs=(
        "PEFT writes W − s B₀A₀ over the base; here the base stays and s B₀A₀ is subtracted in the forward.",
        "Q and R are not divided by the scale, as in PEFT: at s ≠ 1 the part taken out of W is s Q_r R_r.",
    ),
    agreement=("PEFT 0.21.2, init_lora_weights='olora' and α ≠ r: A, B and outputs after a change of both, 1e-5 in fp32.",),
    limits=("One QR decomposition a site. Over a quantized base it is that of the dequantized weight.",),
)


def olora(r: int = 16, alpha: float | None = None, dropout: float = 0.0) -> Method:
    """``alpha``: None for s = 1."""
    form = ShiftedLoRA(r, float(r) if alpha is None else alpha, dropout)
    form.check()
    finite(form.alpha, "alpha", 1e-12)
    return Method("olora", form, fill=shifted(lambda W, r, seen: orthonormal(W, r), whole=False))


def _both_learn(broken: bool) -> float:
    """‖∂L/∂A‖ / ‖∂L/∂B‖ at the start, for a loss of the outputs (broken: LoRA, whose A cannot move while B is zero)."""
    model, x = proofs.Stack(20, 16), torch.randn(64, 20)
    adapt(model, Method("lora", LoRA(4, 4.0)) if broken else olora(r=4))
    (model(x) - torch.randn(64, 16)).square().mean().backward()
    (s,) = slots(model)
    return float(s.A.grad.norm() / s.B.grad.norm())


def _columns(broken: bool) -> float:
    """‖BᵀB − I‖ + ‖s B A − P W‖/‖W‖ at the start, P projecting on W's first r columns (broken: PiSSA's factors)."""
    from omnilora.methods.foundations.pissa import pissa

    model = proofs.Stack(20, 16)
    adapt(model, pissa(r=4) if broken else olora(r=4))
    (s,) = slots(model)
    with torch.no_grad():
        W = s.site.W.dense()
        first = torch.linalg.pinv(W[:, :4])
        gap = proofs.relative(s.scale * s.B @ s.A, W[:, :4] @ first @ W)
        return float((s.B.mT @ s.B - torch.eye(4)).norm()) + gap


def claims() -> list[Claim]:
    return [
        Claim("orthonormal columns", "BᵀB = I, and s B A is W projected on its first r columns", _columns, lambda f: f < 1e-4,
              "PiSSA's factors"),
        Claim("both factors learn", "the first gradient reaches A as it reaches B", _both_learn, lambda f: f > 0.1, "LoRA's start"),
    ]  # fmt: skip
