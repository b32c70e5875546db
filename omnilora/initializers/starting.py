"""Starts that are read off the weight or off data: how (B, A) reach a fresh slot, and what is observed before."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import plan
from omnilora.core.method import Method
from omnilora.core.observe import Statistic, observable, observe
from omnilora.core.parameterization import Parameterization, Slot
from omnilora.core.site import Site
from omnilora.core.targets import Targets, targets_from
from omnilora.parameterizations.shifted import copy_start, start_at

Factors = tuple[Tensor, Tensor]  # B (…, out, r), A (…, r, in)
Start = Callable[[Tensor, int, Any], Factors]  # W (…, out, in), r, what was seen at the site → B, A


def wide(t: Tensor) -> Tensor:
    """Decompositions run in fp32 at least, whatever the weight is stored in."""
    t = t.detach()
    return t if t.dtype == torch.float64 else t.float()


def shifted(start: Start, *, whole: bool = True, needs_data: bool = False) -> Callable[[Slot, Any], None]:
    """A ``fill`` for ShiftedLoRA. ``whole``: start's B A is all of ΔW₀, else s B A is; a site without data keeps LoRA's."""
    put = start_at if whole else copy_start

    def fill(slot: Slot, seen: Any) -> None:
        if "A0" not in slot.roles or (needs_data and seen is None):
            return
        B, A = start(slot.site.W.dense(), slot.A.shape[-2], seen)
        put(slot, B, slot.site.geometry.visible(A))

    return fill


def watched(model: nn.Module, made: Method, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor],
            targets: Targets | None, statistic: type[Statistic]) -> tuple[list[tuple[Site, Parameterization]], dict[str, Any]]:  # fmt: skip
    """(sites with their forms, {site: value}) of the adapter to come. Sites that cannot be observed keep LoRA's start."""
    where = targets_from(targets if targets is not None else made.targets)
    sites = [(s, how) for s, how in plan(model, dataclasses.replace(made, prepare=None), where)
             if type(how) is type(made.parameterization)]  # fmt: skip
    heard = [s for s, _ in sites if observable(s)]
    rest = [s.name for s, _ in sites if not observable(s)]
    if rest:
        shown = ", ".join(rest[:4]) + (" …" if len(rest) > 4 else "")
        warnings.warn(f"{len(rest)} site(s) cannot be observed and start as LoRA does: {shown}.", stacklevel=5)
    seen = observe(model, heard, batches, loss, {"": statistic})
    return sites, {name: stats[""] for name, stats in seen.items()}


def seen_by(made: Method, seen: Mapping[str, Any], **changes: Any) -> Method:
    """The method with its data looked at."""
    return dataclasses.replace(made, prepare=None, seen=seen, **changes)
