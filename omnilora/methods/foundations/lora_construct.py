from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from omnilora import proofs
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.lora import LoRA
from omnilora.theory.construct import error_bound, linear_chain, product, relu_network, smallest_rank
from omnilora.theory.transformer import adapt_to, adapters_of, random_network

CARD = Card(
    key="lora_construct",
    title="The Expressive Power of Low-Rank Adaptation",
    section="foundations",
    kind="theory",
    equation=r"\min_{\mathrm{rank} \le R} \big\| \bar W - \textstyle\prod_l (W_l + B_l A_l) \big\|_2 "
    r"= \sigma_{RL+1}\big(\bar W - \prod_l W_l\big)",
    purpose="Adapters in closed form, without training: the smallest rank that turns a network into a given other one.",
    arxiv="2310.17513",
    venue="ICLR 2024",
    tags=frozenset({"mergeable", "low_rank", "additive", "applies", "rows"}),
    defaults={"tolerance": 1e-6, "rank": None},
    cases=(),
    command="omnilora apply --method lora_construct --model MODEL --set hyper.target=OTHER --output runs/difference",
    differs=(
        "Solves in fp64 in place of inverting in fp32, where the official code is off by up to 1e-3.",
        "The official names are turned: its lora_A is B here, its lora_B is Aᵀ.",
    ),
    limits=(
        "The exact theorems are about linear chains, ReLU networks and the paper's Transformer (no residual, norm or scale): "
        "omnilora.theory.construct and omnilora.theory.transformer.",
        "For a pair of real models each matrix is taken by itself: the rank that its difference needs, which is sufficient "
        "for the whole model; fewer may do where consecutive layers are linear.",
    ),
)


def lora_construct(target: str | None = None, tolerance: float = 1e-6, rank: int | None = None) -> Method:
    """``target``: the other model, a folder or a name, of the same architecture; ``tolerance``: of each matrix, relative to
    its norm; ``rank``: the largest rank, None for what the tolerance needs."""

    def work(job: Any) -> Mapping[str, Any]:
        from omnilora.theory.report import construct_pair

        return construct_pair(job, target, tolerance, rank)

    return Method("lora_construct", LoRA(1, 1.0), apply=work)


def _chain(width: int, depth: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    W = [torch.randn(width, width, dtype=torch.float64) for _ in range(depth)]
    return W, torch.randn(width, width, dtype=torch.float64)


def _adapted(W: list[torch.Tensor], goal: torch.Tensor, rank: int) -> float:
    made = linear_chain(W, goal, rank)
    reached = product([w + B @ A for w, (B, A) in zip(W, made.factors, strict=True)], goal.shape[0])
    return float(torch.linalg.matrix_norm(reached - goal, 2))


def _exact(broken: bool) -> float:
    """Spectral error over ‖W̄‖ of four layers of width 12 with adapters of rank 3 = 12/4 (broken: rank 2)."""
    W, goal = _chain(12, 4)
    assert smallest_rank(W, goal) == 3
    return _adapted(W, goal, 2 if broken else 3) / float(torch.linalg.matrix_norm(goal, 2))


def _bound(broken: bool) -> float:
    """Spectral error over σ_{RL+1}(E) for R = 4, L = 2, D = 12 (broken: adapters trained by gradient descent)."""
    W, goal = _chain(12, 2)
    if not broken:
        return _adapted(W, goal, 4) / error_bound(W, goal, 4)
    model = proofs.Stack(12, 12, 12)
    with torch.no_grad():
        for layer, w in zip(model.layers, W):
            layer.weight.copy_(w)
    x = torch.eye(12) * 4
    proofs.train(model, Method("lora", LoRA(4, 4.0)), proofs.full_batch(x, x @ goal.float().mT), 800, lr=2e-2)
    reached = (model(torch.eye(12)).detach().mT).double()
    return float(torch.linalg.matrix_norm(reached - goal, 2)) / error_bound(W, goal, 4)


def _relu(broken: bool) -> float:
    """Largest error of a two-layer ReLU network on fresh inputs, target one layer, D = 8, R = 4 (broken: offsets of zero)."""
    W, goal = _chain(8, 2)
    c, x = torch.randn(8, dtype=torch.float64), torch.randn(512, 8, dtype=torch.float64)
    made = relu_network(W, [torch.zeros(8)] * 2, [goal], [c], 4, x)
    new = torch.randn(64, 8, dtype=torch.float64)
    h = new
    for w, (B, A), b in zip(W, made.factors, made.offsets, strict=True):
        h = torch.relu(h @ (w + B @ A).mT + (0.0 if broken else b))
    return float((h - torch.relu(new @ goal.mT + c)).abs().max())


def _transformer(broken: bool) -> float:
    """Largest error of a Transformer of two blocks, D = 8, with rank ⌈D/2⌉ = 4 (broken: rank 3)."""
    g = torch.Generator().manual_seed(0)
    frozen, goal = random_network(8, 2, 2, g), random_network(8, 2, 2, g)
    made = adapt_to(frozen, goal, 3 if broken else 4)
    assert max(adapters_of(frozen, made)) <= 4
    x = torch.randn(8, 5, dtype=torch.float64, generator=g)
    return float((made(x) - goal(x)).abs().max() / goal(x).abs().max())


def claims() -> list[Claim]:
    return [
        Claim("exact from R ≥ rank(E)/L on", "four layers of width 12 reach any target with rank 3", _exact, lambda f: f < 1e-9,
              "one rank less"),
        Claim("the best possible below", "the error is σ_{RL+1}(E), which trained adapters do not reach", _bound,
              lambda f: abs(f - 1) < 1e-8, "adapters trained by gradient descent"),
        Claim("ReLU networks", "offsets keep units active, so that a deep network equals a shallow one", _relu,
              lambda f: f < 1e-9, "no offsets"),
        Claim("Transformers", "rank D/2 turns one Transformer into another", _transformer, lambda f: f < 1e-8, "one rank less"),
    ]  # fmt: skip
