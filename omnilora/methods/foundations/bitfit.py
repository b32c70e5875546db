from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.core.attach import base_state_dict, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import Parameterization
from omnilora.core.site import Site
from omnilora.core.targets import Targets
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.scaling import Shift

CARD = Card(
    key="bitfit",
    title="BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
    section="foundations",
    kind="parameterization",
    equation=r"b' \text{ learns},\quad W' = W",
    purpose="Trains the biases of the model and nothing else.",
    arxiv="2106.10199",
    venue="ACL 2022",
    tags=frozenset({"zero_at_init", "mergeable", "trains_lm"}),
    defaults={"create": None},
    cases=({}, {"create": True}),
    differs=("Biases train as the adapter's own copies: the base stays as it is, and the result is a file to switch.",),
    limits=(
        "A model without biases (Llama and most of its family) has nothing that the paper would train: every linear layer gets a "
        "new one, zero at the start, and a warning says so. create=False raises instead, create=True also fills the gaps of a "
        "model that has some.",
        "A created bias does not merge: the layer has no place to hold it.",
        "The paper's smaller choice, the biases of queries and of the middle of the feed-forward, is unfreeze patterns with "
        "another method, not an option here.",
        "Own biases are whole tensors: rows of one batch cannot differ.",
    ),
)


def bitfit(create: bool | None = None) -> Method:
    """Every bias of the model as an own copy; ``create``: and a new one for linear layers that have none. None: only where
    no linear layer of the model has one."""
    if create is False:
        return Method("bitfit", None, targets=Targets(include=(), bias="all"), rate=5.0)
    return Method("bitfit", Shift(), targets=Targets(bias="all"), arrange=without_bias if create else where_none_is, rate=5.0)


def where_none_is(sites: Sequence[Site], how: Parameterization) -> list[Parameterization | None]:
    if any(s.store.offset is not None for s in sites):
        return [None] * len(sites)
    warnings.warn("No linear layer has a bias: each gets a new one, zero at the start, which does not merge.", stacklevel=2)
    return [how] * len(sites)


def without_bias(sites: Sequence[Site], how: Parameterization) -> list[Parameterization | None]:
    return [how if s.store.offset is None else None for s in sites]


class _Net(nn.Module):
    """Two layers with biases and a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.norm(self.up(x))))


def _moved(broken: bool) -> float:
    """Share of the adapter's numbers that are biases, 0 if any weight of the base moved (broken: LoRA)."""
    model, x, y = _Net(), torch.randn(64, 8), torch.randn(64, 4)
    before = {k: v.clone() for k, v in base_state_dict(model).items()}
    proofs.train(model, Method("x", LoRA(1)) if broken else bitfit(), proofs.full_batch(x, y), 3,
                 targets=("up", "down") if broken else None)  # fmt: skip
    after = base_state_dict(model)
    if any(not torch.equal(before[k], after[k]) for k in before):
        return 0.0
    trained = [(s.site.name, t.numel()) for s in slots(model) for _, t in s.tensors()]
    return sum(n for name, n in trained if name.endswith("bias")) / sum(n for _, n in trained)


def _shifted(broken: bool) -> float:
    """Relative error on a teacher that differs in its biases, with 36 numbers (broken: LoRA of rank 1, 44 numbers)."""
    model, teacher, x = _Net(), _Net(), torch.randn(256, 8)
    teacher.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer in (teacher.up, teacher.norm, teacher.down):
            layer.bias.add_(torch.randn_like(layer.bias))
        base, y = model(x), teacher(x)
    how = Method("x", LoRA(1, 1.0)) if broken else bitfit()
    proofs.train(model, how, proofs.full_batch(x, y), 800, lr=2e-2, targets=("up", "down") if broken else None)
    return proofs.relative(model(x) - base, y - base)


def _created(broken: bool) -> float:
    """Relative error on a layer without a bias whose target has one, with 12 numbers (broken: LoRA of rank 1, 28 numbers)."""
    model, x = proofs.Stack(16, 12), torch.randn(256, 16)
    base = model(x).detach()
    y = base + torch.linspace(-1.0, 1.0, 12)
    how = Method("x", LoRA(1, 1.0)) if broken else bitfit(create=True)
    proofs.train(model, how, proofs.full_batch(x, y), 400, lr=2e-2, targets=("layers.0",) if broken else None)
    return proofs.relative(model(x) - base, y - base)


def claims() -> list[Claim]:
    return [
        Claim("biases only", "all that trains is a bias, and the base does not move", _moved, lambda f: f == 1, "LoRA"),
        Claim("a target in the biases", "a teacher with other biases is learnt", _shifted, lambda f: f < 0.1,
              "LoRA of more numbers"),
        Claim("a bias where none is", "create=True learns a shift of a layer without a bias", _created, lambda f: f < 1e-2,
              "LoRA of more numbers"),
    ]  # fmt: skip
