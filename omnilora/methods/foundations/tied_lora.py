from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import trainable
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.vera import TiedLoRA

CARD = Card(
    key="tied_lora",
    title="Tied-LoRA: Enhancing parameter efficiency of LoRA with Weight Tying",
    section="foundations",
    kind="parameterization",
    equation=r"W'_\ell = W_\ell + s\,\mathrm{diag}(v_\ell)\, B\,\mathrm{diag}(u_\ell)\, A",
    purpose="One A and B for all layers of a shape, private vectors u and v; each of the four learns or is frozen.",
    arxiv="2311.09578",
    venue="NAACL 2024",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "shared", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 8.0, "train": "ABuv"},
    cases=({"r": 3, "alpha": 5.0}, {"r": 3, "alpha": 4.0, "train": "uv"}, {"r": 2, "alpha": 3.0, "train": "Bu"}),
    differs=(
        "A and B start Kaiming-uniform; the official std-1 normal makes a frozen arm's outputs grow as √(in·r).",
        "The paper's six arms are named by the letters that learn: 'ABuv' is its best, 'uv' is VeRA's.",
        "Zero start: B is zero if it learns (v = 1), else v is zero.",
    ),
)


def tied_lora(r: int = 8, alpha: float = 8.0, dropout: float = 0.0, train: str = "ABuv") -> Method:
    """``train``: the letters of what learns, of A, B (tied) and u, v (private)."""
    return Method("tied_lora", TiedLoRA(r, alpha, dropout, train))


def _gradient(broken: bool) -> float:
    """Gap between the tied A's gradient and the sum over layers of untied ones (broken: only the last layer's)."""
    torch.manual_seed(3)
    model, x = proofs.Stack(10, 10, 10, 10, act=torch.tanh), torch.randn(32, 10)
    adapt(model, tied_lora(r=3))
    with torch.no_grad():
        slots(model)[0].B.normal_()
    model(x).square().sum().backward()
    tied = slots(model)[0].A.grad
    separate = proofs.Stack(10, 10, 10, 10, act=torch.tanh)
    separate.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    adapt(separate, Method("x", LoRA(3, 8.0)))
    with torch.no_grad():
        for s in slots(separate):
            s.A.copy_(slots(model)[0].A)
            s.B.copy_(slots(model)[0].B)
    separate(x).square().sum().backward()
    parts = [s.A.grad for s in slots(separate)]
    return proofs.relative(parts[-1] if broken else torch.stack(parts).sum(0), tied)


def _size(broken: bool) -> float:
    """Trainable numbers over the closed formula A + B + L(u + v) for L = 4 layers (broken: LoRA)."""
    model = proofs.Stack(10, 10, 10, 10, 10)
    adapt(model, Method("x", LoRA(3)) if broken else tied_lora(r=3))
    return sum(t.numel() for t in trainable(model)) / (3 * 10 + 10 * 3 + 4 * (3 + 10))


def claims() -> list[Claim]:
    return [
        Claim("gradient of the tie", "the tied factor receives the sum of all layers' gradients", _gradient,
              lambda f: f < 1e-5, "the last layer's gradient alone"),
        Claim("size", "A and B count once, whatever the depth", _size, lambda f: f == 1, "LoRA of equal rank"),
    ]  # fmt: skip
