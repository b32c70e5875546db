from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import adapt, slots
from omnilora.core.families import FFN_DOWN, KEY, VALUE, layers
from omnilora.core.merge import merge
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import Parameterization
from omnilora.core.site import Site
from omnilora.core.targets import Targets
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.scaling import IA3

CARD = Card(
    key="ia3",
    title="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning ((IA)³)",
    section="foundations",
    kind="parameterization",
    equation=r"k \leftarrow l_k \odot k,\quad v \leftarrow l_v \odot v,\quad W_{down}(l_{ff} \odot h)",
    purpose="Three vectors a block rescale keys, values and the inner activations of the feed-forward.",
    arxiv="2205.05638",
    venue="NeurIPS 2022",
    tags=frozenset({"zero_at_init", "mergeable", "trains_lm", "rows"}),
    defaults={"side": None},
    cases=({"side": "output"}, {"side": "input"}),
    agreement=("PEFT 0.21.2, both sides: forward and gradients equal to 1e-5 (tests/test_agreement_relatives.py).",),
    differs=("Cross-attention's keys and values are targeted like all others.",),
    limits=(
        "Fused projections have no layer of their own for keys and values: name blocks of them, such as c_attn[1/3] and "
        "c_attn[2/3].",
        "An input-side vector needs a layer whose input is a row of features: no embeddings, no grouped convolutions.",
    ),
)


def ia3(side: str | None = None) -> Method:
    """``side``: "output" or "input" for all layers; None: input for layers that leave the feed-forward, output for others."""
    targets = Targets((layers(KEY), layers(VALUE), layers(FFN_DOWN)))
    return Method("ia3", IA3(side or "output"), targets=targets, arrange=None if side else by_side, rate=10.0)


def by_side(sites: Sequence[Site], how: Parameterization) -> list[Parameterization]:
    """l_ff stands before the layer that leaves the feed-forward, l_k and l_v after theirs."""
    down = re.compile(layers(FFN_DOWN)[3:])
    return [replace(how, side="input" if down.fullmatch(s.name.partition("[")[0]) else "output") for s in sites]  # type: ignore[call-arg]


def _columns(broken: bool) -> float:
    """Relative error on a target W diag(l), with 20 numbers (broken: LoRA of rank 1, 36 numbers)."""
    model = proofs.Stack(20, 16)
    target = model.layers[0].weight.detach() * (1.5 * torch.rand(20) - 0.5)
    x = torch.linalg.qr(torch.randn(64, 20)).Q * 8
    y = (model(x) + x @ target.mT).detach()
    how = Method("x", LoRA(1, 1.0)) if broken else ia3(side="input")
    proofs.train(model, how, proofs.full_batch(x, y), 500, lr=3e-2, targets=("layers.0",))
    return proofs.relative(proofs.learned(model), target)


def _whole_output(broken: bool) -> float:
    """Gap of the merged layer's output to l ⊙ (W x + b) (broken: to l ⊙ W x + b)."""
    model, x = proofs.Stack(12, 10, bias=True), torch.randn(9, 12)
    y, bias = model(x).detach(), model.layers[0].bias.detach().clone()
    adapt(model, ia3(side="output"), ["layers.0"])
    shake(model)
    l = slots(model)[0].l.detach()
    merge(model)
    return proofs.relative(model(x).detach(), l * (y - bias) + bias if broken else l * y)


def claims() -> list[Claim]:
    return [
        Claim("rescaled columns", "a rescaling of what the layer reads is learnt with `in` numbers", _columns,
              lambda f: f < 1e-3, "LoRA of more numbers"),
        Claim("the bias too", "keys and values are rescaled as they leave the layer", _whole_output, lambda f: f < 1e-5,
              "a bias that keeps its value"),
    ]  # fmt: skip
