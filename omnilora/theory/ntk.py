"""LoRA on the linearized model — Jang, Lee & Ryu, ICML 2024, arXiv:2402.11867.

    f(x) ≈ f₀(x) + Σ_l ⟨G_l(x), B_l A_l⟩,   G_l^{(j)}(x) = ∂f_j/∂W_l at W₀
    min (1/N) Σ ℓ(f(x_n), y_n) + (λ/2)(‖A‖² + ‖B‖²),   of which  (1/N) Σ ℓ + λ ‖ΔW‖_*  is the convex form

An optimum of rank r* with r*(r*+1)/2 ≤ KN exists; where r(r+1)/2 > KN every second-order stationary point is global.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from omnilora.core.parameterization import finite, one_of, positive_rank
from omnilora.errors import BadValue, nearest

LIMIT = 200_000_000  # numbers in all gradients: 1.6 GB in fp64

Deltas = dict[str, Tensor]


def rank_bound(n: int, k: int) -> int:
    """The largest r with r(r+1)/2 ≤ KN: an optimum has no more."""
    return int(((8 * n * k + 1) ** 0.5 - 1) / 2)


def sufficient_rank(n: int, k: int) -> int:
    """The least r with r(r+1)/2 > KN: from there on there is no spurious minimum."""
    return rank_bound(n, k) + 1


@dataclass(frozen=True)
class Linearized:
    """f₀ (N, K) and G of each matrix (N, K, out, in), fp64."""

    f0: Tensor
    G: Mapping[str, Tensor]

    def __call__(self, deltas: Mapping[str, Tensor]) -> Tensor:
        """f₀ + Σ ⟨G, ΔW⟩, (N, K)."""
        return self.f0 + sum(torch.einsum("nkoi,oi->nk", self.G[name], d) for name, d in deltas.items())

    @property
    def shape(self) -> tuple[int, int]:
        return self.f0.shape[0], self.f0.shape[1]


def linearize(model: nn.Module, names: Sequence[str], inputs: Sequence[object],
              outputs: Callable[[Callable[[object], object], object], Tensor] | None = None, limit: int = LIMIT) -> Linearized:  # fmt: skip
    """Gradients of the outputs of each input with respect to the matrices ``names`` (paths of parameters).

    Args:
        inputs: one at a time; ``outputs(call, input)`` runs ``call`` (the model) and gives K numbers. Default: call(input).

    Raises: :class:`BadValue` where the gradients would hold more than ``limit`` numbers, before any is computed.
    """
    known = dict(model.named_parameters())
    for name in names:
        if name not in known:
            raise BadValue(f"No parameter {name!r}.", nearest(name, known))
    values = {n: known[n].detach().clone().requires_grad_(True) for n in names}

    def run(item: object) -> Tensor:
        def call(*args: object, **kwargs: object) -> object:
            return functional_call(model, values, args, kwargs)

        found = call(item) if outputs is None else outputs(call, item)
        return found.reshape(-1)  # type: ignore[union-attr]

    first = run(inputs[0])
    size = len(inputs) * len(first) * sum(v.numel() for v in values.values())
    if size > limit:
        raise BadValue(f"Linearizing {len(inputs)} inputs with {len(first)} outputs at {len(names)} matrices needs {size:,} "
                       f"numbers, more than {limit:,}.", "Use fewer rows, one layer's matrices, or a smaller model.")  # fmt: skip
    f0, G = [], {n: [] for n in names}
    for item in inputs:
        out = run(item)
        f0.append(out.detach().double())
        rows = [torch.autograd.grad(o, list(values.values()), retain_graph=True) for o in out]
        for at, name in enumerate(names):
            G[name].append(torch.stack([row[at].double() for row in rows]))
    return Linearized(torch.stack(f0), {n: torch.stack(g) for n, g in G.items()})


def loss_of(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean over inputs: "squares" (½ ‖f − y‖²) or "cross-entropy"."""
    one_of(kind, "loss", "squares", "cross-entropy")
    if kind == "squares":
        return lambda f, y: 0.5 * (f - y).square().sum(-1).mean()
    return lambda f, y: nn.functional.cross_entropy(f, y)


def train_factors(lin: Linearized, y: Tensor, r: int, lam: float, loss: str = "squares", seed: int = 0, steps: int = 500,
                  decay: bool = True) -> tuple[Deltas, float]:  # fmt: skip
    """Linearized LoRA by L-BFGS from A ~ N(0, 1/(r·in²)) and B = 0: (ΔW = B A by name, the objective).

    ``decay`` False: the regularizer is reported but never acts, as in the official code.
    """
    positive_rank(r)
    finite(lam, "lam", 0.0)
    g, f = torch.Generator().manual_seed(seed), loss_of(loss)
    A = {n: (torch.randn(r, t.shape[-1], generator=g, dtype=torch.float64) / (r**0.5 * t.shape[-1])) for n, t in lin.G.items()}
    B = {n: 1e-3 * torch.randn(t.shape[-2], r, generator=g, dtype=torch.float64) for n, t in lin.G.items()}
    tensors = [t.requires_grad_(True) for t in (*A.values(), *B.values())]
    opt = torch.optim.LBFGS(tensors, lr=1.0, max_iter=steps, history_size=20, line_search_fn="strong_wolfe",
                            tolerance_grad=1e-11, tolerance_change=1e-14)  # fmt: skip

    def fit() -> Tensor:
        return f(lin({n: B[n] @ A[n] for n in A}), y)

    def penalty() -> Tensor:
        return lam / 2 * torch.stack([t.square().sum() for t in tensors]).sum()

    def closure() -> Tensor:
        opt.zero_grad()
        value = fit() + penalty() if decay else fit()
        value.backward()
        return value

    opt.step(closure)
    with torch.no_grad():
        return {n: B[n] @ A[n] for n in A}, float(fit() + penalty())


def nuclear_optimum(lin: Linearized, y: Tensor, lam: float, loss: str = "squares", steps: int = 3000,
                    tolerance: float = 1e-10) -> tuple[Deltas, float]:  # fmt: skip
    """The global optimum of the convex form by accelerated proximal gradient with restarts: (ΔW by name, the objective).

    Ends when twenty steps lower the objective by less than ``tolerance``, relative.
    """
    f = loss_of(loss)
    D = {n: torch.zeros(t.shape[-2:], dtype=torch.float64) for n, t in lin.G.items()}
    look, momentum, before = dict(D), 1.0, float("inf")

    def objective() -> float:
        return float(f(lin(D), y)) + lam * sum(float(torch.linalg.svdvals(d).sum()) for d in D.values())

    flat = torch.cat([t.flatten(2) for t in lin.G.values()], -1).flatten(0, 1)  # (N K, numbers)
    step = 1.0 / float(torch.linalg.matrix_norm(flat, 2) ** 2 / lin.shape[0])
    for count in range(steps):
        at = {n: t.clone().requires_grad_(True) for n, t in look.items()}
        slope = torch.autograd.grad(f(lin(at), y), list(at.values()))
        new = {n: shrink(t - step * s, step * lam) for (n, t), s in zip(look.items(), slope)}
        nxt = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        look = {n: new[n] + (momentum - 1) / nxt * (new[n] - D[n]) for n in new}
        backwards = sum(float(((look[n] - new[n]) * (new[n] - D[n])).sum()) for n in new) > 0
        D, momentum = new, 1.0 if backwards else nxt
        if count % 20 == 19:
            now = objective()
            if before - now < tolerance * abs(now):
                break
            before = now
    return D, objective()


def certificate(lin: Linearized, deltas: Mapping[str, Tensor], y: Tensor, lam: float, loss: str = "squares") -> float:
    """How far F(ΔW) = fit + λ‖ΔW‖_* can lie above its global minimum, at the most.

    With S = ∇fit(ΔW) and ‖V‖_* ≤ F(ΔW)/λ for every better V:  F(ΔW) − min F ≤ λ‖ΔW‖_* + ⟨S, ΔW⟩ + F(ΔW)/λ · max(‖S‖₂ − λ, 0)
    """
    f = loss_of(loss)
    at = {n: t.detach().clone().requires_grad_(True) for n, t in deltas.items()}
    fit = f(lin(at), y)
    slopes = dict(zip(at, torch.autograd.grad(fit, list(at.values()))))
    size = sum(float(torch.linalg.svdvals(d.detach()).sum()) for d in at.values())
    along = sum(float((slopes[n] * at[n].detach()).sum()) for n in at)
    steepest = max(float(torch.linalg.matrix_norm(s, 2)) for s in slopes.values())
    return lam * size + along + (float(fit.detach()) / lam + size) * max(steepest - lam, 0.0)


def shrink(m: Tensor, by: float) -> Tensor:
    """The proximal map of by · ‖·‖_*: singular values are soft-thresholded."""
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return (u * (s - by).clamp_min(0.0)) @ vh


def numerical_rank(deltas: Mapping[str, Tensor], tolerance: float = 1e-5) -> int:
    """The largest rank among the changes, relative to the largest singular value of all; what is below 1e-7 is zero."""
    values = [torch.linalg.svdvals(d) for d in deltas.values()]
    least = max(tolerance * max(float(s[0]) for s in values), 1e-7)
    return max(int((s > least).sum()) for s in values)


@dataclass(frozen=True)
class Study:
    """What the theory says of one small problem, and what was found."""

    inputs: int
    outputs: int
    bound: int  # r*(r*+1)/2 ≤ KN
    optimum: float  # the best objective found at a sufficient rank …
    certified_gap: float  # … and how far above the global minimum it can lie, at the most
    optimum_rank: int
    objectives: Mapping[int, tuple[float, ...]]  # rank → the objective from each seed
    gap: float  # ‖f(W + ΔW) − linearized‖ / ‖linearized − f₀‖, of the optimum

    @property
    def bound_holds(self) -> bool:
        return self.optimum_rank <= self.bound

    def reaches(self, rank: int, tolerance: float = 1e-3) -> bool:
        """Whether every seed of ``rank`` ends within ``tolerance`` of the optimum, relative."""
        return all(v <= self.optimum * (1 + tolerance) for v in self.objectives[rank])


def study(model: nn.Module, names: Sequence[str], inputs: Sequence[object], y: Tensor, lam: float = 0.05, loss: str = "squares",
          ranks: Sequence[int] | None = None, seeds: int = 3,
          outputs: Callable[[Callable[[object], object], object], Tensor] | None = None) -> Study:  # fmt: skip
    """Linearize a small model and compare where descent on the factors ends with the global optimum, rank by rank.

    The optimum is the best end of a sufficient rank; its :func:`certificate` bounds the distance to the global minimum.

    Args:
        ranks: tried besides the least sufficient one; default: 1.
    """
    lin = linearize(model, names, inputs, outputs)
    n, k = lin.shape
    most = min(min(t.shape[-2:]) for t in lin.G.values())
    enough = min(sufficient_rank(n, k), most)
    target = y.double() if y.is_floating_point() else y
    ends = {r: [train_factors(lin, target, r, lam, loss, seed) for seed in range(seeds)]
            for r in sorted({min(r, most) for r in (*(ranks or (1,)), enough)})}  # fmt: skip
    best, value = min(ends[enough], key=lambda end: end[1])
    found = {r: tuple(v for _, v in all_seeds) for r, all_seeds in ends.items()}
    return Study(n, k, rank_bound(n, k), value, certificate(lin, best, target, lam, loss), numerical_rank(best, 1e-3), found,
                 _gap(model, lin, best, inputs, outputs))  # fmt: skip


def _gap(model: nn.Module, lin: Linearized, deltas: Deltas, inputs: Sequence[object],
         outputs: Callable[[Callable[[object], object], object], Tensor] | None) -> float:  # fmt: skip
    known = dict(model.named_parameters())
    moved = {n: known[n].detach() + d.to(known[n].dtype) for n, d in deltas.items()}
    with torch.no_grad():
        real = []
        for item in inputs:
            def call(*args: object, **kwargs: object) -> object:
                return functional_call(model, moved, args, kwargs)

            real.append((call(item) if outputs is None else outputs(call, item)).reshape(-1).double())  # type: ignore[union-attr]
        linear = lin(deltas)
        return float((torch.stack(real) - linear).norm() / (linear - lin.f0).norm().clamp_min(1e-30))
