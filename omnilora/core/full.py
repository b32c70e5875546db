"""An own copy of a base tensor: all of it, or some of its rows. W' = own.

What is unfrozen (a norm, a bias, a head, rows of an embedding, a whole layer) trains as the adapter's own copy, so
that it is switched, saved and detached like any adapter and the base never changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Geometry, Op
from omnilora.core.parameterization import Parameterization, Slot, Tensors, own
from omnilora.core.site import Site, replaced
from omnilora.errors import BadValue


@dataclass(frozen=True)
class Full(Parameterization):
    """``rows`` None: the whole tensor. Otherwise own copies of the given vectors: rows of a stored matrix
    (tokens of an embedding, outputs of a linear layer)."""

    rows: tuple[int, ...] | None = None
    delta_form: bool = False  # stores own − W: restarts accumulate here

    def check(self) -> None:
        if self.rows is not None and (len(set(self.rows)) != len(self.rows) or any(i < 0 for i in self.rows)):
            raise BadValue(f"rows = {self.rows!r} repeats an index or names a negative one.", "Give distinct rows.")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        weight = site.read() if site.region is None else site.read()[site.region[0] : site.region[1]]
        if self.delta_form:
            return Tensors(W=own(torch.zeros(weight.shape, device=weight.device)))
        stored = weight.detach().float() if weight.dtype != torch.float64 else weight.detach()
        if self.rows is not None:
            count = stored.shape[-1] if site.kind == "embedding" else stored.shape[-2]
            if max(self.rows) >= count:
                raise BadValue(f"{site.name} has {count} rows, not row {max(self.rows)}.", "Name existing rows.")
            index = torch.tensor(self.rows, device=stored.device)
            stored = stored.mT[index] if site.kind == "embedding" else stored[index]
        return Tensors(W=own(stored.clone().contiguous()))

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        if self.delta_form:
            return W + Dense(p.W)
        if self.rows is None:
            return replaced(W, p.W)
        if p.site.kind == "embedding":
            return OwnColumns(W, p.W, self.rows)
        index = torch.tensor(self.rows, device=p.W.device)
        m = W.dense()
        return replaced(W, m.to(p.W.dtype).index_copy(-2, index, p.W))


class Dense(Op):
    """A dense ΔW."""

    def __init__(self, m: Tensor) -> None:
        self.m = m

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        return geo.full(x, geo.visible(self.m))

    def matrix(self, geo: Geometry) -> Tensor:
        return geo.visible(self.m)


class OwnColumns(Op):
    """An embedding with some tokens' vectors replaced: own (k, dim)."""

    def __init__(self, W: Op, vectors: Tensor, ids: tuple[int, ...]) -> None:
        self.W, self.vectors, self.ids = W, vectors, ids

    @property
    def geometry(self) -> Geometry:  # type: ignore[override]
        return self.W.geometry

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        y = self.W.apply(x, geo)
        hit = x.unsqueeze(-1) == torch.tensor(self.ids, device=x.device)  # (..., k)
        return torch.where(hit.any(-1, keepdim=True), self.vectors[hit.int().argmax(-1)].to(y.dtype), y)

    def matrix(self, geo: Geometry) -> Tensor:
        m = self.W.matrix(geo)
        return m.to(self.vectors.dtype).index_copy(-1, torch.tensor(self.ids, device=m.device), self.vectors.mT)
