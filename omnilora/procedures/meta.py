"""Meta-learning of adapters: an inner loop over some of their tensors, an outer loop over all of them.

    φ_0 ⊂ θ,   φ_{t+1} = φ_t − α ∘ ∇_φ L(support; θ, φ_t),   θ, α ← Adam on L(query; θ, φ_T)

Which tensors are fast is a choice of roles: the pool's λ (AMAL), B alone, or all (MAML over LoRA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from omnilora.core.attach import slots
from omnilora.core.parameterization import positive_rank
from omnilora.core.run import trainable
from omnilora.errors import BadValue, RunError

Values = dict[str, Tensor]
Loss = Callable[[Values, Any], Tensor]  # (values that replace the model's own, batch) → mean loss
Start = Callable[[Any], Values]  # support → task-specific values that no model holds: a head from prototypes


def by_roles(model: nn.Module, *roles: str) -> list[str]:
    """Paths of the adapter's learned tensors with one of ``roles``. Raises :class:`BadValue` where there is none."""
    wanted = {id(t) for s in slots(model) for _, t in s.by_role(*roles) if t.requires_grad}
    found = [n for n, p in model.named_parameters() if id(p) in wanted]
    if not found:
        raise BadValue(f"No tensor of the adapter has a role among {roles}.", "Roles are input, output, core ….")
    return found


def inner_loop(loss: Callable[[Values], Tensor], phi: Mapping[str, Tensor], rates: Mapping[str, Tensor], steps: int,
               second_order: bool = True) -> Values:  # fmt: skip
    """φ after ``steps`` of gradient descent, differentiable in φ₀ and the rates, and through the gradients if asked."""
    now = dict(phi)
    for _ in range(steps):
        grads = torch.autograd.grad(loss(now), list(now.values()), create_graph=second_order)
        now = {k: v - rates[k] * g for (k, v), g in zip(now.items(), grads)}
    return now


class Learner:
    """``fast``: paths of the tensors of the inner loop; ``head``: names of what ``start`` makes, with one rate each.

    Every number of a fast tensor has a learned rate of its own.
    """

    def __init__(self, model: nn.Module, fast: Sequence[str], loss: Loss, start: Start = lambda support: {},
                 head: Sequence[str] = (), rate: float = 0.1, steps: int = 5, second_order: bool = True) -> None:  # fmt: skip
        if steps < 0:
            raise BadValue(f"inner_steps = {steps!r}.", "Give an integer ≥ 0.")
        if not rate > 0:
            raise BadValue(f"inner_rate = {rate!r}.", "Give a number above 0.")
        self.model, self.loss, self.start, self.steps, self.second_order = model, loss, start, steps, second_order
        own = dict(model.named_parameters())
        self.fast = {n: own[n] for n in fast}
        self.rates: dict[str, nn.Parameter] = {n: nn.Parameter(torch.full_like(p, rate)) for n, p in self.fast.items()}
        self.rates |= {n: nn.Parameter(torch.tensor(rate)) for n in head}

    def parameters(self) -> list[nn.Parameter]:
        """θ and the rates."""
        return [*trainable(self.model), *self.rates.values()]

    def adapt(self, support: Any, training: bool = False) -> Values:
        """φ of a task, from its support. Nothing in the model moves; ``training``: gradients reach θ."""
        first = {**self.fast, **self.start(support)}
        if not training:
            first = {k: v.detach().requires_grad_() for k, v in first.items()}
        with self._twice(training):
            phi = inner_loop(lambda phi: self.loss(phi, support), first, self.rates, self.steps, training and self.second_order)
        return phi if training else {k: v.detach() for k, v in phi.items()}

    def outer(self, tasks: Sequence[tuple[Any, Any]]) -> Tensor:
        """The mean loss of queries after adaptation to their supports."""
        with self._twice(True):
            return torch.stack([self.loss(self.adapt(support, True), query) for support, query in tasks]).mean()

    def _twice(self, training: bool) -> AbstractContextManager[Any]:
        """Fused attention has no second derivative."""
        return sdpa_kernel(SDPBackend.MATH) if training and self.second_order else nullcontext()


def meta_train(learner: Learner, tasks: Iterable[Sequence[tuple[Any, Any]]], lr: float = 1e-3,
               clip: float | None = 1.0) -> list[float]:  # fmt: skip
    """Adam on the outer loss, one update for each item of ``tasks``. Returns the losses."""
    parameters = learner.parameters()
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = []
    for group in tasks:
        optimizer.zero_grad()
        loss = learner.outer(group)
        if not bool(torch.isfinite(loss)):
            raise RunError(f"The outer loss is {float(loss)} after {len(losses)} updates.", "Lower inner_rate or the learning rate.")
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def check_episodes(ways: int, shots: int, queries: int) -> None:
    positive_rank(shots, "shots")
    positive_rank(queries, "queries")
    if not isinstance(ways, int) or ways < 2:
        raise BadValue(f"ways = {ways!r}.", "Give an integer ≥ 2.")
