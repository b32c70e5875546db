"""Bottleneck adapters — Houlsby et al., ICML 2019; placed at single layers as in LLM-Adapters, Hu et al., EMNLP 2023,
arXiv:2304.01933; with tensor-train projections, LoRETTA-adp, Yang et al., NAACL 2024, arXiv:2402.11417.

    f(z) = c (U φ(D z + b_D) + b_U)       series-in: W(x + f(x))       series-out: z + f(z), z = W x       parallel: W x + f(x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Map, Op, Residual, chain, like
from omnilora.core.parameterization import (
    Parameterization,
    Slot,
    Tensors,
    core,
    finite,
    input_side,
    kaiming,
    magnitude,
    normal,
    one_of,
    output_side,
    positive_rank,
    zeros,
)
from omnilora.core.site import Site
from omnilora.errors import BadValue, NotExpressible
from omnilora.parameterizations.tensor_train import contract, cores_of, narrowing, train_of, widening

PHI: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
PLACES = ("series-in", "series-out", "parallel")


@dataclass(frozen=True)
class Bottleneck(Parameterization):
    """``m``: width; ``phi``: a name of PHI or "identity", which merges. ``learned``: a factor of c learns, from 1 on.

    ``start``: "zero" (U = 0, the model is unchanged) or "normal" (D and U at random). ``tensor_rank`` > 0: D and U are
    tensor trains of that inner rank.
    """

    m: int = 64
    place: str = "series-out"
    phi: str = "tanh"
    c: float = 1.0
    dropout: float = 0.0
    learned: bool = False
    start: str = "zero"
    tensor_rank: int = 0
    bias: bool = False
    limit: int = 12

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        return self.phi == "identity"

    def check(self) -> None:
        positive_rank(self.m, "m")
        one_of(self.place, "place", *PLACES)
        one_of(self.phi, "phi", *PHI, "identity")
        one_of(self.start, "start", "zero", "normal")
        finite(self.c, "c")
        finite(self.dropout, "dropout", 0.0, 0.999)
        if self.tensor_rank != 0:
            positive_rank(self.tensor_rank, "tensor_rank")
        if self.limit < 2:
            raise BadValue(f"limit = {self.limit!r}.", "Modes are at least 2.")

    def first_scale(self, site: Site) -> float:
        return self.c

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if not site.called or (self.place == "series-in" and site.kind in ("conv", "embedding")):
            raise NotExpressible(f"{site.name} ({site.kind}) takes no {self.place} bottleneck.",
                                 "Its input is no row of features; adapt linear layers, or use series-out.")  # fmt: skip
        if self.bias and site.kind == "embedding":
            raise NotExpressible(f"{site.name}: biases would move the padding row.", "Leave embeddings out.")
        if self.mergeable and self.place == "series-out" and site.geometry.separate:
            raise NotExpressible(f"{site.name} is a grouped convolution: a linear map after it is no weight of it.",
                                 "Give a nonlinearity, or another place.")  # fmt: skip
        n_in = site.fan_out if self.place == "series-out" else site.fan_in
        n_out = site.fan_in if self.place == "series-in" else site.fan_out
        made = self._trains(n_in, n_out) if self.tensor_rank else self._matrices(n_in, n_out)
        if self.bias:
            made["bD"] = core(torch.empty(self.m).uniform_(-(self.m**-0.5), self.m**-0.5))
            bound = 0.0 if self.start == "zero" else n_out**-0.5
            made["bU"] = magnitude(torch.empty(n_out).uniform_(-bound, bound))
        if self.learned:
            made["s"] = core(torch.ones(1))
        return made

    def _matrices(self, n_in: int, n_out: int) -> Tensors:
        random = self.start == "normal"
        D = normal(0.02, self.m, n_in) if random else kaiming(self.m, n_in)
        return Tensors(D=input_side(D), U=output_side(normal(0.02, n_out, self.m) if random else zeros(n_out, self.m)))

    def _trains(self, n_in: int, n_out: int) -> Tensors:
        D = narrowing(n_in, self.m, self.tensor_rank, self.limit)
        U = widening(self.m, n_out, self.tensor_rank, self.limit)
        if self.start == "zero":
            U[-1] = zeros(*U[-1].shape)
        return Tensors({**cores_of("D", D), **cores_of("U", U)})

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        f = self.f(p)
        if self.place == "parallel":
            return W + f
        return chain(W, Residual(f)) if self.place == "series-in" else chain(Residual(f), W)

    def f(self, p: Slot) -> Op:
        D, U = (p.D, p.U) if not self.tensor_rank else (
            contract(train_of(p, "D")).reshape(-1, self.m).mT, contract(train_of(p, "U")).reshape(self.m, -1).mT)  # fmt: skip
        U = U * p.s if self.learned else U
        drop = Dropout(self.dropout, p.training)
        if self.phi == "identity":
            f: Op = chain(U, D, drop)
            return p.scale * (f.shift(U @ p.bD + p.bU) if self.bias else f)
        phi = PHI[self.phi]
        hidden = Map((lambda h: phi(h + like(p.bD, h))) if self.bias else phi)
        f = chain(U, hidden, D, drop)
        return p.scale * (f.shift(p.bU) if self.bias else f)
