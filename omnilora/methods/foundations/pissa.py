from __future__ import annotations

import torch
from torch import Tensor

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import finite, positive_rank
from omnilora.errors import BadValue
from omnilora.initializers.pissa import principal
from omnilora.initializers.starting import shifted
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.shifted import ShiftedLoRA

CARD = Card(
    key="pissa",
    title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    section="foundations",
    kind="initialization",
    equation=r"W' = W + s\,(B A - B_0 A_0),\quad s\,B_0 A_0 = U_r \Sigma_r V_r^\top,\quad W = U \Sigma V^\top",
    purpose="The principal singular triplets of the weight itself train; the rest of the weight stays frozen.",
    arxiv="2404.02948",
    venue="NeurIPS 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 128, "alpha": None, "dropout": 0.0},
    cases=({"r": 2, "alpha": 3.0}, {"r": 3, "niter": 4}),
    differs=(
        "The official code writes W − B₀A₀ over the base; here the base stays and B₀A₀ is subtracted in the forward, so that "
        "the first forward is the base's bit for bit. A saved adapter is a LoRA of rank 2r for PEFT.",
    ),
    agreement=(
        "PEFT 0.21.2, init_lora_weights='pissa' and α ≠ r: A, B up to the sign of each triplet, and outputs after a change of "
        "both factors, 1e-5 in fp32.",
    ),
    limits=(
        "Over a quantized base the triplets are those of the dequantized weight; QPiSSA, which quantizes W − B₀A₀ anew, would "
        "write to the base.",
        "One full SVD a site; niter=16 takes the randomized one. A₀ and B₀ double the tensors that are saved.",
        "Dropout acts on the difference, so that training starts at the base; the official code has it on B A alone.",
    ),
)


def pissa(r: int = 16, alpha: float | None = None, dropout: float = 0.0, niter: int | None = None) -> Method:
    """``alpha``: None for s = 1, as in the paper; ``niter``: subspace iterations of a fast SVD, None for the exact one."""
    positive_rank(r)
    if niter is not None and (not isinstance(niter, int) or niter < 0):
        raise BadValue(f"niter = {niter!r}.", "Give a number of iterations ≥ 0, or None for the exact SVD.")
    form = ShiftedLoRA(r, float(r) if alpha is None else alpha, dropout)
    finite(form.alpha, "alpha", 1e-12)
    return Method("pissa", form, fill=shifted(lambda W, r, seen: principal(W, r, niter)))


def _falling(n: int) -> Tensor:
    """A weight whose singular values fall as 4/k."""
    u, v = (torch.linalg.qr(torch.randn(n, n)).Q for _ in range(2))
    return (4 * u / torch.arange(1, n + 1)) @ v.mT


def _energy(broken: bool) -> float:
    """Share of the most that rank 4 can hold of ‖W‖², in s B A at the start (broken: the smallest triplets)."""
    model = proofs.Stack(24, 24)
    with torch.no_grad():
        model.layers[0].weight.copy_(_falling(24))
    made = pissa(r=4, alpha=6.0)
    if broken:
        made = Method("pissa", made.parameterization, fill=shifted(lambda W, r, seen: _smallest(W, r)))
    adapt(model, made)
    (s,) = slots(model)
    W = s.site.W.dense()
    best = torch.linalg.svdvals(W)[:4].square().sum()
    return float((s.scale * s.B @ s.A).square().sum() / best)


def _smallest(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    return u[:, -r:] * s[-r:], vh[-r:]


def _speed(broken: bool) -> float:
    """Error that is left of a change of W's principal triplets after 20 steps (broken: LoRA of equal size and scale)."""
    model = proofs.Stack(32, 32)
    W = _falling(32)
    u, s, vh = torch.linalg.svd(W)
    change = (u[:, :4] * (0.5 * s[:4])) @ vh[:4].roll(1, 0)
    with torch.no_grad():
        model.layers[0].weight.copy_(W)
    x = torch.randn(256, 32)
    y = (model(x) + x @ change.mT).detach()
    made = Method("lora", LoRA(4, 4.0)) if broken else pissa(r=4)
    proofs.train(model, made, proofs.full_batch(x, y), 20, lr=5e-3)
    return proofs.relative(proofs.learned(model), change)


def claims() -> list[Claim]:
    return [
        Claim("principal part", "s B A holds all that a matrix of rank r can hold of W", _energy, lambda f: f > 0.9999,
              "the smallest triplets"),
        Claim("faster", "twenty steps learn most of a change of the principal triplets", _speed, lambda f: f < 0.6,
              "LoRA of equal size, scale and rate"),
    ]  # fmt: skip
