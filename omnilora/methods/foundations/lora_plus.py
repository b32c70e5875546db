from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import param_groups, start
from omnilora.parameterizations.lora import LoRA
from omnilora.rules.rates import Rates

CARD = Card(
    key="lora_plus",
    title="LoRA+: Efficient Low Rank Adaptation of Large Models",
    section="foundations",
    kind="optimizer",
    equation=r"\eta_B = \lambda\,\eta_A",
    purpose="B learns λ times faster than A: equal rates cannot make both factors learn features in wide models.",
    arxiv="2402.12354",
    venue="ICML 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 16.0, "ratio": 16.0},
    cases=({"r": 3, "alpha": 5.0, "ratio": 4.0},),
    agreement=("PEFT 0.21.2 (create_loraplus_optimizer): the same tensors at the same rates.",),
    differs=(
        "Groups follow the roles of tensors, not their names; weight decay is the trainer's.",
        "Factors on embeddings use the absolute rate 1e-6, as the official code; embedding_lr=None gives them η and λη.",
        "The ratio 16 is the paper's first guess; the official README shows 20.",
    ),
)


def lora_plus(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, ratio: float = 16.0, scaling: str = "alpha/r",
              embedding_lr: float | None = 1e-6) -> Method:  # fmt: skip
    """LoRA with the rate of B ``ratio`` times that of A."""
    return Method("lora_plus", LoRA(r, alpha, dropout, scaling), (Rates(ratio, embedding_lr),))


def _first_step(broken: bool) -> float:
    """‖ΔB‖ after one SGD step at λ = 8 over that of plain LoRA (broken: λ = 1)."""
    moved = []
    for ratio in (1.0, 1.0 if broken else 8.0):
        torch.manual_seed(0)
        model, x = proofs.Stack(16, 20), torch.randn(32, 16)
        adapt(model, lora_plus(r=4, ratio=ratio))
        run = start(model, total_steps=1)
        opt = torch.optim.SGD(param_groups(model, 0.1), lr=0.1)
        run.bind(opt)
        model(x).square().mean().backward()
        opt.step()
        run.finish()
        moved.append(float(slots(model)[0].B.norm()))
    return moved[1] / moved[0]


def _steps(n: int, ratio: float) -> int:
    """Sign-descent steps of f = b (aᵀx) at width n until ½(f − 3)² < 0.045, η_A = 0.02 / n."""
    torch.manual_seed(0)
    x = torch.randint(0, 2, (n,)).float() * 2 - 1
    a, b = torch.randn(n) / n**0.5, torch.zeros(())
    rate = 0.02 / n
    for step in range(1, 20_000):
        f = b * (a @ x)
        if 0.5 * (f - 3) ** 2 < 0.045:
            return step
        ga, gb = (f - 3) * b * x, (f - 3) * (a @ x)
        a, b = a - rate * ga.sign(), b - ratio * rate * gb.sign()
    return 20_000


def _width(broken: bool) -> float:
    """Steps at width 1024 over steps at width 64, with λ = n/4 (broken: λ = 1)."""
    return _steps(1024, 1.0 if broken else 256.0) / _steps(64, 1.0 if broken else 16.0)


def claims() -> list[Claim]:
    return [
        Claim("first step of B", "one step moves B λ times farther", _first_step, lambda f: abs(f - 8) < 1e-3, "λ = 1"),
        Claim("steps independent of width", "with λ ∝ n the number of steps does not grow with the width", _width,
              lambda f: f < 1.5, "λ = 1"),
    ]  # fmt: skip
