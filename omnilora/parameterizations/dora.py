"""DoRA — Liu et al., ICML 2024, arXiv:2402.09353.   W' = m ⊙ V / ‖V‖_row,  V = W + ΔW,  m₀ = ‖W‖_row"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from omnilora.core.context import Context
from omnilora.core.op import Op, chain
from omnilora.core.parameterization import Parameterization, Slot, Tensors, Wrapper, magnitude
from omnilora.core.site import Site
from omnilora.parameterizations.lora import LoRA


@dataclass(frozen=True)
class DoRA(Wrapper):
    """A wrapper over any additive parameterization. The norm is constant in the backward pass unless told."""

    inner: Parameterization = LoRA()
    detach_norm: bool = True
    reads_weight = True

    @property
    def exact_gradient(self) -> bool:
        return not self.detach_norm and self.inner.exact_gradient

    def init(self, site: Site, seen: Any = None) -> Tensors:
        return Tensors(inner=self.inner.init(site, seen), m=magnitude(site.W.sq_norm().detach().sqrt()))

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        V = self.inner.adapt(W, p.inner, ctx)
        with torch.no_grad() if self.detach_norm else nullcontext():
            n = V.sq_norm().clamp_min(1e-24).sqrt()
        return chain(p.m / n, V.linear).shift(W.offset)
