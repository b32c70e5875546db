"""Nested ranks of DyLoRA — Valipour et al., EACL 2023, arXiv:2210.07558.   ΔW_b = (α/b) B[:, :b] A[:b]"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import Slot
from omnilora.errors import BadValue
from omnilora.parameterizations.lora import LoRA


@dataclass(frozen=True)
class PrefixLoRA(LoRA):
    """The active rank b is ``rank`` of the context (``ol.context(model, rank=b)``), else ``use``, else r.

    ``only_last``: of the prefix only direction b learns. ``scale``: "alpha/b" (paper) or "constant" (α/r).
    """

    use: int | None = None
    only_last: bool = True
    scale: str = "alpha/b"

    def check(self) -> None:
        super().check()
        if self.scale not in ("alpha/b", "constant"):
            raise BadValue(f"scale = {self.scale!r}.", "Give 'alpha/b' or 'constant'.")
        if self.use is not None and not 1 <= self.use <= self.r:
            raise BadValue(f"use = {self.use!r} of rank {self.r}.", "Give 1 … r.")

    def delta(self, p: Slot, ctx: Context) -> Op:
        b = ctx.get("rank", self.use if self.use is not None else self.r)
        b = torch.as_tensor(b, device=p.A.device)
        at = torch.arange(1, self.r + 1, device=p.A.device)
        prefix = (at <= b).to(p.A.dtype)  # D of B D A
        if self.scale == "alpha/b":
            prefix = prefix * (self.r / b)
        A, B = p.A, p.B
        if self.only_last and p.training:
            A = torch.where((at == b).unsqueeze(-1), A, A.detach())
            B = torch.where(at == b, B, B.detach())
        return p.scale * chain(B, prefix, A, Dropout(self.dropout, p.training))
