"""Laplace-LoRA — Yang et al., ICLR 2024, arXiv:2308.13111.

    p(θ | data) ≈ N(θ*, P⁻¹),  P = H + λI,  H ≈ G ⊗ K for every A and B        (Kronecker-factored Fisher at the MAP)
    K = (1/N) Σ_n Σ_t a aᵀ,    G = Σ_n Σ_t E_{c ~ p(·|x)}[g gᵀ]                 (the model's own classes, not the labels)
    log Z(λ) = log p(y | x, θ*) − ½ [Σ log(1 + l₁l₂/λ) + λ ‖θ*‖²]
    f(x) ~ N(f(x; θ*), J P⁻¹ Jᵀ)                                                (the model linearized at θ*)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.parameterization import Slot, one_of, positive_rank
from omnilora.core.watch import Tape, matrices, watching
from omnilora.errors import BadValue, NotExpressible, StateMismatch
from omnilora.posthoc.kronecker import Block, Gathered

Logits = Callable[[nn.Module, Any], Tensor]
Directions = Callable[[Tensor], list[Tensor]]


def class_directions(f: Tensor) -> list[Tensor]:
    """√p_c log p_c for every class, √p_c held: their gradients d give the Fisher of a softmax as Σ_c d dᵀ."""
    log_p = torch.log_softmax(f, -1)
    weighed = log_p * (log_p.detach() / 2).exp()
    return list(weighed.unbind(-1))


def gaussian_directions(f: Tensor) -> list[Tensor]:
    """f_c: the Fisher of a Gaussian likelihood of variance 1."""
    return list(f.unbind(-1))


@dataclass(frozen=True)
class Posterior:
    """N(θ*, (H + λI)⁻¹) over the matrices ``blocks``, by ``site.tensor``."""

    blocks: Mapping[str, Block]
    sq_norm: float  # ‖θ*‖²
    log_likelihood: float
    rows: int
    lam: float = 1.0

    @property
    def size(self) -> int:
        return sum(b.size for b in self.blocks.values())

    def _eigenvalues(self) -> Tensor:
        return torch.cat([b.eigenvalues.flatten() for b in self.blocks.values()])

    def evidence(self, lam: float) -> float:
        """log Z(λ)."""
        return self.log_likelihood - 0.5 * (float((self._eigenvalues() / lam).log1p().sum()) + lam * self.sq_norm)

    def slope(self, lam: float) -> float:
        """∂ log Z / ∂ log λ = ½ [Σ l/(l + λ) − λ ‖θ*‖²]: falls in λ, so it has one zero."""
        l = self._eigenvalues()
        return 0.5 * (float((l / (l + lam)).sum()) - lam * self.sq_norm)

    def best(self) -> Posterior:
        """The posterior at the λ that maximizes the evidence."""
        if not self.sq_norm > 0 or not float(self._eigenvalues().max()) > 0:
            raise BadValue("The evidence has no maximum: the adapter or its curvature is zero.", "Train the adapter, or give a prior.")
        low, high = -60.0, 60.0
        for _ in range(200):
            mid = (low + high) / 2
            low, high = (mid, high) if self.slope(math.exp(mid)) > 0 else (low, mid)
        return self.at(math.exp((low + high) / 2))

    def at(self, lam: float) -> Posterior:
        if not (math.isfinite(lam) and lam > 0):
            raise BadValue(f"prior = {lam!r}.", "Give a precision λ > 0, or 'evidence'.")
        return replace(self, lam=lam)

    def covariance(self, J: Mapping[str, Tensor]) -> Tensor:
        """J P⁻¹ Jᵀ (n, C, C) of Jacobians (n, C, out, in) by block."""
        parts = [block.inverse_square(J[name], self.lam) for name, block in self.blocks.items()]
        return torch.stack(parts).sum(0)


def chosen(slots: Sequence[Slot], names: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The matrices that get a posterior. Raises :class:`NotExpressible` where there is none."""
    found = {n: t for n, t in matrices(slots).items() if names(n)}
    if not found:
        raise NotExpressible("No matrix of this adapter is a linear layer by itself.",
                             "Use LoRA or a form whose factors are its tensors, on linear layers.")  # fmt: skip
    return found


def fit(model: nn.Module, slots: Sequence[Slot], batches: Iterable[Any], logits: Logits, labels: Callable[[Any], Tensor],
        rank: int | None = 10, names: Callable[[str], bool] = lambda name: True,
        directions: Directions = class_directions) -> Posterior:  # fmt: skip
    """One pass over the training data, in evaluation mode.

    Args:
        logits: (model, batch) → (n, C); every row by itself. ``labels``: batch → (n,).
        rank: of the larger factor of each block; None keeps all of both. The smaller one is always exact.
        names: which of ``site.tensor`` take part; the last layer's only, for instance.
    """
    if rank is not None:
        positive_rank(rank, "kfac_rank")
    theta = chosen(slots, names)
    limits = {n: (rank if t.shape[0] > t.shape[1] else None, rank if t.shape[1] >= t.shape[0] else None) for n, t in theta.items()}
    G = {n: Gathered(t.shape[0], limits[n][0]) for n, t in theta.items()}
    K = {n: Gathered(t.shape[1], limits[n][1]) for n, t in theta.items()}
    rows, likelihood = 0, 0.0
    for batch, f, tape in _forwards(model, slots, batches, logits, theta):
        n, mask = f.shape[0], _mask(batch)
        for name, a in tape.inputs(n, mask).items():
            K[name].add(a.flatten(0, 1))
        ways = directions(f)
        for i, way in enumerate(ways):
            for name, g in tape.gradients(way.sum(), n, mask, i < len(ways) - 1).items():
                G[name].add(g.flatten(0, 1))
        log_p = torch.log_softmax(f.detach(), -1)
        likelihood += float(log_p.gather(-1, labels(batch).unsqueeze(-1)).sum())
        rows += n
    if not rows:
        raise BadValue("There is no data.", "Give the rows the adapter was trained on.")
    blocks = {n: Block(G[n].side(), K[n].side(1 / rows)) for n in theta}
    return Posterior(blocks, float(sum(t.detach().double().square().sum() for t in theta.values())), likelihood, rows)


def predict(model: nn.Module, slots: Sequence[Slot], posterior: Posterior, batches: Iterable[Any],
            logits: Logits) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(mean (N, C), covariance (N, C, C)) of the logits under the linearized model, fp64."""
    f, (S,) = predictions(model, slots, [posterior], batches, logits)
    return f, S


def predictions(model: nn.Module, slots: Sequence[Slot], posteriors: Sequence[Posterior], batches: Iterable[Any],
                logits: Logits) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(mean, the covariance of each posterior); they differ in λ."""
    first = posteriors[0]
    theta = chosen(slots, lambda name: name in first.blocks)
    fitting(first, theta)
    means: list[Tensor] = []
    spreads: list[list[Tensor]] = [[] for _ in posteriors]
    for batch, f, tape in _forwards(model, slots, batches, logits, theta):
        J = jacobians(tape, f, _mask(batch))
        for held, posterior in zip(spreads, posteriors):
            held.append(posterior.covariance(J))
        means.append(f.detach().double())
    return torch.cat(means), [torch.cat(held) for held in spreads]


def jacobians(tape: Tape, f: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """∂f_c(x_n)/∂M = Σ_t g_t a_tᵀ, (n, C, out, in) of every matrix on the tape."""
    n, C = f.shape
    a = tape.inputs(n, mask)
    by_class = []
    for c in range(C):
        g = tape.gradients(f[:, c].sum(), n, mask, c < C - 1)
        by_class.append({name: g[name].mT @ a[name] for name in a})
    return {name: torch.stack([J[name] for J in by_class], 1) for name in a}


def fitting(posterior: Posterior, theta: Mapping[str, Tensor]) -> None:
    """Raise :class:`StateMismatch` where the posterior is not one of these tensors."""
    for name, block in posterior.blocks.items():
        have = tuple(theta[name].shape) if name in theta else None
        if have != (block.G.d, block.K.d):
            raise StateMismatch(f"{name} is {have}, the posterior has {(block.G.d, block.K.d)}.", "It belongs to another adapter.")


def _forwards(model: nn.Module, slots: Sequence[Slot], batches: Iterable[Any], logits: Logits,
              theta: Mapping[str, Tensor]) -> Iterable[tuple[Any, Tensor, Tape]]:  # fmt: skip
    mode = model.training
    model.eval()
    try:
        for batch in batches:
            with watching(slots, list(theta)) as tape:
                f = logits(model, batch)
                f = f if f.dtype == torch.float64 else f.float()
            silent = [n for n in theta if n not in tape.met]
            if silent:
                raise NotExpressible(f"{silent[0]} is no matrix of the map that its form makes.", "Leave it out by layers.")
            with torch.enable_grad():
                yield batch, f, tape
    finally:
        model.train(mode)


def _mask(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


# -- probabilities ---------------------------------------------------------------------------------------------------


def probabilities(f: Tensor, S: Tensor, predictive: str = "joint", samples: int = 100_000, seed: int = 0) -> Tensor:
    """Class probabilities (N, C) of logits N(f, S).

    ``predictive``: "joint", the mean softmax of ``samples`` draws; "probit", softmax(f / √(1 + π/8 diag S)); "bridge", the
    Dirichlet of the Laplace bridge.
    """
    one_of(predictive, "predictive", "joint", "probit", "bridge")
    return {"joint": lambda: _joint(f, S, samples, seed), "probit": lambda: _probit(f, S), "bridge": lambda: _bridge(f, S)}[predictive]()


def _joint(f: Tensor, S: Tensor, samples: int, seed: int) -> Tensor:
    positive_rank(samples, "samples")
    l, U = torch.linalg.eigh(S + 1e-6 * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device))
    root = U * l.clamp_min(0).sqrt().unsqueeze(-2)  # S = root rootᵀ
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, f.shape[-1], generator=g, dtype=torch.float32).to(f)
    return torch.stack([torch.softmax(m + noise @ r.mT, -1).mean(0) for m, r in zip(f, root)])


def _probit(f: Tensor, S: Tensor) -> Tensor:
    return torch.softmax(f / (1 + math.pi / 8 * S.diagonal(dim1=-2, dim2=-1)).sqrt(), -1)


def _bridge(f: Tensor, S: Tensor) -> Tensor:
    """α_k = (1/S_kk) (1 − 2/C + e^{f_k} Σ_j e^{−f_j} / C²), after conditioning on Σ_k f_k = 0."""
    C = f.shape[-1]
    across, total = S.sum(-1), S.sum((-1, -2)).clamp_min(1e-12)
    f = f - across * (f.sum(-1) / total).unsqueeze(-1)
    v = S.diagonal(dim1=-2, dim2=-1) - across.square() / total.unsqueeze(-1)
    alpha = (1 - 2 / C + f.exp() * (-f).exp().sum(-1, keepdim=True) / C**2) / v.clamp_min(1e-12)
    return alpha / alpha.sum(-1, keepdim=True)
