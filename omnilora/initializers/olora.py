"""OLoRA — Büyükakyüz, 2024, arXiv:2406.01775.   W = Q R,   B = Q_:,1:r,   A = R_1:r,:"""

from __future__ import annotations

import torch
from torch import Tensor

from omnilora.initializers.starting import Factors, wide


def orthonormal(W: Tensor, r: int) -> Factors:
    """(B (…, out, r) with orthonormal columns, A (…, r, in)): the first r of W's QR decomposition."""
    q, upper = torch.linalg.qr(wide(W))
    return q[..., :r], upper[..., :r, :]
