"""The construction for Transformers — Zeng & Lee, ICLR 2024, arXiv:2310.17513, theorem 7.

    Attn(X) = Σ_h W_O W_V X softmax(Xᵀ W_Kᵀ W_Q X),   Z = W_2 relu(W_1 Attn(X) + b_1) + b_2,   output W_out Z_L

X (D, tokens), every matrix D × D, no scale, residual or norm. With C₂ = W̄_2 W_2⁻¹ of the block before (I for the first) and
C₁ = W_1⁻¹ W̄_1:  W_Kᵀ W_Q → C₂ᵀ W̄_Kᵀ W̄_Q C₂,  W_O W_V → C₁ W̄_O W̄_V C₂,  b_1 = b̄_1,  b_2 = W_2 W̄_2⁻¹ b̄_2;
in the last block (W_2, W_out) → W̄_out W̄_2.  Rank ⌈D/2⌉ suffices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from omnilora.theory.construct import linear_chain


@dataclass(frozen=True)
class Head:
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True)
class Block:
    heads: tuple[Head, ...]
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


@dataclass(frozen=True)
class Network:
    blocks: tuple[Block, ...]
    out: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x (D, tokens) → (D, tokens)."""
        for b in self.blocks:
            scores = [torch.softmax(x.mT @ h.k.mT @ h.q @ x, 0) for h in b.heads]
            a = torch.stack([h.o @ h.v @ x @ s for h, s in zip(b.heads, scores)]).sum(0)
            x = b.w2 @ torch.relu(b.w1 @ a + b.b1[:, None]) + b.b2[:, None]
        return self.out @ x


def random_network(width: int, depth: int, heads: int, generator: torch.Generator) -> Network:
    """Gaussian matrices of variance 1/D."""

    def m() -> Tensor:
        return torch.randn(width, width, dtype=torch.float64, generator=generator) / width**0.5

    def b() -> Tensor:
        return torch.randn(width, dtype=torch.float64, generator=generator)

    blocks = tuple(Block(tuple(Head(m(), m(), m(), m()) for _ in range(heads)), m(), b(), m(), b()) for _ in range(depth))
    return Network(blocks, m())


def adapt_to(frozen: Network, target: Network, rank: int) -> Network:
    """``frozen`` with adapters of ``rank`` on W_Q, W_K, W_V, W_O, the last W_2 and W_out, and new offsets."""
    made: list[Block] = []
    before = torch.eye(frozen.out.shape[0], dtype=torch.float64)  # C₂
    for f, t in zip(frozen.blocks, target.blocks, strict=True):
        inner = torch.linalg.solve(f.w1, t.w1)  # C₁
        heads = tuple(_head(a, b, before, inner, rank) for a, b in zip(f.heads, t.heads, strict=True))
        made.append(replace(f, heads=heads, b1=t.b1, b2=f.w2 @ torch.linalg.solve(t.w2, t.b2)))
        before = torch.linalg.solve(f.w2.mT, t.w2.mT).mT
    last, goal = frozen.blocks[-1], target.blocks[-1]
    w2, out = _pair(last.w2, frozen.out, target.out @ goal.w2, rank)
    made[-1] = replace(made[-1], w2=w2, b2=torch.linalg.solve(out, target.out @ goal.b2))
    return Network(tuple(made), out)


def _head(f: Head, t: Head, before: Tensor, inner: Tensor, rank: int) -> Head:
    q, kt = _pair(f.q, f.k.mT, before.mT @ t.k.mT @ t.q @ before, rank)
    v, o = _pair(f.v, f.o, inner @ t.o @ t.v @ before, rank)
    return Head(q, kt.mT, v, o)


def _pair(first: Tensor, second: Tensor, goal: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(first', second') with second' first' ≈ goal and changes of ``rank``."""
    made = linear_chain([first, second], goal, rank).factors
    adapted = [w + B @ A for w, (B, A) in zip((first, second), made)]
    return adapted[0], adapted[1]


def adapters_of(frozen: Network, adapted: Network) -> Sequence[int]:
    """Numerical ranks of all changes that are matrices."""
    pairs = [(frozen.out, adapted.out)]
    for f, a in zip(frozen.blocks, adapted.blocks, strict=True):
        pairs += [(f.w1, a.w1), (f.w2, a.w2)]
        for h, g in zip(f.heads, a.heads, strict=True):
            pairs += [(h.q, g.q), (h.k, g.k), (h.v, g.v), (h.o, g.o)]
    return [int(torch.linalg.matrix_rank(b - a, rtol=1e-9)) if not torch.equal(a, b) else 0 for a, b in pairs]
