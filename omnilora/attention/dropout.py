"""Dropout inside attention — Wang et al., ACL 2024, arXiv:2403.00812.

    DropKey        softmax(g + M),  M ∈ {0, −∞}:                 before the softmax, no rescaling
    DropAttention  m ⊙ w / sg(Σ m ⊙ w),  w = softmax(g):         after it, rescaled with a constant denominator

The two agree in the forward pass for one mask; only DropKey sends no gradient to a logit that is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omnilora.attention.hook import Call

PATTERNS = ("element", "column", "span")


def drop_key(logits: Tensor, drop: Tensor) -> Tensor:
    """Attention weights (…, queries, keys) with dropped keys masked before the softmax."""
    return torch.softmax(logits.masked_fill(drop, -torch.inf), -1)


def drop_attention(logits: Tensor, drop: Tensor) -> Tensor:
    """Attention weights with dropped ones zeroed after the softmax and the rest rescaled by a constant."""
    kept = torch.softmax(logits, -1).masked_fill(drop, 0.0)
    return kept / kept.sum(-1, keepdim=True).detach()


def draw(count: int, length: int, p: float, pattern: str, device: torch.device, rows: int = 1) -> Tensor:
    """(count, rows, length) of what is dropped: each entry with probability p ("element"), a position for all rows
    ("column"), or ⌊p · length⌋ neighbouring positions for all rows ("span")."""
    if pattern == "element":
        return torch.rand(count, rows, length, device=device) < p
    if pattern == "column":
        return torch.rand(count, 1, length, device=device) < p
    size = int(p * length)
    start = (torch.rand(count, 1, 1, device=device) * (length - size + 1)).long()
    at = torch.arange(length, device=device)
    return (at >= start) & (at < start + size)


def without_keys(call: Call, p: float, pattern: str) -> Call:
    """DropKey on a call: the same keys for all heads; a query always keeps its own position."""
    batch, queries, keys = call.q.shape[0], call.q.shape[-2], call.k.shape[-2]
    drop = draw(batch, keys, p, pattern, call.q.device, queries).unsqueeze(1)
    own = torch.eye(queries, keys, dtype=torch.bool, device=call.q.device).roll(keys - queries, -1)
    return call.without(drop & ~own)
