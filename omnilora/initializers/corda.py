"""CorDA — Yang et al., NeurIPS 2024, arXiv:2406.05223.   W C = U Σ Vᵀ,   B = U_I √Σ_I,   A = √Σ_I V_Iᵀ C⁻¹

C is the covariance of the layer's inputs. I are the largest r triplets (instruction-previewed: the inputs are the task's)
or the smallest r (knowledge-preserved: the inputs are what must not be forgotten).
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnilora.core.observe import Statistic
from omnilora.initializers.pissa import balanced
from omnilora.initializers.starting import Factors, wide

MODES = ("instruction", "knowledge")


class Covariance(Statistic):
    """The mean over batches of Xᵀ X, each batch divided by its largest entry first."""

    total: Tensor | float = 0.0

    def update(self, x: Tensor, g: Tensor | None) -> None:
        if len(x):
            x = x / x.max().abs().clamp_min(1e-30)
            self.total, self.count = self.total + x.mT @ x, self.count + 1

    def value(self) -> Tensor | None:
        return torch.as_tensor(self.total) / self.count if self.count else None


def damped(C: Tensor, damp: float = 0.01, tolerance: float = 0.05) -> tuple[Tensor, Tensor]:
    """(C + d·mean(diag C)·I, its inverse), d doubled from ``damp`` until ‖C C⁻¹ − I‖ < ``tolerance``."""
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    level = C.diagonal().mean().clamp_min(1e-30)
    while True:
        full = C + damp * level * eye
        inverse = torch.linalg.inv(full)
        if float((full @ inverse - eye).norm()) < tolerance:
            return full, inverse
        damp *= 2


def oriented(W: Tensor, r: int, C: Tensor, mode: str = "instruction") -> Factors:
    """(B (out, r), A (r, in)) of the ``mode``'s r triplets of W C."""
    full, inverse = damped(wide(C).to(wide(W)))
    u, s, vh = torch.linalg.svd(wide(W) @ full, full_matrices=False)
    at = slice(0, r) if mode == "instruction" else slice(len(s) - r, len(s))
    return balanced(u[:, at], s[at], vh[at] @ inverse)
