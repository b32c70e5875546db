"""Factors of a Kronecker product, exact or of low rank, gathered from rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLE = 8


@dataclass(frozen=True)
class Side:
    """U diag(l) Uᵀ in d dimensions, U (d, k) orthonormal, l (k,) ≥ 0; k < d: zero on the rest."""

    U: Tensor
    l: Tensor

    @property
    def d(self) -> int:
        return self.U.shape[0]

    def dense(self) -> Tensor:
        return self.U * self.l @ self.U.mT


class Gathered:
    """Σ x xᵀ over rows x (n, d). ``rank`` None: exact; else its leading eigenpairs, kept by incremental SVD."""

    def __init__(self, d: int, rank: int | None = None) -> None:
        self.d, self.rank = d, rank if rank is not None and rank + OVERSAMPLE < d else None
        self.sum = torch.zeros(d, d, dtype=torch.float64) if self.rank is None else torch.zeros(0, d)
        self.held: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        if self.rank is None:
            wide = rows.double()
            self.sum = self.sum.to(rows.device) + wide.mT @ wide
            return
        self.held.append(rows)
        if sum(len(h) for h in self.held) >= 512:
            self._fold()

    def _fold(self) -> None:
        """√l Uᵀ (k, d) stands for what came before: stacked on new rows, its SVD is that of all."""
        assert self.rank is not None
        stacked = torch.cat([self.sum.to(self.held[0].device, self.held[0].dtype), *self.held])
        self.held = []
        q = min(self.rank + OVERSAMPLE, *stacked.shape)
        _, s, V = torch.svd_lowrank(stacked, q=q, niter=3)
        self.sum = (V * s).mT

    def side(self, scale: float = 1.0) -> Side:
        """The factor times ``scale``, fp64."""
        if self.rank is None:
            l, U = torch.linalg.eigh(self.sum)
            return Side(U, l.clamp_min(0) * scale)
        if self.held:
            self._fold()
        _, s, V = torch.linalg.svd(self.sum.double(), full_matrices=False)
        return Side(V[: self.rank].mT.contiguous(), s[: self.rank].square() * scale)


@dataclass(frozen=True)
class Block:
    """H = G ⊗ K of a matrix (out, in): G of gradients (out, out), K of inputs (in, in)."""

    G: Side
    K: Side

    @property
    def size(self) -> int:
        return self.G.d * self.K.d

    @property
    def eigenvalues(self) -> Tensor:
        """l₁ l₂ᵀ, (k₁, k₂); the other size − k₁k₂ are zero."""
        return self.G.l.unsqueeze(-1) * self.K.l

    def inverse_square(self, J: Tensor, lam: float) -> Tensor:
        """J (H + λI)⁻¹ Jᵀ, (n, C, C), for J (n, C, out, in)."""
        J = J.double()
        M = self.G.U.mT @ J @ self.K.U  # in the eigenbasis
        inside = torch.einsum("ncab,ab,ndab->ncd", M, 1 / (self.eigenvalues + lam), M)
        if self.eigenvalues.numel() == self.size:
            return inside
        rest = J - self.G.U @ M @ self.K.U.mT  # where H is zero
        return inside + torch.einsum("ncoi,ndoi->ncd", rest, rest) / lam
