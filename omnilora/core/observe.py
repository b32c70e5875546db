"""Statistics at sites, over data: what EVA, LQER, LoRA-drop, PRILoRA, Laplace … decide by.

A statistic sees, for every called site, the tokens x (n, in) that reach it and, if it asks, the gradients g (n, out)
of the loss with respect to its output. Padding is left out where batches carry an ``attention_mask``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.context import EMPTY
from omnilora.core.parameterization import Slot
from omnilora.core.site import ConvGeometry, EmbeddingGeometry, Site
from omnilora.errors import BadValue


class Statistic(ABC):
    """One accumulator for one site."""

    needs_gradient = False

    def __init__(self, site: Site, slot: Slot | None = None) -> None:
        self.site, self.slot = site, slot
        self.count = 0

    @abstractmethod
    def update(self, x: Tensor, g: Tensor | None) -> None:
        """x (n, in), g (n, out) or None; both fp32 or wider."""

    @abstractmethod
    def value(self) -> Any: ...


class MeanAbs(Statistic):
    """mean |x_j|, (in,)."""

    total: Tensor | float = 0.0

    def update(self, x: Tensor, g: Tensor | None) -> None:
        self.total, self.count = self.total + x.abs().sum(0), self.count + len(x)

    def value(self) -> Any:
        return self.total / self.count


class ColumnNorm(Statistic):
    """‖X_:,j‖₂, (in,)."""

    total: Tensor | float = 0.0

    def update(self, x: Tensor, g: Tensor | None) -> None:
        self.total = self.total + x.square().sum(0)

    def value(self) -> Any:
        return torch.as_tensor(self.total).sqrt()


class Gram(Statistic):
    """Σ x xᵀ, (in, in)."""

    total: Tensor | float = 0.0

    def update(self, x: Tensor, g: Tensor | None) -> None:
        self.total, self.count = self.total + x.mT @ x, self.count + len(x)

    def value(self) -> Any:
        return self.total


class Gradient(Statistic):
    """∂L/∂W = Σ g xᵀ, (out, in)."""

    needs_gradient = True
    total: Tensor | float = 0.0

    def update(self, x: Tensor, g: Tensor | None) -> None:
        assert g is not None
        self.total = self.total + g.mT @ x

    def value(self) -> Any:
        return self.total


class Fisher(Statistic):
    """Diagonal of the empirical Fisher per token, Σ g² x²ᵀ, (out, in)."""

    needs_gradient = True
    total: Tensor | float = 0.0

    def update(self, x: Tensor, g: Tensor | None) -> None:
        assert g is not None
        self.total = self.total + g.square().mT @ x.square()

    def value(self) -> Any:
        return self.total


class KFAC(Statistic):
    """(Σ x xᵀ, Σ g gᵀ): the Kronecker pair of the Fisher."""

    needs_gradient = True
    pair: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)

    def update(self, x: Tensor, g: Tensor | None) -> None:
        assert g is not None
        self.pair = (self.pair[0] + x.mT @ x, self.pair[1] + g.mT @ g)
        self.count += len(x)

    def value(self) -> Any:
        return self.pair


class DeltaEnergy(Statistic):
    """Σ ‖ΔW x‖² of the slot's additive parameterization: LoRA-drop's importance."""

    total: Tensor | float = 0.0

    def update(self, x: Tensor, g: Tensor | None) -> None:
        if self.slot is None:
            raise BadValue("DeltaEnergy needs an adapter.", "Observe an adapted model.")
        self.total = self.total + self.slot.how.delta(self.slot, EMPTY)(x).square().sum()

    def value(self) -> Any:
        return float(self.total)


class Together(dict[str, Any]):
    """A batch whose rows have no loss of their own: they are each other's negatives, say. Never taken apart into rows."""


def observe(
    model: nn.Module,
    sites: Sequence[Site] | Sequence[Slot],
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    statistics: Mapping[str, type[Statistic]],
) -> dict[str, dict[str, Any]]:
    """{site name: {statistic: value}} over ``batches``, in evaluation mode; weights and gradients stay as they are.

    Convolutions see patches: x (images · positions, in · kernel). Embeddings cannot be observed.
    """
    pairs = [(s.site, s) if isinstance(s, Slot) else (s, None) for s in sites]
    made = {site.name: {k: cls(site, slot) for k, cls in statistics.items()} for site, slot in pairs}
    wants_gradient = any(cls.needs_gradient for cls in statistics.values())
    mask: list[Tensor | None] = [None]
    handles = [site.layer.register_forward_hook(_listener(site, list(made[site.name].values()), mask, wants_gradient))
               for site, _ in pairs]  # fmt: skip
    mode = model.training
    model.eval()
    try:
        for batch in batches:
            mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if wants_gradient:
                grads = [p.grad for p in model.parameters()]
                loss(model, batch).backward()
                for p, g in zip(model.parameters(), grads, strict=True):
                    p.grad = g
            else:
                with torch.no_grad():
                    loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(mode)
    return {name: {k: s.value() for k, s in stats.items()} for name, stats in made.items()}


def _listener(site: Site, stats: list[Statistic], mask: list[Tensor | None], backward: bool) -> Callable[..., None]:
    def heard(layer: nn.Module, args: Any, output: Any) -> None:
        x = tokens(site, args[0])
        y = output[0] if isinstance(output, tuple) else output
        keep = mask[0].bool().flatten() if mask[0] is not None and mask[0].numel() == len(x) else None
        seen = (x if keep is None else x[keep]).detach().float()
        if not backward:
            for s in stats:
                s.update(seen, None)
            return
        if not y.requires_grad:
            y.requires_grad_()

        def caught(g: Tensor) -> None:
            flat = site.features(g).flatten(0, -2).float()
            flat = flat if keep is None else flat[keep]
            with torch.no_grad():
                for s in stats:
                    s.update(seen, flat)

        y.register_hook(caught)

    return heard


def listen(site: Site, heard: Callable[[Tensor], None]) -> Any:
    """Call ``heard(x)`` with the tokens x (n, in) of every training forward of a site; returns a handle to remove."""

    def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
        if layer.training and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            x = args[0] if args else next(iter(kwargs.values()))
            with torch.no_grad():
                heard(tokens(site, x.detach()))

    return site.layer.register_forward_pre_hook(hook, with_kwargs=True)


def observable(site: Site) -> bool:
    """Whether the site's inputs are rows that meet its matrix: no embeddings, no tensors that another layer reads."""
    geo = site.geometry
    if isinstance(geo, ConvGeometry):
        return len(geo.kernel) == 2 and geo.groups == 1 and geo.pad_mode == "zeros" and not isinstance(geo.padding, str)
    return site.called and site.kind == "linear"


def tokens(site: Site, x: Tensor) -> Tensor:
    """The rows (n, in) that meet the site's matrix."""
    geo = site.geometry
    if isinstance(geo, EmbeddingGeometry):
        raise BadValue(f"{site.name} is an embedding: its input has no features to observe.", "Leave it out.")
    if isinstance(geo, ConvGeometry):
        if not observable(site):
            raise BadValue(f"{site.name}: only 2-D convolutions without groups, padded by zeros, can be observed.", "Leave it out.")
        cols = torch.nn.functional.unfold(x, geo.kernel, geo.dilation, geo.padding, geo.stride)
        return cols.mT.flatten(0, 1)
    return x.flatten(0, -2)
