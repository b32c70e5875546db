"""AWQ's packed layout — Lin et al., MLSys 2024, arXiv:2306.00978; as AutoAWQ's GEMM layers store it.

    W[o, i] = scales[g, o] · (q[i, o] − z[g, o]),   g = ⌊i / group⌋

``qweight`` (in, out/8) and ``qzeros`` (groups, out/8) int32: nibble j of a word, from the lowest, is output 8 w + ORDER[j].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnilora.errors import NotExpressible

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def codes(words: Tensor) -> Tensor:
    """(n, m) int32 → (n, 8 m) int32."""
    shift = 4 * torch.arange(8, device=words.device, dtype=torch.int32)
    nibble = words[..., None] >> shift & 15
    return nibble[..., torch.tensor(ORDER, device=words.device).argsort()].flatten(-2)


def dequantized(layer: Any) -> Tensor:
    """W (out, in) in fp32. Raises :class:`NotExpressible` for other layouts (GEMV, Marlin)."""
    qweight, qzeros, scales = (layer._buffers[k] for k in ("qweight", "qzeros", "scales"))
    groups, out = scales.shape
    if qweight.dtype != torch.int32 or qweight.shape[1] * 8 != out or qzeros.shape != (groups, out // 8) \
            or qweight.shape[0] % groups:  # fmt: skip
        raise NotExpressible(f"A {type(layer).__name__} with words {tuple(qweight.shape)} is not AWQ's GEMM layout.",
                             "Load the model in the GEMM layout or dequantized.")  # fmt: skip
    group = qweight.shape[0] // groups
    q, z = codes(qweight), codes(qzeros).repeat_interleave(group, 0)  # (in, out)
    return ((q - z).float() * scales.float().repeat_interleave(group, 0)).t().contiguous()
