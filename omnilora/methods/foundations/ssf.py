from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.core.method import Card, Claim, Method
from omnilora.core.targets import Targets
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.scaling import IA3, SSF

CARD = Card(
    key="ssf",
    title="Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning",
    section="foundations",
    kind="parameterization",
    equation=r"y' = \gamma \odot (W x + b) + \beta",
    purpose="A scale and a shift for every output of a layer, folded into weight and bias afterwards.",
    arxiv="2210.08823",
    venue="NeurIPS 2022",
    tags=frozenset({"zero_at_init", "mergeable", "trains_lm", "rows"}),
    defaults={"std": 0.0, "norms": True},
    cases=({},),
    differs=(
        "The paper draws γ ~ N(1, 0.02²) and β ~ N(0, 0.02²), which moves the model at the start: std=0.02 does that; the "
        "default is the identity.",
        "A scale and shift after a norm is a norm with another weight and bias: norms train as own copies. A norm without a "
        "bias (RMSNorm) gets no shift.",
    ),
    limits=(
        "A shift merges into a layer that has a bias; a layer without one refuses to merge.",
        "Embeddings have no place for a shift. There is no peer to compare with: the map is tested against its formula.",
    ),
)


def ssf(std: float = 0.0, norms: bool = True) -> Method:
    """``std``: deviation of γ around 1 and β around 0 at the start; ``norms``: norms train as own copies."""
    return Method("ssf", SSF(std), targets=Targets(unfreeze=("norm",) if norms else ()), rate=5.0)


def _error(how: Method) -> float:
    """Relative error of outputs on a target γ ⊙ W x + β."""
    model, x = proofs.Stack(16, 12), torch.randn(256, 16)
    base = model(x).detach()
    y = base * torch.linspace(0.2, 2.0, 12) + torch.linspace(-1.0, 1.0, 12)
    proofs.train(model, how, proofs.full_batch(x, y), 600, lr=2e-2, targets=("layers.0",))
    return float((model(x) - y).norm() / (base - y).norm())


def _both(broken: bool) -> float:
    """With 24 numbers (broken: scales alone)."""
    return _error(Method("x", IA3()) if broken else ssf(norms=False))


def _more_than_lora(broken: bool) -> float:
    """With 24 numbers (broken: LoRA of rank 1, 28 numbers)."""
    return _error(Method("x", LoRA(1, 1.0)) if broken else ssf(norms=False))


def claims() -> list[Claim]:
    return [
        Claim("scale and shift", "both parts of the target are learnt", _both, lambda f: f < 1e-2, "no shift"),
        Claim("one number an output", "every output is rescaled and moved on its own", _more_than_lora, lambda f: f < 1e-2,
              "LoRA of more numbers"),
    ]  # fmt: skip
