from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnilora import proofs
from omnilora.core.attach import adapt, detach, slots
from omnilora.core.method import Card, Claim, Method, prepare
from omnilora.core.observe import DeltaEnergy, observe
from omnilora.core.parameterization import is_additive
from omnilora.core.run import trainable
from omnilora.core.targets import Targets, targets_from
from omnilora.errors import BadValue
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.vera import TiedLoRA

CARD = Card(
    key="lora_drop",
    title="LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation",
    section="foundations",
    kind="procedure",
    equation=r"I_i = \frac{\sum_x \lVert \Delta W_i x \rVert^2}{\sum_j \sum_x \lVert \Delta W_j x \rVert^2};\quad "
    r"\text{keep the prefix of descending } I \text{ with } \textstyle\sum I \ge T",
    purpose="Trains a probe on a sample, gives the sites with large outputs their own LoRA and all others one shared pair.",
    arxiv="2402.07721",
    venue="COLING 2025",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "shared", "trains_lm", "rows"}),
    defaults={"r": 8, "alpha": 16.0, "threshold": 0.9, "probe_steps": 50, "others": "share", "per": "type"},
    cases=(),
    differs=(
        "There is no official code. The second stage starts afresh, the probe is thrown away.",
        "Importance is normalized within a projection type (per='type'), or over all sites (per='model').",
    ),
    limits=("The share of the data that probes is the caller's: ol.prepare gets the batches to look at.",),
)


def lora_drop(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, threshold: float = 0.9, probe_steps: int = 50,
              probe_lr: float = 1e-3, others: str = "share", per: str = "type") -> Method:  # fmt: skip
    """``others``: what sites below the threshold get: "share" one pair by projection type, or "drop" them."""
    if not 0 < threshold <= 1 or others not in ("share", "drop") or per not in ("type", "model"):
        raise BadValue(f"threshold = {threshold!r}, others = {others!r}, per = {per!r}.",
                       "0 < threshold ≤ 1; others 'share' or 'drop'; per 'type' or 'model'.")  # fmt: skip

    def decide(model: nn.Module, made: Method, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor],
               targets: Targets | None) -> tuple[Method, Targets]:  # fmt: skip
        where = targets_from(targets)
        energy = probe(model, Method("probe", LoRA(r, alpha)), where, batches, loss, probe_steps, probe_lr)
        kept = keep_set(energy, threshold, per)
        rest = [n for n in energy if n not in kept]
        change = {"skip": True} if others == "drop" else {"method": TiedLoRA(r, alpha, dropout, "AB", "type")}
        overrides = dict(where.overrides)
        if rest:
            overrides["re:" + "|".join(re.escape(n) for n in rest)] = change
        chosen = dataclasses.replace(where, overrides=overrides)
        return Method("lora_drop", LoRA(r, alpha, dropout), targets=chosen), chosen

    return Method("lora_drop", LoRA(r, alpha, dropout), prepare=decide)


def probe(model: nn.Module, method: Method, targets: Targets, batches: Sequence[Any],
          loss: Callable[[nn.Module, Any], Tensor], steps: int, lr: float) -> dict[str, float]:  # fmt: skip
    """Σ ‖ΔW x‖² of every site after a short training of plain LoRA; the model comes back as it was."""
    adapt(model, method, targets, name="probe")
    try:
        model.train()
        opt = torch.optim.AdamW(trainable(model, "probe"), lr=lr, weight_decay=0.0)
        for step in range(steps):
            opt.zero_grad()
            loss(model, batches[step % len(batches)]).backward()
            opt.step()
        forms = [s for s in slots(model, "probe") if is_additive(s.how)]  # a new head is none
        seen = observe(model, forms, batches, loss, {"energy": DeltaEnergy})
    finally:
        detach(model, "probe")
    return {name: stats["energy"] for name, stats in seen.items()}


def keep_set(energy: dict[str, float], threshold: float, per: str) -> set[str]:
    """The shortest prefix of descending importance whose sum reaches ``threshold``, in each group."""
    groups: dict[str, list[str]] = {}
    for name in energy:
        groups.setdefault(name.split(".")[-1] if per == "type" else "", []).append(name)
    kept = set()
    for names in groups.values():
        total, so_far = sum(energy[n] for n in names), 0.0
        for name in sorted(names, key=lambda n: -energy[n]):
            if so_far >= threshold * total or energy[name] == 0:
                break
            kept.add(name)
            so_far += energy[name]
    return kept


class _Residual(nn.Module):
    """Six residual tanh layers of width 16."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(16, 16)}) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer["fc"](x))
        return x


def _task() -> tuple[_Residual, Tensor, Tensor]:
    """A teacher that differs from the student by rank-2 changes in layers 1 and 4 only."""
    model, teacher = _Residual(), _Residual()
    teacher.load_state_dict(model.state_dict())
    with torch.no_grad():
        for i in (1, 4):
            teacher.layers[i]["fc"].weight.add_(proofs.planted(16, 16, 2, seed=i))
        x = torch.randn(512, 16)
        return model, x, teacher(x)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def _finds(broken: bool) -> float:
    """Share of importance on the two layers that need a change (broken: probed on shuffled targets)."""
    model, x, y = _task()
    y = y[torch.randperm(512)] if broken else y
    energy = probe(model, Method("probe", LoRA(4, 4.0)), Targets(), [(x[:64], y[:64])], _loss, 300, 1e-2)
    return sum(energy[f"layers.{i}.fc"] for i in (1, 4)) / sum(energy.values())


def _enough(broken: bool) -> float:
    """Loss after the second stage (broken: two other layers are kept)."""
    model, x, y = _task()
    made, chosen = prepare(model, lora_drop(r=4, alpha=4.0, probe_steps=300, probe_lr=1e-2), [(x[:64], y[:64])], _loss)
    if broken:
        share = TiedLoRA(4, 4.0, 0.0, "AB", "type")
        chosen = Targets(overrides={r"re:layers\.[1245]\.fc": {"method": share}})
    adapt(model, made, chosen)
    opt = torch.optim.Adam(trainable(model), lr=1e-2)
    for _ in range(800):
        opt.zero_grad()
        loss = _loss(model, (x, y))
        loss.backward()
        opt.step()
    return float(loss.detach())


def claims() -> list[Claim]:
    return [
        Claim("importance finds the layers", "the layers that need a change have nearly all output energy", _finds,
              lambda f: f > 0.9, "targets shuffled against inputs"),
        Claim("kept layers suffice", "two own pairs and a shared one learn what six pairs would", _enough,
              lambda f: f < 0.02, "two wrong layers kept"),
    ]  # fmt: skip
