from __future__ import annotations

import dataclasses

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import param_groups, start
from omnilora.parameterizations.lora import LoRA
from omnilora.rules.correction import Corrected

CARD = Card(
    key="lora_fa",
    title="LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + \frac{\alpha}{r} B \hat A,\quad \tilde g_B = \tfrac{1}{s^2}\, g_B (\hat A \hat A^\top + \delta I)^{-1}",
    purpose="A stays at its random start, B learns: half the parameters, and only x·Aᵀ is kept for the backward pass.",
    arxiv="2308.03303",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "scheduled", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 16.0, "correction": False},
    cases=({"r": 3, "alpha": 5.0}, {"r": 2, "alpha": 3.0, "correction": True}),
    agreement=("PEFT 0.21.2 (create_lorafa_optimizer): one corrected AdamW step equal within its bfloat16 product.",),
    differs=(
        "Version 1 of the paper only freezes A; the correction is from version 2 and off by default.",
        "PEFT's optimizer recomputes the inverse at each step and in bfloat16; here it is cached in fp32.",
    ),
    limits=("Dropout before A keeps a mask of the input's size: the memory advantage needs dropout 0.",),
)


def lora_fa(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, correction: bool = False, delta: float = 1e-8) -> Method:
    """LoRA whose A does not learn; ``correction`` preconditions B's gradient."""
    return Method("lora_fa", LoRA(r, alpha, dropout, train="B"), (Corrected(delta),) if correction else ())


def _row_space(broken: bool) -> float:
    """Share of ΔW outside the row space of the first A after training (broken: A learns)."""
    model, target = proofs.Stack(16, 20), proofs.planted(20, 16, 4)
    x = torch.randn(64, 16)
    y = (model(x) + x @ target.mT).detach()
    first: list[torch.Tensor] = []
    how = lora_fa(r=4)
    if broken:
        how = dataclasses.replace(how, parameterization=LoRA(4))
    proofs.train(model, how, proofs.full_batch(x, y), 200, watch=lambda run: first.append(run.slots()[0].A.detach().clone()))
    a, change = first[0], proofs.learned(model)
    outside = change - change @ torch.linalg.pinv(a) @ a
    return float(outside.norm() / change.norm())


def _full_step(broken: bool) -> float:
    """Relative gap between one corrected SGD step's ΔW and the projection of the full gradient (broken: no correction)."""
    model, x = proofs.Stack(16, 20), torch.randn(64, 16)
    y = torch.randn(64, 20)
    (model(x) - y).square().sum().backward()
    full = model.layers[0].weight.grad.clone()
    how = lora_fa(r=5, alpha=7.0, correction=True)
    adapt(model, dataclasses.replace(how, rules=()) if broken else how)
    run = start(model, total_steps=1)
    opt = torch.optim.SGD(param_groups(model, 1.0), lr=1.0)
    run.bind(opt)
    (model(x) - y).square().sum().backward()
    opt.step()
    run.finish()
    a = slots(model)[0].A.detach()
    return proofs.relative(proofs.learned(model), -full @ torch.linalg.pinv(a) @ a)


def claims() -> list[Claim]:
    return [
        Claim("row space of A", "ΔW never leaves the row space of the frozen A", _row_space, lambda f: f < 1e-4, "A learns"),
        Claim("projected full step", "a corrected SGD step is the full gradient projected on A", _full_step,
              lambda f: f < 1e-4, "no correction"),
    ]  # fmt: skip
