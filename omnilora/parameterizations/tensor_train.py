"""Tensor trains.   T[i_1 … i_d] = G_1[i_1] … G_d[i_d],  G_k (ρ_{k−1}, n_k, ρ_k), ρ_0 = ρ_d = 1, indices row-major

TT-LoRA — Anjum et al., 2024, arXiv:2408.01008: the whole ΔW is one train, modes of the input first, then of the output.
Cut between the two, it is B A of the inner rank, and never formed.
LoRETTA-rep — Yang et al., NAACL 2024, arXiv:2402.11417: LoRA whose A and B are a train each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import (
    Factored,
    Leaf,
    Parameterization,
    Slot,
    Tensors,
    core,
    finite,
    normal,
    positive_rank,
    zeros,
)
from omnilora.core.site import Site
from omnilora.core.together import made
from omnilora.errors import BadValue


def modes(n: int, limit: int = 16) -> list[int]:
    """Factors of n, each at most ``limit`` where n allows: prime factors, packed greedily from the largest."""
    primes, rest, p = [], n, 2
    while rest > 1:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    out: list[int] = []
    for f in sorted(primes, reverse=True):
        fitting = [k for k, m in enumerate(out) if m * f <= limit]
        if fitting:
            out[fitting[0]] *= f
        else:
            out.append(f)
    return out or [1]


def contract(cores: list[Tensor]) -> Tensor:
    """Cores (…, ρ_0, n_1, ρ_1) … (…, ρ_{d−1}, n_d, ρ_d) → (…, ρ_0, n_1 ⋯ n_d, ρ_d), one product a core for the whole batch."""
    t = cores[0]
    first = t.shape[:-2]  # (…, ρ_0)
    for g in cores[1:]:
        t = (t.flatten(-3, -2) @ g.flatten(-2)).reshape(*first, -1, g.shape[-1])
    return t


def stacks(slots: Sequence[Slot], prefix: str) -> list[Tensor]:
    """The cores named prefix0, prefix1, … of slots of one shape, each (slots, ρ, n, ρ')."""
    each = [train_of(p, prefix) for p in slots]
    return [torch.stack(cores) for cores in zip(*each)]


def shapes(sizes: list[int], rank: int) -> list[tuple[int, int, int]]:
    """Core shapes of a train with every inner rank ``rank``."""
    d = len(sizes)
    return [(1 if k == 0 else rank, n, 1 if k == d - 1 else rank) for k, n in enumerate(sizes)]


def cores_of(prefix: str, made: list[Tensor]) -> dict[str, Leaf]:
    return {f"{prefix}{k}": core(g) for k, g in enumerate(made)}


def narrowing(n: int, m: int, rank: int, limit: int) -> list[Tensor]:
    """Fresh cores of a train over (n, m), small modes of n first; entries have the deviation 1/√(n + m)."""
    return _fresh([*sorted(modes(n, limit)), *modes(m, limit)], n + m, rank)


def widening(m: int, n: int, rank: int, limit: int) -> list[Tensor]:
    """The same over (m, n), large modes of n first."""
    return _fresh([*modes(m, limit), *sorted(modes(n, limit), reverse=True)], n + m, rank)


def _fresh(sizes: list[int], width: int, rank: int) -> list[Tensor]:
    """N(0, 1)/√ρ_k · σ^{1/d} with σ² = 1/width."""
    sigma = math.sqrt(1 / width) ** (1 / len(sizes))
    return [normal(1.0, *s) / math.sqrt(s[2]) * sigma for s in shapes(sizes, rank)]


def train_of(p: Slot, prefix: str) -> list[Tensor]:
    """The cores named prefix0, prefix1, … of a slot."""
    count = sum(1 for name, _ in p.named_parameters() if name.startswith(prefix) and name[len(prefix) :].isdigit())
    return [p.get_parameter(f"{prefix}{k}") for k in range(count)]


@dataclass(frozen=True)
class TensorTrain(Parameterization):
    """ΔW = α · train; ``zero`` starts the last core at zero, otherwise every core is Kaiming of Frobenius norm 1."""

    rank_: int = 5
    alpha: float = 16.0
    dropout: float = 0.0
    limit: int = 16
    zero: bool = True

    def check(self) -> None:
        positive_rank(self.rank_, "rank_")
        finite(self.alpha, "alpha")
        finite(self.dropout, "dropout", 0.0, 0.999)
        if self.limit < 2:
            raise BadValue(f"limit = {self.limit!r}.", "Modes are at least 2.")

    def rank(self) -> int:
        return self.rank_

    def first_scale(self, site: Site) -> float:
        return self.alpha

    def init(self, site: Site, seen: Any = None) -> Tensors:
        ins, outs = modes(site.fan_in, self.limit), modes(site.fan_out, self.limit)
        all_shapes = shapes([*ins, *outs], self.rank_)
        cores = [torch.empty(s).uniform_(-1, 1) for s in all_shapes]
        cores = [g / g.norm() for g in cores]
        if self.zero:
            cores[-1] = zeros(*all_shapes[-1])
        return Tensors({**cores_of("G", cores[: len(ins)]), **cores_of("H", cores[len(ins) :])})

    def together(self, slots: Sequence[Slot]) -> list[tuple[Tensor, Tensor]]:
        """(A (ρ, in), B (out, ρ)) of every slot."""
        A = contract(stacks(slots, "G"))[:, 0].mT
        B = contract(stacks(slots, "H"))[..., 0].mT
        return list(zip(A.unbind(), B.unbind()))

    def delta(self, p: Slot, ctx: Context) -> Op:
        A, B = made(p, ctx) or self.together([p])[0]
        return p.scale * chain(B, A, Dropout(self.dropout, p.training))


@dataclass(frozen=True)
class TrainedFactors(Factored):
    """LoRETTA-rep: Aᵀ (in, r) and Bᵀ (r, out) are trains of inner rank ``tensor_rank``.

    Entries of a fresh train have the deviation 1/√(rows + columns); ``zero`` starts the last core of B at zero.
    """

    tensor_rank: int = 5
    limit: int = 12
    zero: bool = True

    def check(self) -> None:
        super().check()
        positive_rank(self.tensor_rank, "tensor_rank")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        a, b = narrowing(site.fan_in, self.r, self.tensor_rank, self.limit), widening(self.r, site.fan_out, self.tensor_rank, self.limit)
        if self.zero:
            b[-1] = zeros(*b[-1].shape)
        return Tensors({**cores_of("A", a), **cores_of("B", b)})

    def together(self, slots: Sequence[Slot]) -> list[tuple[Tensor, Tensor]]:
        """(A (r, in), B (out, r)) of every slot."""
        A = contract(stacks(slots, "A")).reshape(len(slots), -1, self.r).mT
        B = contract(stacks(slots, "B")).reshape(len(slots), self.r, -1).mT
        return list(zip(A.unbind(), B.unbind()))

    def delta(self, p: Slot, ctx: Context) -> Op:
        A, B = made(p, ctx) or self.together([p])[0]
        return p.scale * chain(B, A, Dropout(self.dropout, p.training))
