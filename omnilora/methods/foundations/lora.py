from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="lora",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    section="foundations",
    kind="parameterization",
    equation=r"W' = W + \frac{\alpha}{r} B A",
    purpose="A frozen base and a trainable rank-r product beside it: the baseline of everything else.",
    arxiv="2106.09685",
    venue="ICLR 2022",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 16.0, "dropout": 0.0},
    cases=({"r": 3, "alpha": 5.0}, {"r": 2, "alpha": 3.0, "dropout": 0.1}),
    agreement=("PEFT 0.21.2: forward and gradients equal to 1e-5 on the same tensors (tests/test_agreement.py).",),
    differs=(
        "Official code merges inside eval(); here merging is explicit and restores stored originals.",
        "The Conv1d and Conv3d classes of the official code work for kernel 1 only; here every kernel does. Its 2-D "
        "layout is offered as conv_layout='loralib'.",
        "One A for all groups of a grouped convolution, so that the stored kernel is W + reshape(B A).",
        "The README's 0.8M for RoBERTa-base counts the classification head; the adapter alone has 294,912.",
    ),
)


def lora(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, init_A: str = "kaiming", conv_layout: str = "peft") -> Method:
    """W' = W + (α/r) B A with A Kaiming-uniform and B zero at the start."""
    return Method("lora", LoRA(r, alpha, dropout, init_A=init_A, conv_layout=conv_layout))


def _recovered(broken: bool) -> float:
    """Relative error after training on a target of rank 4, with rank 4 (broken: rank 3)."""
    model, target = proofs.Stack(16, 20), proofs.planted(20, 16, 4)
    x = torch.linalg.qr(torch.randn(64, 16)).Q * 8
    y = model(x).detach() + x @ target.mT
    proofs.train(model, lora(r=3 if broken else 4, alpha=4.0), proofs.full_batch(x, y), 600, lr=3e-2)
    return proofs.relative(proofs.learned(model), target)


def _residual(broken: bool) -> float:
    """Best loss of rank 2 on whitened inputs over the Eckart–Young residual Σ_{i>2} σ_i² (broken: a frozen A)."""
    model, target = proofs.Stack(16, 20), proofs.planted(20, 16, 5)
    x = torch.linalg.qr(torch.randn(64, 16)).Q * 8
    y = model(x).detach() + x @ target.mT
    how = Method("lora", LoRA(2, 2.0, train="B" if broken else "AB"))
    proofs.train(model, how, proofs.full_batch(x, y), 1500, lr=2e-2)
    sigma = torch.linalg.svdvals(target)
    return float((proofs.learned(model) - target).square().sum() / sigma[2:].square().sum())


def claims() -> list[Claim]:
    return [
        Claim("rank-4 target recovered", "r ≥ k reaches a rank-k target, r < k cannot", _recovered, lambda f: f < 1e-3,
              "rank 3 on a target of rank 4"),
        Claim("Eckart–Young residual", "for r < k the best loss is Σ_{i>r} σ_i²", _residual, lambda f: abs(f - 1) < 1e-2,
              "A does not learn"),
    ]  # fmt: skip
