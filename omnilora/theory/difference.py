"""The adapter between two models of one architecture: ΔW = W̄ − W of each matrix as B A of the smallest sufficient rank,
everything that is no matrix as an own copy. Loaded on the first model it gives the second."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import adapt, plan, slots
from omnilora.core.method import Method
from omnilora.core.parameterization import Parameterization, Slot, finite, positive_rank
from omnilora.core.site import Site
from omnilora.core.targets import Targets
from omnilora.errors import BadValue, StateMismatch
from omnilora.parameterizations.lora import LoRA


@dataclass(frozen=True)
class SiteReport:
    """One matrix: the rank that is used, what is left of ΔW relative to W̄ (Frobenius), and the numerical rank of ΔW."""

    name: str
    shape: tuple[int, int]
    rank: int
    error: float
    full_rank: int


def rank_for(sigma: Tensor, size: float, tolerance: float) -> int:
    """The least r with (Σ_{i>r} σ_i²)^½ ≤ tolerance · size; 0 where nothing must change."""
    tails = sigma.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[r]: what is left at rank r
    return int((tails > tolerance * size).sum())


def construct(model: nn.Module, target: nn.Module, tolerance: float = 1e-6, rank: int | None = None,
              targets: Targets | None = None, name: str = "default") -> list[SiteReport]:  # fmt: skip
    """Put on ``model``, in place, the adapter that turns it into ``target``, a model of the same architecture.

    Args:
        tolerance: of each matrix, relative to its Frobenius norm; decides each site's rank.
        rank: the largest rank; None: whatever ``tolerance`` needs.
        targets: the matrices that become B A; others, and all vectors and embeddings, become own copies where they differ.

    Returns: a report for each matrix. Raises :class:`StateMismatch` where the models do not match.
    """
    finite(tolerance, "tolerance", 0.0, 1.0)
    if rank is not None:
        positive_rank(rank, "rank")
    theirs = dict(target.named_parameters())
    mine = dict(model.named_parameters())
    odd = sorted(set(mine) ^ set(theirs)) or [n for n in mine if mine[n].shape != theirs[n].shape]
    if odd:
        raise StateMismatch(f"The models differ in {len(odd)} tensors, for instance {odd[0]}.", "Give models of one architecture.")
    modules = dict(target.named_modules())
    found: dict[str, tuple[SiteReport, Tensor, Tensor]] = {}
    method = Method("lora_construct", LoRA(1, 1.0), targets=targets)
    wanted = targets or Targets()
    if wanted.overrides:
        raise BadValue("overrides are given.", "The construction chooses each site's rank; pass rank or tolerance.")
    for site, _ in plan(model, method, wanted):
        other = dataclasses.replace(site, layer=modules[_path(model, site)])
        found[site.name] = _factors(site.name, site.read(), other.read(), tolerance, rank)
    changed = [s for s in found if found[s][0].rank]
    rest = _rest(model, mine, theirs, set(found))
    if not changed and not rest:
        raise BadValue("The two models are equal: there is nothing to construct.", "Give another target.")

    def arrange(sites: Sequence[Site], how: Parameterization) -> list[Parameterization | None]:
        return [LoRA(r, float(r)) if (r := found[s.name][0].rank) else None for s in sites]

    def fill(slot: Slot, seen: Any) -> None:
        if slot.site.name in found:
            _, B, A = found[slot.site.name]
            slot.A.copy_(A)
            slot.B.copy_(B)
        else:
            slot.W.copy_(slot.site.layout.matrix(theirs[_parameter(model, slot.site)].detach()))

    made = dataclasses.replace(method, arrange=arrange, fill=fill)
    adapt(model, made, dataclasses.replace(wanted, unfreeze=(*wanted.unfreeze, *rest)), name=name)
    assert len(slots(model, name)) >= len(changed)
    return [report for report, _, _ in found.values()]


def _factors(name: str, W: Tensor, goal: Tensor, tolerance: float, most: int | None) -> tuple[SiteReport, Tensor, Tensor]:
    E = goal.detach().double() - W.detach().double()
    U, sigma, Vh = torch.linalg.svd(E, full_matrices=False)
    size = float(goal.detach().double().norm())
    r = rank_for(sigma, size, tolerance)
    r = r if most is None else min(r, most)
    left = float(sigma[r:].square().sum().sqrt()) / max(size, 1e-30)
    root = sigma[:r].sqrt()
    full = int((sigma > 1e-7 * sigma[0]).sum()) if float(sigma[0]) else 0
    return SiteReport(name, (E.shape[0], E.shape[1]), r, left, full), U[:, :r] * root, root[:, None] * Vh[:r]


def _rest(model: nn.Module, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], done: set[str]) -> list[str]:
    """Expressions for parameters outside the constructed matrices that differ."""
    return [f"re:{n.replace('.', chr(92) + '.')}" for n in mine
            if n.removesuffix(".weight") not in done and not torch.equal(mine[n], theirs[n])]  # fmt: skip


def _path(model: nn.Module, site: Site) -> str:
    return next(n for n, m in model.named_modules() if m is site.layer)


def _parameter(model: nn.Module, site: Site) -> str:
    path = _path(model, site)
    return f"{path}.{site.param}" if path else site.param
