"""An adapter whose own entries are masked — SparseAdapter, He et al., Findings of EMNLP 2022, arXiv:2210.04284.   θ → θ ⊙ M"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Op
from omnilora.core.parameterization import Leaf, Parameterization, Slot, Tensors, Wrapper, finite, normal, own
from omnilora.core.site import Site
from omnilora.errors import BadValue
from omnilora.parameterizations.lora import LoRA


class Substituted:
    """A slot with some of its tensors replaced, by name; everything else is the slot's."""

    def __init__(self, slot: Slot, tensors: dict[str, Tensor]) -> None:
        self.slot, self.tensors = slot, tensors

    def __getattr__(self, name: str) -> Any:
        return self.tensors[name] if name in self.tensors else getattr(self.slot, name)


@dataclass(frozen=True)
class Masked(Wrapper):
    """``names``: the tensors of ``inner`` that carry a 0/1 mask. ``std`` > 0: they start at N(0, std²), whatever ``inner``
    would draw, so that scores by gradient are not all zero."""

    inner: Parameterization = LoRA()
    names: tuple[str, ...] = ("A", "B")
    std: float = 0.0

    @property
    def additive(self) -> bool:
        return self.inner.additive

    def check(self) -> None:
        super().check()
        finite(self.std, "std", 0.0)
        if not self.names:
            raise BadValue("names = ().", "Name the tensors to mask.")

    def frozen(self) -> frozenset[str]:
        return super().frozen() | {f"mask.{n}" for n in self.names}

    def init(self, site: Site, seen: Any = None) -> Tensors:
        inner = self.inner.init(site, seen)
        masks = Tensors()
        for name in self.names:
            leaf = inner.get(name)
            if not isinstance(leaf, Leaf):
                raise BadValue(f"{type(self.inner).__name__} has no tensor {name!r}.", f"It has {', '.join(inner)}.")
            masks[name] = own(leaf.value.new_ones(leaf.value.shape))
            if self.std:
                inner[name] = Leaf(normal(self.std, *leaf.value.shape), leaf.role, leaf.shared)
        return Tensors(inner=inner, mask=masks)

    def delta(self, p: Slot, ctx: Context) -> Op:
        return self.inner.delta(self.masked(p), ctx)

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        return self.inner.adapt(W, self.masked(p), ctx)

    def masked(self, p: Slot) -> Any:
        """The inner slot with θ ⊙ M in place of θ."""
        return Substituted(p.inner, {n: p.inner.get_parameter(n) * p.mask.get_parameter(n) for n in self.names})
