"""Small worlds in which a method's special part shows: planted targets, tiny models, a loop that ticks the rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnilora.core.attach import adapt, slots
from omnilora.core.method import Method
from omnilora.core.run import Run, param_groups, start, wrapped_optimizer


class Stack(nn.Module):
    """Linear layers ``layers.0`` … with a nonlinearity between them; widths (n0, n1, …)."""

    def __init__(self, *widths: int, act: Callable[[Tensor], Tensor] | None = None, bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in zip(widths, widths[1:]))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.act is not None and i < len(self.layers) - 1:
                x = self.act(x)
        return x


def planted(out: int, inn: int, rank: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """A random (out, inn) matrix of the given rank with singular values between 1 and 2, times ``scale``."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(out, rank, generator=g)).Q
    v = torch.linalg.qr(torch.randn(inn, rank, generator=g)).Q
    return scale * (u * torch.linspace(2, 1, rank)) @ v.mT


def falling(rows: int, width: int) -> Tensor:
    """(rows, width) inputs with the deviations 1, 1/2, …, 1/width along random orthonormal directions."""
    return torch.randn(rows, width) @ torch.linalg.qr(torch.randn(width, width)).Q.mul(torch.arange(1, width + 1) ** -1.0).mT


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of ``model`` on (x, y): the loss that ``ol.prepare`` takes."""
    return (model(batch[0]) - batch[1]).square().mean()


def train(
    model: nn.Module,
    method: Method,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    lr: float = 1e-2,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    name: str = "default",
    ticks: bool = True,
    watch: Callable[[Run], None] | None = None,
    targets: tuple[str, ...] | None = None,
    other: Iterable[tuple[Tensor, Tensor]] | None = None,
) -> Run:
    """Adapt ``model`` and train the adapter on ``batch(step)``. ``ticks`` False: the method's rules never run.

    ``other``: batches of the second part of the data, for methods that ask for one.
    """
    adapt(model, method, targets, name=name)
    if not ticks:
        hub = model._omnilora
        hub.values["methods"][name] = Method(method.key, method.parameterization, targets=method.targets)  # type: ignore[union-attr, index]
        hub.needs_run.pop(name, None)  # type: ignore[union-attr, operator]
    run = start(model, total_steps=steps, adapter=name, other=other)

    def loss_of(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        out = model(pair[0])
        return loss(out, pair[1]), out

    opt = wrapped_optimizer(run, param_groups(model, lr, adapter=name), lambda groups: optimizer(groups, lr=lr))
    run.bind(opt)
    model.train()
    for step in range(steps):
        opt.zero_grad()
        if run.update([batch(step)], loss_of) is None:
            value, out = loss_of(batch(step))
            (value + run.loss(None, out)).backward()
        opt.step()
        if watch is not None:
            watch(run)
    run.finish()
    model.eval()
    return run


def full_batch(x: Tensor, y: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda step: (x, y)


def minibatches(x: Tensor, y: Tensor, size: int, noise: float = 0.0, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random rows with fresh label noise, the same for every call with the same seed."""

    def draw(step: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed * 100_003 + step)
        at = torch.randint(0, len(x), (size,), generator=g)
        return x[at], y[at] + noise * torch.randn(size, *y.shape[1:], generator=g)

    return draw


def learned(model: nn.Module, site: str = "layers.0", adapter: str | None = None) -> Tensor:
    """W' − W of a site as a matrix, fp32."""
    from omnilora.core.context import Context
    from omnilora.core.maps import build

    chosen = [s for s in slots(model, adapter) if s.site.name == site]
    base = chosen[0].site.W
    with torch.no_grad():
        return build(base, [(s, 1.0) for s in chosen], Context()).dense() - base.dense()


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float(((a - b).norm() / b.norm().clamp_min(1e-30)).detach())
