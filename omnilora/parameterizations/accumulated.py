"""An additive parameterization over what it has learnt before: ΔW = ΔW_acc + ΔW_inner, the base untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omnilora.core.context import Context
from omnilora.core.full import Dense
from omnilora.core.op import Op
from omnilora.core.parameterization import Parameterization, Slot, Tensors, Wrapper, own, zeros
from omnilora.core.site import Site
from omnilora.parameterizations.lora import LoRA


@dataclass(frozen=True)
class Accumulated(Wrapper):
    """``acc`` (out, in) holds what restarts have folded; it does not learn by gradient."""

    inner: Parameterization = LoRA()

    def frozen(self) -> frozenset[str]:
        return super().frozen() | {"acc"}

    def rank(self) -> int:
        return 0

    def init(self, site: Site, seen: Any = None) -> Tensors:
        return Tensors(inner=self.inner.init(site, seen), acc=own(zeros(site.fan_out, site.fan_in)))

    def delta(self, p: Slot, ctx: Context) -> Op:
        return Dense(p.acc) + self.inner.delta(p.inner, ctx)
