from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.context import Context
from omnilora.core.method import Card, Claim, Method
from omnilora.core.op import softmax
from omnilora.core.run import Run
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.mixture import MixtureOfLoRA
from omnilora.rules.balance import Balance

CARD = Card(
    key="molora",
    title="Pushing Mixture of Experts to the Limit: MoLORA",
    section="frontiers",
    kind="routing",
    equation=r"y = W x + \frac{\alpha}{r} \sum_e p_e(x)\, B_e A_e x,\quad p = \mathrm{softmax}(R x)",
    purpose="A token-level soft mixture of small LoRAs with a router at each site; no task ids.",
    arxiv="2309.05444",
    venue="ICLR 2024",
    tags=frozenset({"zero_at_init", "additive", "routed", "trains_lm", "rows"}),
    defaults={"experts": 10, "r": 4, "alpha": 16.0, "top_k": None, "balance": 0.0},
    cases=({"experts": 3, "r": 2, "alpha": 5.0}, {"experts": 4, "r": 2, "alpha": 3.0, "top_k": 2}),
    not_with={"merge": "The map depends on the token, so no weight equals it."},
    differs=(
        "α = 16 is a constant of the official class; it is the default here.",
        "top_k multiplies by the mask without renormalizing, as the official code.",
        "A convolution's router reads one token per image: its mean over space.",
    ),
    limits=("The paper's optimizer is Adafactor at 3e-4 for 500k steps; the trainer's default is AdamW.",),
)


def molora(
    experts: int = 10,
    r: int = 4,
    alpha: float = 16.0,
    dropout: float = 0.0,
    top_k: int | None = None,
    balance: float = 0.0,
) -> Method:
    """``balance`` > 0 adds the Switch load-balancing loss over the routers' logits."""
    rules = (Balance(balance),) if balance else ()
    return Method("molora", MixtureOfLoRA(r, alpha, dropout, experts, top_k), rules)


def _two_kinds(n: int = 512) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of two kinds, told by their first feature, whose targets contradict each other on the rest."""
    x = torch.randn(n, 16)
    kind = torch.arange(n) % 2
    x[:, 0] = torch.where(kind == 0, 3.0, -3.0)
    m = proofs.planted(16, 16, 2)
    m[:, 0] = 0
    return x, x @ m.mT * torch.where(kind == 0, 1.0, -1.0).unsqueeze(1), kind, m


def _contradiction(broken: bool) -> float:
    """Loss left over the loss at the start, on two contradicting kinds of tokens (broken: LoRA of equal total rank)."""
    model = proofs.Stack(16, 16)
    x, change, _, _ = _two_kinds()
    y = (model(x) + change).detach()
    start = float(change.square().mean())
    how = Method("x", LoRA(8, 16.0)) if broken else molora(experts=4, r=2, alpha=4.0)
    proofs.train(model, how, proofs.full_batch(x, y), 800, lr=1e-2)
    return float((model(x) - y).square().mean()) / start


def _shares(broken: bool) -> float:
    """Largest share of tokens on one of four experts, from a router that starts collapsed (broken: coefficient 0)."""
    model, x = proofs.Stack(16, 16), torch.randn(512, 16)
    x[:, 0] = 1.0

    def collapse(run: Run) -> None:
        if run.step == 1:
            (s,) = slots(model)
            with torch.no_grad():
                s.R[0, 0] = 4.0

    how = molora(experts=4, r=2, alpha=4.0, balance=1.0)
    if broken:
        how = dataclasses.replace(how, rules=(Balance(0.0),))
    proofs.train(model, how, proofs.full_batch(x, model(x).detach()), 300, lr=3e-2, watch=collapse)
    (s,) = slots(model)
    return float(torch.bincount((x @ s.R.mT).argmax(-1), minlength=4).max()) / len(x)


def _gates(broken: bool) -> float:
    """Gap between the layer and Σ_e p_e s B_e A_e x spelled out expert by expert (broken: p from another token)."""
    model = proofs.Stack(16, 16)
    adapt(model, molora(experts=3, r=2, alpha=5.0))
    (s,) = slots(model)
    x = torch.randn(32, 16)
    with torch.no_grad():
        for _, t in s.tensors():
            t.add_(0.3 * torch.randn_like(t))
        p = softmax((x.roll(1, 0) if broken else x) @ s.R.mT)
        y = s.site.layer.weight.new_zeros(32, 16)
        for e in range(3):
            a, b = s.A[2 * e : 2 * e + 2], s.B[:, 2 * e : 2 * e + 2]
            y = y + p[:, e : e + 1] * (5.0 / 2) * (x @ a.mT @ b.mT)
        return proofs.relative(s.how.delta(s, Context())(x), y)


def claims() -> list[Claim]:
    return [
        Claim("contradicting tokens", "tokens of two kinds with opposite targets are both served", _contradiction,
              lambda f: f < 0.05, "LoRA of equal total rank"),
        Claim("balanced experts", "the balance loss spreads tokens over the experts", _shares, lambda f: f < 0.6,
              "coefficient 0"),
        Claim("mixture per token", "each token is mixed by its own gates", _gates, lambda f: f < 1e-5,
              "gates of the neighbouring token"),
    ]  # fmt: skip
