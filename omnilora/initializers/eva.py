"""EVA — Paischer et al., 2024, arXiv:2410.07170.   A = the top right singular vectors of the layer's inputs, B = 0.

Principal components of all tokens seen, updated batch by batch (Ross et al., 2008): with n tokens of mean μ before and m
of mean ν now, the components of [Σ V; X − ν; √(nm/(n+m)) (μ − ν)]. Ranks go to the components with the largest shares of
their layer's variance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omnilora.core.observe import Statistic
from omnilora.core.parameterization import Slot
from omnilora.core.site import Site


@dataclass(frozen=True, eq=False)
class Components:
    """V (k, in) with orthonormal rows, singular values (k,), and each one's share of the variance (k,)."""

    V: Tensor
    sigma: Tensor
    share: Tensor


def components(k: int) -> type[Statistic]:
    """The statistic that keeps the ``k`` first principal components of a site's inputs."""

    class Principal(Statistic):
        def __init__(self, site: Site, slot: Slot | None = None) -> None:
            super().__init__(site, slot)
            self.basis = torch.zeros(0, site.fan_in)  # Σ V
            self.mean = self.square = torch.zeros(site.fan_in, dtype=torch.float64)

        def update(self, x: Tensor, g: Tensor | None) -> None:
            n, m = self.count, len(x)
            if m == 0:
                return
            now = x.double().mean(0).cpu()
            rows = [self.basis.to(x), x - now.to(x)]
            if n:
                rows.append((n * m / (n + m)) ** 0.5 * (self.mean - now).to(x).unsqueeze(0))
            self.square = self.square + x.double().square().sum(0).cpu()
            self.mean = (n * self.mean + m * now) / (n + m)
            self.count = n + m
            s, v = _leading(torch.cat(rows), k)
            self.basis = s.unsqueeze(-1) * v

        def value(self) -> Components:
            sigma = self.basis.norm(dim=-1)
            total = float((self.square - self.count * self.mean.square()).sum().clamp_min(1e-30))
            return Components(self.basis / sigma.clamp_min(1e-30).unsqueeze(-1), sigma, sigma.square() / total)

    return Principal


def _leading(X: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(σ (k,), V (k, in)); by random subspaces where that is much less work, with a seed of their own."""
    if 8 * k < min(X.shape):
        with torch.random.fork_rng(devices=[X.device] if X.is_cuda else []):
            torch.manual_seed(0)
            _, s, v = torch.svd_lowrank(X, 2 * k, 4)
        return s[:k], v.mT[:k]
    _, s, vh = torch.linalg.svd(X, full_matrices=False)
    return s[:k], vh[:k]


def redistribute(shares: Mapping[str, Tensor], budget: int, most: int) -> dict[str, int]:
    """The ``budget`` components with the largest shares over all sites, at most ``most`` a site → rank of each site."""
    pairs = [(-float(v), i, name) for i, (name, share) in enumerate(shares.items()) for v in share[:most]]
    ranks = dict.fromkeys(shares, 0)
    for _, _, name in sorted(pairs)[:budget]:
        ranks[name] += 1
    return ranks
