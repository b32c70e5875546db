from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import trainable
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="rslora",
    title="A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + \frac{\alpha}{\sqrt{r}} B A",
    purpose="Scaling by 1/√r, so that larger ranks keep learning instead of shrinking their own update.",
    arxiv="2312.03732",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 16.0},
    cases=({"r": 3, "alpha": 5.0},),
    agreement=("PEFT 0.21.2 (use_rslora): forward and gradients equal to 1e-5 on the same tensors.",),
    differs=("There is no official code; every site uses its own rank in the root (rank overrides).",),
)


def rslora(r: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> Method:
    """LoRA with s = α/√r."""
    return Method("rslora", LoRA(r, alpha, dropout, scaling="alpha/sqrt(r)"))


def _flatness(broken: bool) -> float:
    """RMS change of the output after one SGD step on B at r = 1024 over that at r = 64 (broken: s = α/r)."""
    moved = []
    for r in (64, 1024):
        torch.manual_seed(1)
        model, x = proofs.Stack(96, 96), torch.randn(256, 96)
        adapt(model, Method("x", LoRA(r, 16.0, scaling="alpha/r" if broken else "alpha/sqrt(r)")))
        before = model(x)
        loss = (before * torch.randn_like(before)).sum() / 256
        opt = torch.optim.SGD(trainable(model), lr=1.0)
        loss.backward()
        opt.step()
        moved.append(float((model(x) - before).detach().square().mean().sqrt()))
    return moved[1] / moved[0]


def _deep(broken: bool) -> float:
    """Loss at r = 64 over loss at r = 4, after equal steps at one small rate on a full-rank target: below 1 when rank helps."""
    loss = []
    for r in (4, 64):
        torch.manual_seed(2)
        model, x = proofs.Stack(64, 64), torch.randn(256, 64)
        y = (model(x) + x @ (torch.randn(64, 64) / 8).mT).detach()
        how = Method("x", LoRA(r, 8.0, scaling="alpha/r" if broken else "alpha/sqrt(r)"))
        proofs.train(model, how, proofs.full_batch(x, y), 60, lr=0.5, optimizer=torch.optim.SGD)
        loss.append(float((model(x) - y).square().mean()))
    return loss[1] / loss[0]


def claims() -> list[Claim]:
    return [
        Claim("first step independent of rank", "one SGD step moves outputs by O(1) for every r", _flatness,
              lambda f: 0.5 < f < 2.0, "scaling by α/r"),
        Claim("rank helps at a fixed rate", "at a fixed learning rate a larger rank reaches a lower loss", _deep,
              lambda f: f < 0.9, "scaling by α/r"),
    ]  # fmt: skip
