from __future__ import annotations

import torch

from omnilora import proofs
from omnilora.compose.merging import average, concat, svd
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.core.state import AdapterState, state
from omnilora.parameterizations.lora import LoRA

CARD = Card(
    key="lora_sum",
    title="Weighted sum of low-rank adapters",
    section="frontiers",
    kind="composition",
    equation=r"\Delta W = \sum_i w_i\, s_i B_i A_i = [w_1 s_1 B_1\;\dots]\,[A_1;\dots]",
    purpose="One adapter from several, without training: the exact sum, or its best approximation of a given rank.",
    tags=frozenset({"combines", "low_rank", "additive"}),
    defaults={"rank": None},
    cases=({}, {"rank": 3}),
    differs=("Averages of A and B apart (FedAvg, LoraHub) are another map: omnilora.compose.merging.average.",),
    limits=("Adapters must be additive and low-rank; DoRA is lowered first by ol.export(rank=…).",),
)


def lora_sum(rank: int | None = None) -> Method:
    """``rank`` None: the exact sum, of the sum of the ranks. Otherwise the best approximation of that rank, by SVD."""
    return Method("lora_sum", None, combine=concat if rank is None else lambda s, w: svd(s, w, rank))


def _two() -> tuple[list[AdapterState], torch.Tensor]:
    """Two adapters of one layer, and 0.5 ΔW₁ − 1.5 ΔW₂."""
    model = proofs.Stack(12, 10)
    states, total = [], torch.zeros(10, 12)
    for i, w in enumerate((0.5, -1.5)):
        adapt(model, Method("lora", LoRA(2, 3.0)), name=str(i))
        with torch.no_grad():
            slots(model, str(i))[0].B.normal_()
        states.append(state(model, str(i)))
        total = total + w * proofs.learned(model, adapter=str(i))
    return states, total


def _product(made: AdapterState) -> torch.Tensor:
    t = made.sites["layers.0"].tensors
    return t["B"] @ t["A"]


def _exact(broken: bool) -> float:
    """Relative gap of the combination to the sum of the updates (broken: A and B averaged apart)."""
    states, total = _two()
    return proofs.relative(_product((average if broken else concat)(states, [0.5, -1.5])), total)


def _best(broken: bool) -> float:
    """Squared error of rank 2 over the Eckart–Young residual (broken: the first adapter alone, also of rank 2)."""
    states, total = _two()
    made = concat(states[:1], [0.5]) if broken else svd(states, [0.5, -1.5], 2)
    sigma = torch.linalg.svdvals(total)
    return float((_product(made) - total).square().sum() / sigma[2:].square().sum())


def claims() -> list[Claim]:
    return [
        Claim("exact sum", "the combination is Σ w ΔW to round-off", _exact, lambda f: f < 1e-5, "A and B averaged apart"),
        Claim("best of its rank", "rank 2 loses the Eckart–Young residual and no more", _best,
              lambda f: abs(f - 1) < 1e-3, "the first adapter alone"),
    ]  # fmt: skip
