from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method, prepare
from omnilora.core.parameterization import finite, one_of
from omnilora.core.targets import Targets
from omnilora.initializers.lora_ga import SIZES, RegionGradient, steepest
from omnilora.initializers.starting import seen_by, shifted, watched
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.shifted import ShiftedLoRA

CARD = Card(
    key="lora_ga",
    title="LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
    section="foundations",
    kind="initialization",
    equation=r"W' = W + \tfrac{\alpha}{\sqrt r}\,(B A - B_0 A_0),\quad A_0 = c\,V_{1:r}^\top,\; B_0 = c\,U_{r+1:2r},\; "
    r"c = \tfrac{d_{out}^{1/4}}{\sqrt\gamma},\quad \nabla_W \mathcal L = U \Sigma V^\top",
    purpose="The first step of the adapter follows the full fine-tuning gradient: A and B start at its singular vectors.",
    arxiv="2407.05000",
    venue="NeurIPS 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 16.0, "gamma": 16.0, "size": "stable", "scaling": "alpha/sqrt(r)"},
    cases=({"r": 2, "alpha": 3.0}, {"r": 2, "alpha": 3.0, "size": "peft", "scaling": "alpha/r"}),
    differs=(
        "PEFT 0.21.2 multiplies B by the singular values too and scales B alone (size='peft'); the paper scales both factors "
        "by c and has no singular values in them, which is followed (size='stable').",
        "The base stays; s B₀A₀ is subtracted in the forward instead of from W.",
        "The SVD of the gradient is exact, not a randomized one.",
    ),
    agreement=(
        "PEFT 0.21.2, preprocess_loraga, direction ArB2r, scale 'stable' and 'unit': A and B up to sign and outputs after a change "
        "of both, 1e-4 in fp32.",
    ),
    limits=(
        "One fp32 gradient of the size of the weight is held for every site while the data is read; the official code goes "
        "layer by layer. A site of fewer than 2r rows or columns is refused.",
        "Embeddings, grouped convolutions and weights that another layer reads get LoRA's start, with a warning.",
    ),
)


def lora_ga(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, size: str = "stable", gamma: float = 16.0,
            scaling: str = "alpha/sqrt(r)") -> Method:  # fmt: skip
    """``size``: "stable" (c on both factors), "peft" (c and the singular values on B) or "unit" (singular values on B)."""
    one_of(size, "size", *SIZES)
    finite(gamma, "gamma", 1e-12)
    form = ShiftedLoRA(r, alpha, dropout, scaling)

    def look(model: nn.Module, made: Method, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor],
             targets: Targets | None) -> tuple[Method, Targets | None]:  # fmt: skip
        _, seen = watched(model, made, batches, loss, targets, RegionGradient)
        fill = shifted(lambda W, r, G: steepest(G, r, size, gamma), whole=False, needs_data=True)
        return seen_by(made, seen, fill=fill), targets

    return Method("lora_ga", form, prepare=look)


def _aligned(broken: bool) -> float:
    """Cosine of the first step's ΔW with the full gradient, plain gradient descent (broken: LoRA of equal size)."""
    model, x = proofs.Stack(32, 24), torch.randn(256, 32)
    y = x @ proofs.planted(24, 32, 6).mT
    G = torch.autograd.grad(proofs.squared(model, (x, y)), [model.layers[0].weight])[0]
    if broken:
        adapt(model, Method("lora", LoRA(4, 16.0, scaling="alpha/sqrt(r)")))
    else:
        adapt(model, *prepare(model, lora_ga(r=4), [(x, y)], proofs.squared))
    proofs.squared(model, (x, y)).backward()
    (s,) = slots(model)
    step = s.scale * (s.B.grad @ s.A + s.B @ s.A.grad)
    return float(((step * G).sum() / step.norm() / G.norm()).detach())


def _stable(broken: bool) -> float:
    """Mean square of a feature of s B₀A₀x at width 512 over that at 32, for unit x along the rows of A₀ (broken: γ = √d_out,
    so that c = 1)."""
    sizes = []
    for n in (32, 512):
        model, batch = proofs.Stack(n, n), (torch.randn(64, n), torch.randn(64, n))
        adapt(model, *prepare(model, lora_ga(r=4, gamma=n**0.5 if broken else 1.0), [batch], proofs.squared))
        (s,) = slots(model)
        x = s.A0 / s.A0.norm(dim=-1, keepdim=True)
        sizes.append(float((s.scale * x @ s.A0.mT @ s.B0.mT).square().mean()))
    return sizes[1] / sizes[0]


def claims() -> list[Claim]:
    return [
        Claim("the full gradient's direction", "the first step of gradient descent is along the full one", _aligned,
              lambda f: f > 0.8, "LoRA of equal size"),
        Claim("stable outputs", "the adapter's part has outputs of one size at every width", _stable, lambda f: f > 0.5,
              "no factor of the width"),
    ]  # fmt: skip
