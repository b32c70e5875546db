"""GPTQ's packed layout — Frantar et al., ICLR 2023, arXiv:2210.17323; as AutoGPTQ and GPTQModel store it.

    W[o, i] = scales[g, o] · (q[i, o] − z[g, o]),   g = g_idx[i]

``qweight`` (in · k/32, out) int32: the k-bit codes of a column, one after the other from the lowest bit, across words.
``qzeros`` (groups, out · k/32) the same along outputs, holding z − 1 in format 1 (format 2: z). ``scales`` (groups, out).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnilora.errors import NotExpressible
from omnilora.stores.bits import unpack


def codes(words: Tensor, bits: int) -> Tensor:
    """(…, n k/32) int32 → (…, n) int32."""
    return unpack(words.contiguous().view(torch.uint8).view(-1), bits).view(*words.shape[:-1], -1)


def dequantized(layer: Any) -> Tensor:
    """W (out, in) in fp32. Raises :class:`NotExpressible` for words other than int32 or codes other than 2, 3, 4, 8 bits."""
    qweight, qzeros, scales, g_idx = (layer._buffers[k] for k in ("qweight", "qzeros", "scales", "g_idx"))
    bits = 32 * qweight.shape[0] // g_idx.numel()
    if qweight.dtype != torch.int32 or bits not in (2, 3, 4, 8) or qzeros.shape[1] * 32 != scales.shape[1] * bits:
        raise NotExpressible(f"A {type(layer).__name__} with {qweight.dtype} words {tuple(qweight.shape)} is not GPTQ's "
                             "layout of 2, 3, 4 or 8 bits.", "Load the model dequantized.")  # fmt: skip
    q = codes(qweight.t(), bits)  # (out, in)
    z = codes(qzeros, bits) + (1 if vars(layer).get("_qzeros_format", 1) == 1 else 0)  # (groups, out)
    group = g_idx.long()
    return (q - z.t()[:, group]).float() * scales.float().t()[:, group]
