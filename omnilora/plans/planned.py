"""A sum of a layer's own map and a low-rank one that is applied by the planned contraction where that is the same map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omnilora.core.op import Geometry, Sum, like
from omnilora.plans.contraction import Planner, contract


@dataclass(frozen=True, eq=False)
class Planned(Sum):
    """left + right, right with factors. Everything but the forward of a plain dense layer is the sum's own: other layers and
    stores, mixed batches, compilation, autocast and function transforms."""

    planner: Planner = Planner()

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        weight = self.left.plain_weight
        if weight is None or weight.dtype != x.dtype or x.numel() == 0 or _traced(x):
            return super().apply(x, geo)
        ba = self.right.factors()
        if ba is None:
            return super().apply(x, geo)
        return contract(x, weight, like(ba[1], x), like(ba[0], x), self.left.offset, self.planner)


def _traced(x: Tensor) -> bool:
    return (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
            or torch._C._functorch.peek_interpreter_stack() is not None)  # fmt: skip
