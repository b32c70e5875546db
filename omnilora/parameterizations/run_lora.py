"""RunLoRA — Cherniuk et al., 2023, arXiv:2312.03415.   LoRA's map by the cheapest order of its products."""

from __future__ import annotations

from dataclasses import dataclass

from omnilora.core.context import Context
from omnilora.core.op import Op
from omnilora.core.parameterization import Slot
from omnilora.parameterizations.lora import LoRA
from omnilora.plans.contraction import Planner
from omnilora.plans.planned import Planned


@dataclass(frozen=True)
class RunLoRA(LoRA):
    """``by``: orders by "flops" or by measured "time". With active dropout the tree runs: a dropped x cannot meet W."""

    by: str = "flops"

    @property
    def additive(self) -> bool:
        return True

    def check(self) -> None:
        super().check()
        Planner(self.by).check()

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        if self.dropout and p.training:
            return W + self.delta(p, ctx)
        return Planned(W, self.delta(p, ctx), Planner(self.by))
