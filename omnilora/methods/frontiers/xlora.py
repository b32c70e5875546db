from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.compose.merging import concat
from omnilora.core.attach import adapt, slots
from omnilora.core.files import load_file
from omnilora.core.method import Card, Claim, Method
from omnilora.core.parameterization import Slot
from omnilora.core.run import trainable
from omnilora.core.state import AdapterState, delta, state
from omnilora.core.targets import Targets
from omnilora.errors import BadValue
from omnilora.parameterizations.experts import Experts, LastHiddenGates
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="xlora",
    title="X-LoRA: Mixture of Low-Rank Adapter Experts",
    section="applications",
    kind="composition",
    equation=r"y = W x + \gamma \sum_e s_e B_e A_e (\sigma_e \odot x),\quad \sigma = \mathrm{head}(H_{base})",
    purpose="Mixes frozen adapters token by token with scalings predicted from the base model's last hidden state.",
    arxiv="2402.07148",
    venue="APL Machine Learning 2024",
    tags=frozenset({"routed", "additive", "trains_lm"}),
    defaults={"depth": 1, "hidden": 2048, "dropout": 0.2, "softmax": True, "temperature": 1.0, "top_k": None,
              "layerwise": False},
    cases=(),
    not_with={"kv_cache": "Both passes see the whole sequence; generate with use_cache=False."},
    differs=(
        "Top-k and its softmax are per token; the original flattens the batch first.",
        "The first pass runs with adapters off (scaling_pass_value 0).",
        "Experts may have any ranks; one rank for each expert over all its sites.",
    ),
    limits=("The experts themselves stay frozen (use_trainable_adapters=False).",),
)  # fmt: skip


def xlora(
    adapters: Sequence[str | Path | AdapterState] = (),
    depth: int = 1,
    hidden: int = 2048,
    dropout: float = 0.2,
    softmax: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    layerwise: bool = False,
    read: str = "",
) -> Method:
    """``adapters``: folders or states of the experts. Only the head that predicts the scalings learns."""
    if all(isinstance(a, str) and a.startswith("sha256:") for a in adapters):
        return Method("xlora", None)  # a saved adapter holds its experts; it names them by content
    states = [a if isinstance(a, AdapterState) else load_file(a) for a in adapters]
    names = tuple(dict.fromkeys(n for s in states for n in s.sites))
    ranks = tuple(_rank(s) for s in states)

    def fill(slot: Slot, seen: Any) -> None:
        if slot.site.kind == "source":
            return
        b, a = torch.zeros_like(slot.B), torch.zeros_like(slot.A)
        at = 0
        for s, r in zip(states, ranks):
            if slot.site.name in s.sites:
                ba = delta(s.sites[slot.site.name], s).factors()
                assert ba is not None
                b[:, at : at + r], a[at : at + r] = ba[0], ba[1]
            at += r
        with torch.no_grad():
            slot.A.copy_(a)
            slot.B.copy_(b)

    source = LastHiddenGates(len(states), names, depth, hidden, dropout, softmax, temperature, top_k, layerwise, read)
    return Method("xlora", Experts(ranks), targets=Targets(include=names), source=source, fill=fill,
                  hyper={"adapters": tuple(f"sha256:{s.content()}" for s in states)})  # fmt: skip


def _rank(s: AdapterState) -> int:
    ranks = {site.how.rank() for site in s.sites.values()}
    if len(ranks) != 1 or 0 in ranks:
        raise BadValue(f"An expert has ranks {sorted(ranks)}.", "Each expert needs one rank over all its sites.")
    return ranks.pop()


class _Reader(nn.Module):
    """Features → body (adapted) → head; the token's kind is in its features, so the hidden state tells it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
        nn.init.eye_(self.body.weight)
        nn.init.eye_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _world() -> tuple[_Reader, list[AdapterState], Tensor, Tensor]:
    """Two experts, each right on the tokens of its kind."""
    x = torch.randn(64, 4, 12)
    kind = torch.rand(64, 4) < 0.5
    x[..., 0] = torch.where(kind, 3.0, -3.0)
    experts, y = [], torch.zeros(64, 4, 12)
    for e in range(2):
        model, target = _Reader(), proofs.planted(12, 12, 2, seed=e)
        adapt(model, Method("lora", LoRA(2, 2.0)), ["body"])
        u, sigma, vt = torch.linalg.svd(target)
        with torch.no_grad():
            slots(model)[0].B.copy_(u[:, :2] * sigma[:2])
            slots(model)[0].A.copy_(vt[:2])
        experts.append(state(model))
        y = torch.where((kind == (e == 0)).unsqueeze(-1), x + x @ target.mT, y)
    return _Reader(), experts, x, y


def _picks(broken: bool) -> float:
    """Loss of the trained mixture over that of the base (broken: gates that are constant over tokens)."""
    model, experts, x, y = _world()
    start = float((model(x) - y).square().mean())
    how = xlora(experts, temperature=1e6 if broken else 1.0, dropout=0.0)
    proofs.train(model, how, proofs.full_batch(x, y), 400, lr=3e-2)
    return float((model(x) - y).square().mean()) / start


def _one_hot(broken: bool) -> float:
    """Gap between gates held on expert 1 and that expert alone (broken: on expert 0)."""
    model, experts, x, _ = _world()
    adapt(model, xlora(experts))
    with torch.no_grad():
        head = next(s for s in slots(model) if s.site.kind == "source")
        head.w0.zero_()
        head.b0.copy_(torch.tensor([50.0, -50.0] if broken else [-50.0, 50.0]))
        alone = concat([experts[1]], [1.0]).sites["body"].tensors
        want = x + x @ (alone["B"] @ alone["A"]).mT
        return proofs.relative(model(x), want)


def _head_only(broken: bool) -> float:
    """Trainable numbers over (d + 1)·N (broken: experts trained as one LoRA)."""
    model, experts, _, _ = _world()
    adapt(model, Method("x", LoRA(4)) if broken else xlora(experts))
    return sum(t.numel() for t in trainable(model)) / (13 * 2)


def claims() -> list[Claim]:
    return [
        Claim("the right expert per token", "the trained head sends each token to its expert", _picks, lambda f: f < 0.02,
              "gates constant over tokens"),
        Claim("one-hot scalings", "σ on one expert is that adapter exactly", _one_hot, lambda f: f < 1e-5,
              "σ on the other expert"),
        Claim("only the head learns", "(d + 1)·N trainable numbers", _head_only, lambda f: f == 1, "plain LoRA"),
    ]  # fmt: skip
