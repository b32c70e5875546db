"""LoRA — Hu et al., ICLR 2022, arXiv:2106.09685.   W' = W + (α/r) B A"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.full import Dense
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import (
    Factored,
    Slot,
    Tensors,
    input_side,
    kaiming,
    normal,
    one_of,
    output_side,
    zeros,
)
from omnilora.core.site import ConvGeometry, Site
from omnilora.errors import NotExpressible


@dataclass(frozen=True)
class LoRA(Factored):
    """``scaling``: "alpha/r", "alpha/sqrt(r)" (rsLoRA) or "alpha". ``train``: which of "A", "B" learn.

    ``conv_layout`` "loralib": A (r·k, in·k), B (out/groups·k, r·k), ΔW the storage of B A re-read as the kernel.
    """

    by_size = True

    scaling: str = "alpha/r"
    train: str = "AB"
    init_A: str = "kaiming"
    conv_layout: str = "peft"

    def check(self) -> None:
        super().check()
        one_of(self.scaling, "scaling", "alpha/r", "alpha/sqrt(r)", "alpha")
        one_of(self.train, "train", "AB", "A", "B")
        one_of(self.init_A, "init_A", "kaiming", "gaussian", "orthonormal", "svd")
        one_of(self.conv_layout, "conv_layout", "peft", "loralib")

    def first_scale(self, site: Site) -> float:
        return self.alpha / {"alpha/r": self.r, "alpha/sqrt(r)": math.sqrt(self.r), "alpha": 1.0}[self.scaling]

    def frozen(self) -> frozenset[str]:
        return frozenset("AB") - frozenset(self.train)

    def init(self, site: Site, seen: Any = None) -> Tensors:
        r, k = self.r, 1
        fan_in, fan_out = site.fan_in, site.fan_out
        if self.conv_layout == "loralib" and site.kind == "conv":
            geometry = site.geometry
            assert isinstance(geometry, ConvGeometry)
            k = geometry.kernel[0]
            if len(geometry.kernel) != 2 or geometry.kernel != (k, k):
                raise NotExpressible(f"{site.name}: loralib's layout needs a square 2-D kernel.", "Use 'peft'.")
            fan_in, fan_out = fan_in // k, fan_out // geometry.groups
        if site.kind == "embedding" and "A" in self.train:
            return Tensors(A=input_side(zeros(r, fan_in)), B=output_side(normal(1.0, fan_out, r)))
        a = self._first_a(site, r * k, fan_in)
        return Tensors(A=input_side(a), B=output_side(zeros(*site.batch, fan_out * k, r * k)))

    def _first_a(self, site: Site, r: int, fan_in: int) -> Tensor:
        if self.init_A in ("orthonormal", "svd") and r > min(fan_in, site.fan_out):
            raise NotExpressible(f"{site.name} has no {r} orthonormal rows for init_A = {self.init_A!r}.", "Lower r.")
        if self.init_A == "orthonormal":  # rows of A orthonormal: QR of a Gaussian
            return torch.linalg.qr(normal(1.0, *site.batch, fan_in, r)).Q.mT
        if self.init_A == "svd":  # the top right singular vectors of W
            return torch.linalg.svd(site.W.dense().detach().float(), full_matrices=False).Vh[..., :r, :]
        return kaiming(*site.batch, r, fan_in) if self.init_A == "kaiming" else normal(1 / self.r, *site.batch, r, fan_in)

    def delta(self, p: Slot, ctx: Context) -> Op:
        if self.conv_layout == "loralib" and p.site is not None and p.site.kind == "conv":
            return p.scale * Dense((p.B @ p.A).reshape(p.site.fan_out, p.site.fan_in))
        return p.scale * chain(p.B, p.A, Dropout(self.dropout, p.training))
