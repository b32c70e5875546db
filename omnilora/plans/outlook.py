"""How sites will be run, told before anything is built: by a block's plan, a fused node, or the operator's tree, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from omnilora.core.context import Context
from omnilora.core.op import Op
from omnilora.core.parameterization import Leaf, Parameterization, Slot
from omnilora.core.site import Base, BaseLinear, ConvGeometry, Site
from omnilora.core.state import _on_meta
from omnilora.plans.blocks import llama
from omnilora.plans.normal import Normal, lower
from omnilora.stores.quantized_layer import QuantizedLinear

Told = tuple[str, str]  # plan, reason


class _Flat:
    """Named leaves as :meth:`Slot.fill` reads them."""

    def __init__(self, leaves: Mapping[str, Leaf]) -> None:
        self.leaves = leaves

    def flat(self) -> Iterator[tuple[str, Leaf]]:
        yield from self.leaves.items()


def outlook(model: nn.Module, sites: Sequence[tuple[Site, Parameterization]], tensors: Sequence[Mapping[str, Leaf]],
            quantized: bool = False) -> list[Told]:  # fmt: skip
    """The plan of each site: "block", "node" or "tree". ``quantized``: the base will be held in few bits."""
    blocks = [f"{name}." for name, layer in model.named_modules() if llama.fits(layer)]
    return [_told(site, how, leaves, quantized, any(site.name.startswith(b) for b in blocks))
            for (site, how), leaves in zip(sites, tensors, strict=True)]  # fmt: skip


def _told(site: Site, how: Parameterization, leaves: Mapping[str, Leaf], quantized: bool, inside: bool) -> Told:
    if not site.called:
        return "tree", "The tensor is made and put in the place of the layer's own."
    if site.kind not in ("linear", "conv"):
        return "tree", f"No plan serves a layer of kind {site.kind}."
    form = type(how).__name__
    if not leaves:
        return "tree", f"{form} uses another site's tensors."
    try:
        normal = _normal(site, how, leaves)
    except Exception as error:
        return "tree", f"{form} cannot be looked at without data ({type(error).__name__})."
    if normal.base is None or (not normal.low and normal.c is None):
        return "tree", f"{form} is no product of low rank beside the layer's own."
    if site.kind == "conv":
        geometry: Any = site.geometry
        plain = isinstance(geometry, ConvGeometry) and geometry.groups == 1 and geometry.pad_mode == "zeros"
        served = plain and normal.c is None and not any(k.gates or k.p for k in normal.low)
        return ("node", "") if served else ("tree", "Groups, padding modes, gates, magnitudes and dropout of convolutions run the tree.")
    if not isinstance(normal.base, (Base, BaseLinear)):
        return "node", f"{form} has a part that its tree applies; the rest is one node."
    if not quantized and not site.store.dense and not isinstance(site.layer, QuantizedLinear):
        return "node", "The layer makes its own product; the rest is one node."
    return ("block", "") if inside else ("node", "")


def _normal(site: Site, how: Parameterization, leaves: Mapping[str, Leaf]) -> Normal:
    place = _on_meta(site)
    slot = Slot(how, place, 1.0, "")
    slot.fill(_Flat(leaves), how.frozen(), {})  # type: ignore[arg-type]
    with torch.device("meta"):
        W: Op = Base(place, place.layer)
        return lower(how.adapt(W, slot, Context()))
