"""Delta-LoRA in closed form — Zi et al., 2023, arXiv:2309.02411.

The paper adds λ·s·(B_{t+1}A_{t+1} − B_tA_t) to W after every step from K on; the sum telescopes, so the base stays as it is:

    ΔW = s B A + λ s (B̄ Ā − B_K A_K),   B̄, Ā detached, the second term absent before step K
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from omnilora.core.context import Context
from omnilora.core.op import Op, chain
from omnilora.core.parameterization import Slot, Tensors, finite, own, zeros
from omnilora.core.site import Site
from omnilora.errors import BadValue
from omnilora.parameterizations.lora import LoRA


@dataclass(frozen=True)
class DeltaLoRA(LoRA):
    """``AK``, ``BK``: the factors at step K; ``on``: 0 before, 1 from there on."""

    lam: float = 2.0
    detached: bool = True

    @property
    def exact_gradient(self) -> bool:
        return not self.detached

    def check(self) -> None:
        super().check()
        finite(self.lam, "lam")
        if self.dropout:
            raise BadValue(f"dropout = {self.dropout!r}.", "Delta-LoRA needs ∂L/∂W = ∂L/∂(BA): no dropout.")

    def frozen(self) -> frozenset[str]:
        return frozenset({"AK", "BK", "on"})

    def rank(self) -> int:
        return 2 * self.r

    def init(self, site: Site, seen: Any = None) -> Tensors:
        made = super().init(site, seen)
        a, b = (made[n].value for n in "AB")  # type: ignore[union-attr]
        return Tensors({**made, "AK": own(zeros(*a.shape)), "BK": own(zeros(*b.shape)), "on": own(zeros(1))})

    def delta(self, p: Slot, ctx: Context) -> Op:
        w = self.lam * p.on
        Ad, Bd = (p.A.detach(), p.B.detach()) if self.detached else (p.A, p.B)
        B = torch.cat((p.B, w * Bd, -w * p.BK), -1)  # (out, 3r)
        A = torch.cat((p.A, Ad, p.AK), -2)  # (3r, in)
        return p.scale * chain(B, A)
