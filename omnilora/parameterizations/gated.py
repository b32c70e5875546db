"""LoRA with a gate for each rank — SoRA, Ding et al., EMNLP 2023, arXiv:2311.11696.   ΔW = s B diag(g) A"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import Slot, Tensors, gate, normal
from omnilora.core.site import Site
from omnilora.parameterizations.lora import LoRA


@dataclass(frozen=True)
class GatedLoRA(LoRA):
    """g ~ N(0, 1); s = α/r keeps the first r for good."""

    def init(self, site: Site, seen: Any = None) -> Tensors:
        return Tensors({**super().init(site, seen), "g": gate(normal(1.0, self.r))})

    def delta(self, p: Slot, ctx: Context) -> Op:
        return p.scale * chain(p.B, p.g, p.A, Dropout(self.dropout, p.training))
