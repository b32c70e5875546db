"""A start that moves nothing: ΔW = s (B A − B₀ A₀), for initializations that take a part out of W (PiSSA, ROSA …).

The base stays as it is: what others subtract from W is subtracted in the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import Slot, Tensors, own
from omnilora.core.site import Site
from omnilora.errors import NotExpressible
from omnilora.parameterizations.lora import LoRA


@dataclass(frozen=True)
class ShiftedLoRA(LoRA):
    """``A0``, ``B0``: the factors at the start, frozen. B A − B₀ A₀ = (B − B₀) A + B₀ (A − A₀), which is zero at the start bit
    for bit. Dropout acts on the difference, so that it moves nothing either."""

    def frozen(self) -> frozenset[str]:
        return super().frozen() | {"A0", "B0"}

    def rank(self) -> int:
        return 2 * self.r

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if self.r > min(site.fan_out, site.fan_in):
            raise NotExpressible(f"{site.name} has no {self.r} directions to start from.",
                                 f"Take r ≤ {min(site.fan_out, site.fan_in)} there.")  # fmt: skip
        made = super().init(site, seen)
        A, B = (made[n].value for n in "AB")  # type: ignore[union-attr]
        return Tensors({**made, "A0": own(A.clone()), "B0": own(B.clone())})

    def delta(self, p: Slot, ctx: Context) -> Op:
        B = torch.cat((p.B - p.B0, p.B0), -1)  # (out, 2r)
        A = torch.cat((p.A, p.A - p.A0), -2)  # (2r, in)
        return p.scale * chain(B, A, Dropout(self.dropout, p.training))


def start_at(slot: Slot, B: Tensor, A: Tensor) -> None:
    """Let a slot of this form start at ΔW₀ = B A (its scale included), which it subtracts."""
    root = slot.scale**0.5
    copy_start(slot, B / root, A / root)


def copy_start(slot: Slot, B: Tensor, A: Tensor) -> None:
    """Let a slot start with these factors: ΔW₀ = s B A, which it subtracts."""
    for name, value in (("A", A), ("B", B)):
        for t in (slot.get_parameter(name), slot.get_parameter(f"{name}0")):
            t.copy_(value.to(t))
