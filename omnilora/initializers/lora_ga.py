"""LoRA-GA — Wang et al., NeurIPS 2024, arXiv:2407.05000.   ∂L/∂W = U Σ Vᵀ,   A = c V_1:rᵀ,   B = c U_r+1:2r

With c = d_out^¼ / √γ and s = α/√r. The first step of gradient descent is −η s² (G AᵀA + B Bᵀ G): the best approximation of
rank 2r to the full step, up to its size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnilora.core.observe import Gradient
from omnilora.errors import NotExpressible
from omnilora.initializers.starting import Factors, wide

SIZES = ("stable", "peft", "unit")


class RegionGradient(Gradient):
    """∂L/∂W of the rows that the site adapts."""

    def value(self) -> Tensor | None:
        total, region = self.total, self.site.region
        if not isinstance(total, Tensor):
            return None
        return total if region is None else total[region[0] : region[1]]


def steepest(G: Tensor, r: int, size: str = "stable", gamma: float = 16.0) -> Factors:
    """(B (out, r), A (r, in)). ``size``: "stable" c on both sides; "peft" c and Σ on B; "unit" Σ on B."""
    if 2 * r > min(G.shape):
        raise NotExpressible(f"A gradient of shape {tuple(G.shape)} has no {2 * r} singular vectors.", f"Take r ≤ {min(G.shape) // 2}.")
    u, s, vh = torch.linalg.svd(wide(G), full_matrices=False)
    B, A = u[:, r : 2 * r], vh[:r]
    c = G.shape[0] ** 0.25 / gamma**0.5
    if size == "stable":
        return c * B, c * A
    B = B * s[r : 2 * r]
    return (c * B if size == "peft" else B), A
