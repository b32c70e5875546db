from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.context import Context
from omnilora.core.maps import build
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import Parameterization
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="dora",
    title="DoRA: Weight-Decomposed Low-Rank Adaptation",
    section="foundations",
    kind="parameterization",
    equation=r"W' = m \odot \frac{V}{\lVert V\rVert_{row}},\quad V = W + \Delta W,\quad m_0 = \lVert W\rVert_{row}",
    purpose="Learns the length of each output row directly and its direction through any additive method.",
    arxiv="2402.09353",
    venue="ICML 2024",
    tags=frozenset({"zero_at_init", "mergeable", "trains_lm", "rows"}),
    defaults={"r": 16, "alpha": 32.0, "dropout": 0.05},
    cases=({"r": 3, "alpha": 5.0}, {"r": 2, "alpha": 3.0, "detach_norm": False}),
    agreement=("PEFT 0.21.2 (use_dora): forward and gradients of A, B and m equal to 2e-5 on the same tensors.",),
    differs=(
        "The norm is per output (dim 1 of PyTorch's (out, in)): the authors' answer to the paper's 'column-wise'.",
        "s stands inside the norm and the bias outside the product; AdapterHub's form leaves s out and scales the bias.",
        "A norm of an all-zero row counts as 1e-12, so that such a row stays zero instead of becoming NaN.",
    ),
)


def dora(
    r: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.05,
    detach_norm: bool = True,
    inner: Parameterization | None = None,
) -> Method:
    """DoRA over LoRA, or over ``inner``: any additive parameterization (VeRA gives DVoRA)."""
    return Method("dora", DoRA(inner if inner is not None else LoRA(r, alpha, dropout), detach_norm))


def _magnitude_only(broken: bool) -> float:
    """Relative error on W* = diag(d) W after training rank 1 (broken: LoRA of rank 1)."""
    model = proofs.Stack(16, 20)
    d = torch.rand(20) * 2 + 0.25
    x = torch.linalg.qr(torch.randn(64, 16)).Q * 8
    y = (model(x) * d).detach()
    how = LoRA(1, 1.0) if broken else DoRA(LoRA(1, 1.0))
    target = (d - 1).unsqueeze(1) * model.layers[0].weight.detach()
    proofs.train(model, Method("x", how), proofs.full_batch(x, y), 1500, lr=1e-2)
    return proofs.relative(proofs.learned(model), target)


def _row_norms(broken: bool) -> float:
    """Largest relative gap between the merged rows' norms and m, tensors at random (broken: m beside plain LoRA)."""
    model = proofs.Stack(16, 20, bias=True)
    adapt(model, Method("x", DoRA(LoRA(3, 5.0))))
    (slot,) = slots(model)
    with torch.no_grad():
        for _, t in slot.tensors():
            t.add_(0.5 * torch.randn_like(t))
        how = slot.how.inner if broken else slot.how
        p = slot.inner if broken else slot
        merged = how.adapt(slot.site.W, p, Context()).dense() if broken else build(slot.site.W, [(slot, 1.0)], Context()).dense()
        return float(((merged.norm(dim=1) - slot.m.abs()) / slot.m.abs()).abs().max())


def claims() -> list[Claim]:
    return [
        Claim("pure magnitude change", "a rescaling of rows is reached at rank 1; LoRA of rank 1 cannot", _magnitude_only,
              lambda f: f < 1e-2, "LoRA of equal rank"),
        Claim("rows have length m", "‖W'_o‖ = |m_o| whatever A and B are", _row_norms, lambda f: f < 1e-5,
              "LoRA of equal rank, same tensors"),
    ]  # fmt: skip
