from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from omnilora import proofs
from omnilora.attention.hook import Call
from omnilora.contract import shake
from omnilora.core.attach import adapt, slots
from omnilora.core.families import ATTENTION_OUT, FFN_DOWN, FFN_UP, KEY, QKV, QUERY, VALUE, layers
from omnilora.core.merge import merge
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import Parameterization, one_of
from omnilora.core.site import Site
from omnilora.core.targets import Targets
from omnilora.parameterizations.attention_prefix import Prefix
from omnilora.parameterizations.bottleneck import PLACES, Bottleneck
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="llm_adapters",
    title="LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning of Large Language Models",
    section="foundations",
    kind="parameterization",
    equation=r"\text{series: } h \leftarrow h + c\,U\phi(D h)\qquad \text{parallel: } y = W x + c\,U\phi(D x)",
    purpose="Series and parallel bottlenecks, virtual keys and values, and LoRA behind one configuration, with the placement of the study.",
    arxiv="2304.01933",
    venue="EMNLP 2023",
    tags=frozenset({"zero_at_init", "trains_lm", "rows"}),
    defaults={"kind": "series", "m": 256, "phi": "tanh", "scale": 1.0, "start": "zero", "r": 32, "alpha": 64.0},
    cases=(
        {"kind": "series", "place": "series-in", "m": 3, "scale": 0.7},
        {"kind": "series", "place": "series-out", "m": 3, "scale": 0.7, "phi": "relu", "learned": True},
        {"kind": "parallel", "m": 3, "scale": 0.7},
    ),
    agreement=(
        "Official code (bottleneck.Linear, all three adapter types) on the same tensors: forward and gradients of D and U "
        "equal to 1e-6 in fp32.",
    ),
    differs=(
        "The paper places series adapters after attention and feed-forward; the code attaches them to single linear layers "
        "(input side of gate and up, output side of down). The code is followed; loretta_adp has the paper's places.",
        "Parallel adapters stand beside each linear layer, not beside a block, as in the code.",
        "The code starts D and U at N(0, 0.02²), which is no identity: that is start='normal'; the default is U = 0.",
        "A bottleneck computes in the layer's dtype; the official code computes it in fp32.",
        "Math10K contains parts of MAWPS: the README's correction applies to its scores.",
    ),
    limits=(
        "Not mergeable with a nonlinearity; kind='lora' and phi='identity' are.",
        "A prefix acts in attention layers of transformers (sdpa or eager), on all rows of a batch alike. Positions of real "
        "tokens are not shifted; for rotary models a shift only turns what the prefix learns.",
    ),
)


def _series(h: dict[str, Any]) -> Method:
    """Input side of the layers that enter the feed-forward, output side of the one that leaves it."""
    place = h["place"]
    how = Bottleneck(h["m"], place or "series-out", h["phi"], h["scale"], h["dropout"] or 0.0, h["learned"], h["start"])
    return Method("llm_adapters", how, targets=Targets((layers(FFN_UP, FFN_DOWN),)), arrange=None if place else by_side)


def _parallel(h: dict[str, Any]) -> Method:
    how = Bottleneck(h["m"], "parallel", h["phi"], h["scale"], h["dropout"] or 0.0, h["learned"], h["start"])
    return Method("llm_adapters", how, targets=Targets((layers(QUERY, KEY, VALUE, QKV),)))


def _lora(h: dict[str, Any]) -> Method:
    how = LoRA(h["r"], h["alpha"], 0.05 if h["dropout"] is None else h["dropout"])
    return Method("llm_adapters", how, targets=Targets((layers(QUERY, KEY, VALUE, QKV, FFN_UP, FFN_DOWN),)))


def _prefix(h: dict[str, Any]) -> Method:
    how = Prefix(h["tokens"], h["hidden"])
    return Method("llm_adapters", how, targets=Targets(("block:attention-layer",)), rate=30.0)


KINDS: dict[str, Callable[[dict[str, Any]], Method]] = {
    "series": _series, "parallel": _parallel, "lora": _lora, "prefix": _prefix}  # fmt: skip


def by_side(sites: Sequence[Site], how: Parameterization) -> list[Parameterization]:
    """After the layers that leave attention or the feed-forward, before all other linear ones."""
    leaves = re.compile(layers(ATTENTION_OUT, FFN_DOWN)[3:])
    after = [s.kind != "linear" or leaves.fullmatch(s.name.partition("[")[0]) is not None for s in sites]
    return [replace(how, place="series-out" if a else "series-in") for a in after]  # type: ignore[call-arg]


def llm_adapters(kind: str = "series", m: int = 256, phi: str = "tanh", scale: float = 1.0, dropout: float | None = None,
                 start: str = "zero", learned: bool = False, place: str | None = None, r: int = 32,
                 alpha: float = 64.0, tokens: int = 10, hidden: int = 0) -> Method:  # fmt: skip
    """One adapter of the family.

    ``kind``: "series", "parallel" (width ``m``, nonlinearity ``phi``, factor ``scale``, ``learned`` from there or not),
    "lora" (``r``, ``alpha``; dropout 0.05 unless given) or "prefix" (``tokens`` virtual keys and values in every attention
    layer, through an embedding and two layers of width ``hidden`` if that is above 0). ``place`` of a series adapter:
    "series-in" or "series-out" for all layers; None: by the side on which a layer stands.
    """
    one_of(kind, "kind", *KINDS)
    if place is not None:
        one_of(place, "place", *PLACES[:2])
    return KINDS[kind](dict(m=m, phi=phi, scale=scale, dropout=dropout, start=start, learned=learned, place=place, r=r, alpha=alpha,
                            tokens=tokens, hidden=hidden))


def _bounded(broken: bool) -> float:
    """‖f(1000 x)‖ / ‖f(100 x)‖ of a parallel adapter's part of the output (broken: LoRA)."""
    model = proofs.Stack(16, 12)
    x = torch.randn(32, 16)
    base = [model(s * x).detach() for s in (100.0, 1000.0)]
    adapt(model, llm_adapters("lora", r=4, dropout=0.0) if broken else llm_adapters("parallel", m=4), ["layers.0"])
    shake(model)
    small, large = (model(s * x).detach() - b for s, b in zip((100.0, 1000.0), base))
    return float(large.norm() / small.norm())


def _merged(broken: bool) -> float:
    """Largest gap of merged outputs at all three places with φ = identity to the formula (broken: one without the bias)."""
    worst, c = 0.0, 0.7
    for kind, place in (("series", "series-in"), ("series", "series-out"), ("parallel", None)):
        model, x = proofs.Stack(16, 12, bias=True), torch.randn(32, 16)
        W, b = model.layers[0].weight.detach().clone(), model.layers[0].bias.detach().clone()
        adapt(model, llm_adapters(kind, m=4, phi="identity", scale=c, place=place), ["layers.0"])
        shake(model)
        (s,) = slots(model)
        merge(model)
        with torch.no_grad():
            inner = x + c * x @ s.D.mT @ s.U.mT if place == "series-in" else x
            z = inner @ W.mT + (0 if broken else b)
            read = z if place == "series-out" else x
            want = z if place == "series-in" else z + c * read @ s.D.mT @ s.U.mT
            worst = max(worst, proofs.relative(model(x), want))
    return worst


def _nonlinear(broken: bool) -> float:
    """Relative error on a target W x + U tanh(D x) with m = 3 (broken: LoRA of equal size)."""
    model = proofs.Stack(12, 12)
    D, U, x = torch.randn(3, 12), torch.randn(12, 3), torch.randn(256, 12)
    change = torch.tanh(x @ D.mT) @ U.mT
    y = (model(x) + change).detach()
    how = llm_adapters("lora", r=3, alpha=3.0, dropout=0.0) if broken else llm_adapters("parallel", m=3)
    proofs.train(model, how, proofs.full_batch(x, y), 1000, lr=3e-2, targets=("layers.0",))
    return float((model(x) - y).norm() / change.norm())


def _mixture(broken: bool) -> float:
    """Largest error of attention with a prefix against (1 − λ) attn(K, V) + λ attn(P_k, P_v), λ the prefix's share of the
    softmax (broken: λ = ½)."""
    q, k, v, pk, pv = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (5, 6, 6, 3, 3))
    call = Call(torch.nn.Identity(), q, k, v, None).with_keys(pk[0].movedim(0, 1), pv[0].movedim(0, 1))
    weights = torch.softmax(q @ call.k.mT, -1)
    share = 0.5 if broken else weights[..., :3].sum(-1, keepdim=True)
    parts = torch.softmax(q @ k.mT, -1) @ v, torch.softmax(q @ pk.mT, -1) @ pv
    return float((weights @ call.v - (1 - share) * parts[0] - share * parts[1]).abs().max())


def claims() -> list[Claim]:
    return [
        Claim("bounded", "a tanh bottleneck saturates: ten times the input, the same addition", _bounded,
              lambda f: abs(f - 1) < 0.2, "kind = 'lora'"),
        Claim("exact merge of linear adapters", "W + cUD, W(I + cUD) and (I + cUD)W, the bias too", _merged,
              lambda f: f < 1e-5, "a formula without the bias"),
        Claim("nonlinear target", "an addition with a nonlinearity is learnt", _nonlinear, lambda f: f < 0.05,
              "LoRA of equal size"),
        Claim("a prefix mixes", "virtual keys take their share of the softmax", _mixture, lambda f: f < 1e-12, "a share of one half"),
    ]  # fmt: skip
