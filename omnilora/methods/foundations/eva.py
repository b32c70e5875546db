from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method, prepare
from omnilora.core.parameterization import Parameterization, Slot, finite, positive_rank
from omnilora.core.site import Site
from omnilora.core.targets import Targets
from omnilora.initializers.eva import Components, components, redistribute
from omnilora.initializers.starting import seen_by, watched
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="eva",
    title="Parameter Efficient Fine-tuning via Explained Variance Adaptation",
    section="foundations",
    kind="initialization",
    equation=r"W' = W + \tfrac{\alpha}{r} B A,\quad A_0 = V_{1:r_\ell}^\top \text{ of the inputs } X_\ell = U \Sigma V^\top,"
    r"\quad \textstyle\sum_\ell r_\ell = N r,\; r_\ell \le \rho r",
    purpose="A starts at the leading directions of the layer's inputs, and ranks go where they explain the most variance.",
    arxiv="2410.07170",
    venue="NeurIPS 2025",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 16, "alpha": 1.0, "rho": 2.0, "whiten": False},
    cases=({"r": 3, "alpha": 5.0},),
    differs=(
        "The official code repeats the data until components agree from batch to batch (τ = 0.99); here every batch that "
        "is given is seen once.",
        "All tokens of the attention mask count; the official code leaves out those without a label, if it is asked to.",
        "Layers with equal inputs are decomposed each; a tie in the shares goes to the earlier layer.",
    ),
    agreement=(
        "PEFT 0.21.2, initialize_lora_eva_weights, ρ = 1 and 2, with and without whitening: ranks, scales, A up to sign and "
        "outputs, 1e-4 in fp32 on one repeated batch.",
    ),
    limits=(
        "Embeddings, grouped convolutions and weights that another layer reads cannot be observed: they get LoRA's start, with "
        "a warning. Sites whose form an override changes keep their rank and do not count in the budget.",
    ),
)


def eva(r: int = 16, alpha: float = 16.0, dropout: float = 0.0, rho: float = 2.0, whiten: bool = False,
        adjust: bool = True) -> Method:  # fmt: skip
    """``rho``: no rank exceeds ρ r; 1 keeps r everywhere. ``whiten``: rows of A divided by √σ. ``adjust``: α follows the
    rank of each site, so that the scale α/r stays."""
    positive_rank(r)
    finite(rho, "rho", 1.0)
    form = LoRA(r, alpha, dropout)

    def look(model: nn.Module, made: Method, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor],
             targets: Targets | None) -> tuple[Method, Targets | None]:  # fmt: skip
        most = round(r * rho)
        sites, seen = watched(model, made, batches, loss, targets, components(most))
        free = {s.name: seen[s.name].share for s, how in sites if how == form and s.name in seen}
        ranks = redistribute(free, r * len(free), most)

        def arrange(chosen: Sequence[Site], how: Parameterization) -> list[Parameterization | None]:
            return [resized(how, ranks[s.name], adjust) if s.name in ranks else how for s in chosen]

        return seen_by(made, seen, arrange=arrange, fill=fill), targets

    def fill(slot: Slot, seen: Components | None) -> None:
        if seen is None or set(slot.roles) != {"A", "B"}:
            return
        rows = min(len(slot.A), int((seen.sigma > 0).sum()))  # fewer than r where the data has fewer directions
        at = seen.V[:rows]
        slot.A[:rows] = (at / seen.sigma[:rows].sqrt().unsqueeze(-1) if whiten else at).to(slot.A)

    return Method("eva", form, prepare=look)


def resized(how: Parameterization, rank: int, adjust: bool) -> Parameterization | None:
    """The form at another rank; None for rank 0."""
    alpha = how.alpha * rank / how.r if adjust else how.alpha  # type: ignore[attr-defined]
    return dataclasses.replace(how, r=rank, alpha=alpha) if rank else None  # type: ignore[call-arg]


def _variance(broken: bool) -> float:
    """Mean share of a layer's input variance that A's rows explain, where one layer's inputs have 2 directions and the
    other's 16 equal ones; r = 6 (broken: ρ = 1, the same rank everywhere)."""
    model = proofs.Stack(16, 16, 16)
    with torch.no_grad():
        model.layers[0].weight.copy_(proofs.planted(16, 16, 2))
    x = torch.linalg.qr(torch.randn(512, 16)).Q * 512**0.5
    made, targets = prepare(model, eva(r=6, rho=1.0 if broken else 2.0), [(x, x)], proofs.squared)
    adapt(model, made, targets)
    explained = []
    for s in slots(model):
        X = (x if s.site.name == "layers.0" else model.layers[0](x)).detach()
        rows = torch.linalg.qr(s.A.detach().mT).Q
        explained.append((X @ rows).square().sum() / X.square().sum())
    return float(torch.stack(explained).sum() / 2)


def _gradient(broken: bool) -> float:
    """‖∂L/∂B‖² / ‖∂L/∂W‖² at s = 1: the share of the full gradient that a first step can take, inputs of falling variance
    (broken: random orthonormal rows)."""
    model = proofs.Stack(32, 16)
    x = proofs.falling(512, 32)
    batch = (x, torch.randn(512, 16) + x @ torch.randn(32, 16))
    full = torch.autograd.grad(proofs.squared(model, batch), [model.layers[0].weight])[0]
    if broken:
        adapt(model, Method("lora", LoRA(4, 4.0, init_A="orthonormal")))
    else:
        adapt(model, *prepare(model, eva(r=4, alpha=4.0), [batch], proofs.squared))
    proofs.squared(model, batch).backward()
    return float(slots(model)[0].B.grad.square().sum() / full.square().sum())


def claims() -> list[Claim]:
    return [
        Claim("ranks follow the variance", "ranks 2 and 10 explain more of the inputs than 6 and 6", _variance,
              lambda f: f > 0.75, "the same rank everywhere"),
        Claim("a larger first gradient", "most of the full gradient reaches B", _gradient, lambda f: f > 0.8,
              "random orthonormal rows"),
    ]  # fmt: skip
