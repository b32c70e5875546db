from __future__ import annotations

from typing import Any

import torch

from omnilora import proofs
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import Slot
from omnilora.core.targets import Targets
from omnilora.parameterizations.accumulated import Accumulated
from omnilora.parameterizations.shifted import ShiftedLoRA
from omnilora.rules.resample import Resample, redraw

CARD = Card(
    key="rosa",
    title="ROSA: Random Orthogonal Subspace Adaptation",
    section="foundations",
    kind="schedule",
    equation=r"W' = W_t - B_0 A_0 + B A,\quad B_0 = U_I,\; A_0 = \Sigma_I V_I^\top,\; I \sim \binom{[n]}{r},\quad "
    r"W_{t+1} = W_t - B_0 A_0 + B A",
    purpose="A random slice of the weight's own singular vectors trains as A and B; it is kept and another is drawn.",
    venue="ICML 2023 workshop",
    tags=frozenset({"zero_at_init", "mergeable", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r": 8, "every": 0.25, "pick": "random", "train": "AB"},
    cases=({"r": 2, "alpha": 3.0, "every": 4}, {"r": 2, "pick": "top", "train": "B", "every": 5}),
    agreement=(
        "Official linear layer, 40 updates of AdamW with four slices (its top, bottom and window; a and b, a alone, b alone), fp64: "
        "outputs and weights within 5e-14.",
    ),
    differs=(
        "Σ lies in A, the factor of the input, as in the official code, which factors the transposed weight.",
        "'random' is a random subset of the singular vectors; the official code draws a window of neighbours, which can "
        "never begin at the last place (pick='window' draws every window).",
        "What is kept lies in the adapter's own accumulator; the base is not written to.",
        "The official test for a refresh fires at divisors of the epoch; here it fires every so many updates.",
    ),
    limits=(
        "The accumulator is one dense fp32 matrix a site, and each refresh is one full SVD a site: by default only "
        "attention is adapted, as in the published language-model runs.",
        "The rate's schedule goes on across refreshes. Biases train with bias='lora_only'.",
    ),
)


def rosa(r: int = 8, alpha: float | None = None, every: int | float = 0.25, pick: str = "random", train: str = "AB",
         dropout: float = 0.0) -> Method:  # fmt: skip
    """``every``: updates between two slices, or a share of the run below 1; ``pick``: "random", "top", "bottom",
    "window"; ``train``: "AB", "A" or "B"; ``alpha``: None for s = 1."""
    form = Accumulated(ShiftedLoRA(r, float(r) if alpha is None else alpha, dropout, train=train))

    def fill(slot: Slot, seen: Any) -> None:
        if "acc" in slot.roles:
            redraw(slot, pick)

    return Method("rosa", form, (Resample(every, pick),), Targets(include=("attention",)), fill=fill)


def _beyond_rank(broken: bool) -> float:
    """Error on W + a full-rank change, 24 × 24, after 20 slices of rank 2 (broken: one slice for good). No adapter of
    rank 2 is below 0.861."""
    model = proofs.Stack(24, 24)
    change = torch.randn(24, 24, generator=torch.Generator().manual_seed(0)) * 0.3
    x = torch.linalg.qr(torch.randn(24, 24)).Q * 24**0.5
    y = (model(x) + x @ change.mT).detach()
    proofs.train(model, rosa(r=2, every=150), proofs.full_batch(x, y), 3000, lr=3e-3, ticks=not broken,
                 targets=("all-linear",))  # fmt: skip
    return proofs.relative(proofs.learned(model), change)


def _own_subspace(broken: bool) -> float:
    """Largest |A Aᵀ − Σ_I²| off the diagonal and |Bᵀ B − I| right after a slice is drawn (broken: LoRA's start)."""
    from omnilora.core.attach import adapt, slots

    model = proofs.Stack(20, 16)
    made = rosa(r=4)
    adapt(model, made if not broken else Method("rosa", made.parameterization), "all-linear")
    inner = slots(model)[0].inner
    gram_b = inner.B.mT @ inner.B - torch.eye(4)
    gram_a = inner.A @ inner.A.mT
    off = gram_a - torch.diag(gram_a.diagonal())
    return float(torch.stack([gram_b.abs().max(), off.abs().max()]).max().detach())


def claims() -> list[Claim]:
    return [
        Claim("beyond rank r", "twenty slices of rank 2 reach a full-rank change that no rank-2 adapter does", _beyond_rank,
              lambda f: f < 0.3, "one slice for good"),
        Claim("the weight's own directions", "a slice has orthonormal columns in B and orthogonal rows in A", _own_subspace,
              lambda f: f < 1e-4, "LoRA's start"),
    ]  # fmt: skip
