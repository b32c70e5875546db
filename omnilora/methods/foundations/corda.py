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
from omnilora.initializers.corda import MODES, Covariance, oriented
from omnilora.initializers.starting import seen_by, shifted, watched
from omnilora.parameterizations.shifted import ShiftedLoRA

CARD = Card(
    key="corda",
    title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models",
    section="foundations",
    kind="initialization",
    equation=r"W' = W + s\,(B A - B_0 A_0),\quad s\,B_0 A_0 = U_I \Sigma_I V_I^\top C^{-1},\quad W C = U \Sigma V^\top,\quad "
    r"C = X X^\top",
    purpose="Singular triplets of W seen through its inputs: the largest learn the task, or the smallest spare old knowledge.",
    arxiv="2406.05223",
    venue="NeurIPS 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 128, "alpha": 128.0, "mode": "knowledge"},
    cases=({"r": 2, "alpha": 3.0}, {"r": 2, "mode": "knowledge"}),
    differs=(
        "The paper's C is X Xᵀ; the official code divides each batch by its largest entry and averages, which is followed: it "
        "decides how the product is divided between A and B, not the product.",
        "The base stays; s B₀A₀ is subtracted in the forward instead of from W.",
    ),
    agreement=(
        "PEFT 0.21.2, preprocess_corda with 'ipm' and 'kpm', α ≠ r: s B A, A and B up to sign and outputs after a change of both, "
        "1e-4 in fp32.",
    ),
    limits=(
        "mode='knowledge' needs data of what must not be forgotten; the command line shows the training data. One (in, in) "
        "matrix a site is held while the data is read.",
        "Embeddings, grouped convolutions and weights that another layer reads get LoRA's start, with a warning.",
    ),
)


def corda(r: int = 16, alpha: float | None = None, dropout: float = 0.0, mode: str = "instruction") -> Method:
    """``mode``: "instruction" (the largest triplets, data of the task) or "knowledge" (the smallest, data to keep);
    ``alpha``: None for s = 1."""
    one_of(mode, "mode", *MODES)
    form = ShiftedLoRA(r, float(r) if alpha is None else alpha, dropout)
    form.check()
    finite(form.alpha, "alpha", 1e-12)

    def look(model: nn.Module, made: Method, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor],
             targets: Targets | None) -> tuple[Method, Targets | None]:  # fmt: skip
        _, seen = watched(model, made, batches, loss, targets, Covariance)
        fill = shifted(lambda W, r, C: oriented(W, r, C, mode), needs_data=True)
        return seen_by(made, seen, fill=fill), targets

    return Method("corda", form, prepare=look)


def _error(mode: str, broken: bool) -> float:
    """‖(W − K) X‖ / ‖W X‖ on the data seen, with K what is kept: all but the adapter's part, or the adapter's part
    (broken: an identity in place of the inputs' covariance, plain SVD)."""
    model = proofs.Stack(24, 24)
    x = proofs.falling(512, 24)
    shown = torch.eye(24) if broken else x
    adapt(model, *prepare(model, corda(r=8, mode=mode), [(shown, torch.zeros(len(shown), 24))], proofs.squared))
    (s,) = slots(model)
    W = s.site.W.dense().detach()
    part = (s.scale * s.B @ s.A).detach()
    lost = part if mode == "knowledge" else W - part
    return float((x @ lost.mT).norm() / (x @ W.mT).norm())


def claims() -> list[Claim]:
    return [
        Claim("knowledge is spared", "without the adapter's part the outputs on the data stay", lambda b: _error("knowledge", b),
              lambda f: f < 0.08, "plain SVD"),
        Claim("the task is captured", "the adapter's part alone makes the outputs on the data", lambda b: _error("instruction", b),
              lambda f: f < 0.3, "plain SVD"),
    ]  # fmt: skip
