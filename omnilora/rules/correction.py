"""LoRA-FA's corrected gradient — Zhang et al., arXiv:2308.03303 v2.   g̃_B = g_B (A Aᵀ + δI)⁻¹ / s²

g̃ minimizes ‖s g̃ A − G‖, G being the gradient of the merged weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnilora.core.rule import Rule
from omnilora.core.run import Run


class Corrected(Rule):
    """A is constant, so the inverse is computed once for each site, in fp32 or wider."""

    def __init__(self, delta: float = 1e-8) -> None:
        self.delta = delta
        self._inverse: dict[int, Tensor] = {}

    def before_step(self, run: Run) -> None:
        for slot in run.slots():
            (_, a), (_, b) = next(iter(slot.by_role("input"))), next(iter(slot.by_role("output")))
            if b.grad is None:
                continue
            if id(a) not in self._inverse:
                wide = a.detach() if a.dtype == torch.float64 else a.detach().float()
                gram = wide @ wide.mT
                self._inverse[id(a)] = torch.linalg.inv(gram + self.delta * torch.eye(len(gram)).to(gram))
            inverse = self._inverse[id(a)]
            b.grad.copy_((b.grad.to(inverse.dtype) @ inverse / slot.scale**2).to(b.grad.dtype))
