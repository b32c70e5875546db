from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.context import Context
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import trainable
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.tensor_train import TensorTrain, modes, train_of

CARD = Card(
    key="tt_lora",
    title="Tensor Train Low-rank Approximation (TT-LoRA): Democratizing AI with Accelerated LLMs",
    section="foundations",
    kind="parameterization",
    equation=r"\Delta W[j, i] = \alpha\, G_1[i_1] \cdots G_p[i_p]\, H_1[j_1] \cdots H_q[j_q]",
    purpose="The whole update of a layer is one tensor train: far fewer numbers than rank-1 LoRA.",
    arxiv="2408.01008",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"rank": 5, "alpha": 16.0, "limit": 16, "zero": True},
    cases=({"rank": 2, "alpha": 3.0, "limit": 3},),
    agreement=(
        "Code of the group's later repository, fp64: its contraction on inputs whose digits are reversed, four shapes, outputs and "
        "gradients of all cores within 5e-14; its reconstruction, which puts the output's modes first, on the transposed layer, two "
        "shapes, within 9e-14.",
    ),
    differs=(
        "Contraction and reconstruction are one map here. In the group's code they are two: the contraction reads the input's digits "
        "from the last, the reconstruction puts the modes of the output first.",
        "The last core starts at zero, so that the model is unchanged; zero=False gives the code's start.",
        "Modes are found by factoring both sides into factors of at most `limit`; the code has tables by size.",
    ),
    limits=(
        "The original 2024 code was not found; the group's later repositories are the reference.",
        "The default rate is five times LoRA's, the 5e-3 of the group's runs: 20 updates of SmolLM2-135M lower the loss by 0.61, and "
        "by 0.06 at LoRA's rate.",
    ),
)


def tt_lora(rank: int = 5, alpha: float = 16.0, dropout: float = 0.0, limit: int = 16, zero: bool = True) -> Method:
    """``rank``: every inner rank of the train; the scale is α itself."""
    return Method("tt_lora", TensorTrain(rank, alpha, dropout, limit, zero), rate=5.0)


def _kron(broken: bool) -> float:
    """Error on a target of inner ranks 1, with 17 numbers (broken: an unstructured rank-1 target)."""
    best = 1.0
    for seed in range(3):
        torch.manual_seed(seed)
        model = proofs.Stack(24, 15)
        u, v = torch.ones(1), torch.ones(1)
        for n in modes(24, 4):
            u = torch.kron(u, torch.randn(n))
        for n in modes(15, 4):
            v = torch.kron(v, torch.randn(n))
        if broken:
            u, v = torch.randn(24), torch.randn(15)
        target = torch.outer(v / v.norm(), u / u.norm()) * 3
        x = torch.linalg.qr(torch.randn(64, 24)).Q * 8
        y = (model(x) + x @ target.mT).detach()
        proofs.train(model, tt_lora(rank=1, alpha=1.0, limit=4, zero=False), proofs.full_batch(x, y), 800, lr=3e-2)
        best = min(best, proofs.relative(proofs.learned(model), target))
    return best


def _entries(broken: bool) -> float:
    """Largest gap of ΔW to the product of core slices, entry by entry (broken: indices column-major)."""
    model = proofs.Stack(12, 10)
    adapt(model, tt_lora(rank=3, alpha=2.0, limit=4, zero=False))
    (s,) = slots(model)
    g, h = train_of(s, "G"), train_of(s, "H")
    change = s.how.delta(s, Context()).dense().detach()
    worst = 0.0
    for j in range(10):
        for i in range(12):
            t = torch.ones(1, 1)
            for cores, index in ((g, i), (h, j)):
                sizes = [c.shape[1] for c in cores]
                at = torch.unravel_index(torch.tensor(index), sizes[::-1] if broken else sizes)
                for c, k in zip(cores, at[::-1] if broken else at):
                    t = t @ c[:, int(k)]
            worst = max(worst, float((2.0 * t.squeeze() - change[j, i]).abs().detach()))
    return worst


def _size(broken: bool) -> float:
    """Trainable numbers on 768 × 768 at rank 5 over those of rank-1 LoRA (broken: LoRA)."""
    with torch.device("meta"):
        model = proofs.Stack(768, 768)
    adapt(model, Method("x", LoRA(1)) if broken else tt_lora())
    return sum(t.numel() for t in trainable(model)) / 1536


def claims() -> list[Claim]:
    return [
        Claim("structured target", "a target of inner ranks 1 is reached with the sum of its factors' sizes", _kron,
              lambda f: f < 1e-3, "an unstructured target of rank 1"),
        Claim("index convention", "entries are products of core slices, row-major, input modes first", _entries,
              lambda f: f < 1e-5, "column-major indices"),
        Claim("size", "fewer numbers than rank-1 LoRA", _size, lambda f: f < 1, "rank-1 LoRA"),
    ]  # fmt: skip
