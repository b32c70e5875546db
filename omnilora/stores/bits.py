"""Codes of 1 to 8 bits, packed without a gap: eight codes of k bits in k bytes, the first code in the lowest bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def size(count: int, bits: int) -> int:
    """Bytes of ``count`` codes; a last group of fewer than eight is filled up."""
    return -(-count // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (n,) uint8 below 2ᵏ → (⌈n/8⌉ k,) uint8."""
    codes = F.pad(codes.reshape(-1), (0, -codes.numel() % 8))
    if bits == 8:
        return codes
    shifts = bits * torch.arange(8, device=codes.device)
    word = (codes.view(-1, 8).long() << shifts).sum(-1, keepdim=True)
    return (word >> 8 * torch.arange(bits, device=codes.device) & 255).to(torch.uint8).view(-1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse: (m,) uint8 → (8 m / k,) int32, filled-up codes included."""
    if bits == 8:
        return packed.int()
    wide = torch.int32 if bits <= 3 else torch.int64
    shift = 8 * torch.arange(bits, device=packed.device, dtype=wide)
    word = (packed.view(-1, bits).to(wide) << shift).sum(-1, keepdim=True, dtype=wide)
    codes = word >> bits * torch.arange(8, device=packed.device, dtype=wide) & 2**bits - 1
    return codes.int().view(-1)


def levels(packed: Tensor, bits: int, table: Tensor) -> Tensor:
    """table[codes] without the codes in between where a byte holds whole codes; (8 m / k,) in the table's dtype."""
    if bits in (1, 2, 4):
        byte = torch.arange(256, device=packed.device)
        shift = bits * torch.arange(8 // bits, device=packed.device)
        return table[byte[:, None] >> shift & 2**bits - 1].index_select(0, packed.int()).view(-1)
    return table.index_select(0, unpack(packed, bits))
