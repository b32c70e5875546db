"""PiSSA — Meng et al., NeurIPS 2024, arXiv:2404.02948.   W = U Σ Vᵀ,   B = U_r √Σ_r,   A = √Σ_r V_rᵀ"""

from __future__ import annotations

import torch
from torch import Tensor

from omnilora.initializers.starting import Factors, wide


def principal(W: Tensor, r: int, niter: int | None = None) -> Factors:
    """(B (…, out, r), A (…, r, in)), W ≈ B A. ``niter``: subspace iterations of the randomized SVD; None: the exact one."""
    if niter is None:
        u, s, vh = torch.linalg.svd(wide(W), full_matrices=False)
        return balanced(u[..., :r], s[..., :r], vh[..., :r, :])
    u, s, v = torch.svd_lowrank(wide(W), r, niter)
    return balanced(u, s, v.mT)


def balanced(u: Tensor, s: Tensor, vh: Tensor) -> Factors:
    """(U √Σ, √Σ Vᵀ)."""
    root = s.sqrt()
    return u * root.unsqueeze(-2), root.unsqueeze(-1) * vh
