"""Mixtures of seeded bases — NOLA, Koohpayegani et al., ICLR 2024, arXiv:2310.02556.

    A = A₀ + Σ_i α_i A_i,  B = Σ_j β_j B_j,  A_i, B_j ~ U(−1, 1)/√k,  A₀ ~ U(±1/√in)      ΔW = (α/r) B A

Only α and β are stored. Basis i is drawn by a generator of its own, seeded with (seed, site, side, i): it is made anew in
the forward and in the backward pass, in chunks, and neither the chunk length nor the global generator matters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import Factored, Slot, Tensors, core, positive_rank, zeros
from omnilora.core.site import Site
from omnilora.errors import BadValue

CHUNK = 1 << 22  # numbers that exist at a time


def bases(key: str, k: int, numel: int) -> Iterator[tuple[slice, Tensor]]:
    """U(−1, 1) bases (chunk, numel) of ``key``, by chunks of the k rows; a grid of 2¹⁶ values, always from the CPU."""
    step = max(1, CHUNK // numel)
    for first in range(0, k, step):
        rows = slice(first, min(first + step, k))
        bits = torch.empty(rows.stop - first, -(-numel // 4), dtype=torch.int64, device="cpu")
        for i, row in enumerate(bits):
            seed = int.from_bytes(hashlib.sha256(f"{key}/{first + i}".encode()).digest()[:8], "big")
            row.random_(-(2**63), None, generator=torch.Generator().manual_seed(seed))
        yield rows, bits.view(torch.int16)[:, :numel].float().add_(0.5).div_(2**15)


@torch.library.custom_op("omnilora::mix", mutates_args=(), schema="(Tensor c, str key, int[] shape) -> Tensor")
def _mix(c: Tensor, key: str, shape: list[int]) -> Tensor:
    out = c.new_zeros(*c.shape[:-1], math.prod(shape))
    for rows, u in bases(key, c.shape[-1], math.prod(shape)):
        out += c[..., rows] @ u.to(c)
    return out.unflatten(-1, shape)


@torch.library.custom_op("omnilora::unmix", mutates_args=(), schema="(Tensor g, str key, int[] shape, int k) -> Tensor")
def _unmix(g: Tensor, key: str, shape: list[int], k: int) -> Tensor:
    flat = g.flatten(-len(shape))
    return torch.cat([flat @ u.to(g).mT for _, u in bases(key, k, flat.shape[-1])], -1)


_mix.register_fake(lambda c, key, shape: c.new_empty(*c.shape[:-1], *shape))
_unmix.register_fake(lambda g, key, shape, k: g.new_empty(*g.shape[: g.dim() - len(shape)], k))


class Mix(torch.autograd.Function):
    """c (…, k) → Σ_i c_i U_i (…, *shape). Only c and the name of the bases are kept for the backward pass."""

    @staticmethod
    def forward(c: Tensor, key: str, shape: list[int]) -> Tensor:
        return torch.ops.omnilora.mix(c, key, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        c, ctx.key, ctx.shape = inputs
        ctx.k = c.shape[-1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Unmix.apply(g, ctx.key, ctx.shape, ctx.k), None, None

    @staticmethod
    def vmap(info: Any, dims: Any, c: Tensor, key: str, shape: list[int]) -> tuple[Tensor, int]:
        return Mix.apply(c.movedim(dims[0], 0), key, shape), 0


class Unmix(torch.autograd.Function):
    """g (…, *shape) → (⟨g, U_i⟩)_i (…, k): the transpose of :class:`Mix`."""

    @staticmethod
    def forward(g: Tensor, key: str, shape: list[int], k: int) -> Tensor:
        return torch.ops.omnilora.unmix(g, key, shape, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.key, ctx.shape, ctx.k = inputs

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        return Mix.apply(c, ctx.key, ctx.shape), None, None, None

    @staticmethod
    def vmap(info: Any, dims: Any, g: Tensor, key: str, shape: list[int], k: int) -> tuple[Tensor, int]:
        return Unmix.apply(g.movedim(dims[0], 0), key, shape, k), 0


@dataclass(frozen=True)
class NOLA(Factored):
    """``k_A``, ``k_B``: numbers of bases, which are all that is trained and stored of a site."""

    k_A: int = 512
    k_B: int = 512
    seed: int = 0

    def check(self) -> None:
        super().check()
        positive_rank(self.k_A, "k_A")
        positive_rank(self.k_B, "k_B")
        if not isinstance(self.seed, int):
            raise BadValue(f"seed = {self.seed!r}.", "Give an integer.")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        return Tensors(alpha=core(zeros(self.k_A)), beta=core(zeros(self.k_B)))

    def delta(self, p: Slot, ctx: Context) -> Op:
        A, B = self.mixed(p)
        return p.scale * chain(B, A, Dropout(self.dropout, p.training))

    def mixed(self, p: Slot) -> tuple[Tensor, Tensor]:
        """A (…, r, in): A₀ is basis 0 of its generator, with the weight 1/√in; B (…, out, r)."""
        site, key = p.site, f"{self.seed}/{p.site.name}"
        first = p.alpha.new_full((1,), 1 / math.sqrt(site.fan_in))
        A = Mix.apply(torch.cat((first, p.alpha / math.sqrt(self.k_A))), f"{key}/A", [*site.batch, self.r, site.fan_in])
        B = Mix.apply(p.beta / math.sqrt(self.k_B), f"{key}/B", [*site.batch, site.fan_out, self.r])
        return A, B
