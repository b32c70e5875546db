from __future__ import annotations

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.run import trainable
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.tucker import Tucker

CARD = Card(
    key="lotr",
    title="LoTR: Low Tensor Rank Weight Adaptation",
    section="foundations",
    kind="parameterization",
    equation=r"W'_\ell = W_\ell + \tfrac{\alpha}{r}\, B\, G_\ell\, A",
    purpose="The updates of all layers as one tensor in Tucker-2 form: tied outer factors, a small core for each layer.",
    arxiv="2402.01376",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "shared", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 1.0, "group": "shape"},
    cases=({"r": 3, "alpha": 5.0}, {"r": 2, "alpha": 3.0, "group": "type"}),
    agreement=("Official LoTRLinear on the same tensors, fp64: outputs and gradients within 3e-16.",),
    differs=("All sites of a shape share by default, as the published code's one container for q and v; "
             "group='type' shares by projection name.",),
    limits=(
        "The gradient of a core grows as √(in·out): train with Adam, not plain SGD.",
        "The svd start and the projection optimizers of the official repository (unfinished there) are not offered.",
    ),
)  # fmt: skip


def lotr(r: int = 8, alpha: float = 1.0, dropout: float = 0.0, group: str = "shape") -> Method:
    """ΔW = (α/r) B G A with A, B tied."""
    return Method("lotr", Tucker(r, alpha, dropout, group))


class _Layers(nn.Module):
    """Eight 12×12 layers side by side that read the same x."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def _left(how: Method, tied: bool = True) -> tuple[float, int]:
    """(relative loss left, parameters) on targets that share row and column spaces of dimension 2 (or do not)."""
    model, x = _Layers(), torch.randn(128, 12)
    u, v = torch.linalg.qr(torch.randn(12, 2)).Q, torch.linalg.qr(torch.randn(12, 2)).Q
    targets = [u @ torch.randn(2, 2) @ v.mT if tied else proofs.planted(12, 12, 2, seed=k) for k in range(8)]
    y = (model(x) + torch.cat([x @ t.mT for t in targets], -1)).detach()
    start = float((model(x) - y).square().mean())
    proofs.train(model, how, proofs.full_batch(x, y), 1500, lr=2e-2)
    return float((model(x) - y).square().mean()) / start, sum(t.numel() for t in trainable(model))


def _shared(broken: bool) -> float:
    """Loss left with 80 parameters for eight layers (broken: the targets' spaces are unrelated)."""
    left, count = _left(lotr(r=2, alpha=2.0), tied=not broken)
    assert count == 80
    return left


def _stacked(broken: bool) -> float:
    """Rank of all updates side by side (broken: LoRAs of equal rank)."""
    model = _Layers()
    adapt(model, Method("x", LoRA(2)) if broken else lotr(r=2))
    with torch.no_grad():
        for s in slots(model):
            for name, t in s.tensors():
                if name not in s.shared or s is slots(model)[0]:
                    t.normal_()
    return float(torch.linalg.matrix_rank(torch.cat([proofs.learned(model, f"layers.{i}") for i in range(8)])))


def claims() -> list[Claim]:
    return [
        Claim("shared subspaces", "80 numbers fit eight layers whose changes share their spaces", _shared,
              lambda f: f < 1e-4, "unrelated spaces"),
        Claim("tensor rank", "the stack of all updates has rank r", _stacked, lambda f: f == 2, "LoRAs of equal rank"),
    ]  # fmt: skip
