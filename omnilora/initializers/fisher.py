"""Row and column weights of a diagonal Fisher.   F = Σ over samples (∂L/∂W)²,  row = √mean_j F,  col = √mean_i F / √mean F

(row_i col_j)² is the rank-one approximation of F, in F's unit, so that matrices can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.observe import Statistic, Together, observe
from omnilora.core.site import Site

FLOOR = 1e-6  # of the largest weight: dead inputs and outputs keep a positive one


class SampleFisher(Statistic):
    """(mean over inputs (out,), mean over outputs (in,)) of Σ (g xᵀ)², one forward being one sample."""

    needs_gradient = True
    means: tuple[Tensor | float, Tensor | float] = (0.0, 0.0)

    def update(self, x: Tensor, g: Tensor | None) -> None:
        assert g is not None
        squared = (g.mT @ x).square()
        self.means = (self.means[0] + squared.mean(1), self.means[1] + squared.mean(0))

    def value(self) -> Any:
        return self.means


def samples(batch: Any) -> Iterator[Any]:
    """The rows of a batch, each a batch of one: a tensor, a sequence or a mapping of them; or the batch, if they belong together."""
    if isinstance(batch, Together):
        yield batch
    elif isinstance(batch, Tensor):
        yield from batch.split(1)
    elif isinstance(batch, Mapping):
        parts = {k: list(samples(v)) for k, v in batch.items() if isinstance(v, Tensor)}
        rest = {k: v for k, v in batch.items() if not isinstance(v, Tensor)}
        for row in zip(*parts.values(), strict=True):
            yield {**rest, **dict(zip(parts, row, strict=True))}
    else:
        yield from zip(*(samples(part) for part in batch), strict=True)


def fisher_weights(model: nn.Module, sites: Sequence[Site], batches: Sequence[Any],
                   loss: Callable[[nn.Module, Any], Tensor],
                   count: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """{site: (row (out,), col (in,))}, positive, from the first ``count`` rows of the batches."""
    rows = list(islice((row for batch in batches for row in samples(batch)), count))
    seen = observe(model, sites, rows, loss, {"fisher": SampleFisher})
    out = {}
    for name, stats in seen.items():
        by_row, by_col = stats["fisher"]
        row, col = torch.as_tensor(by_row).sqrt(), torch.as_tensor(by_col).sqrt()
        mean = row.square().mean().sqrt().clamp_min(torch.finfo(row.dtype).tiny)
        out[name] = (_above(row), _above(col / mean))
    return out


def _above(weight: Tensor) -> Tensor:
    top = weight.max()
    return torch.ones_like(weight) if top == 0 else weight.clamp_min(FLOOR * float(top))
