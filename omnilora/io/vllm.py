"""PEFT's layout as vLLM and SGLang read it: one rank and one α for the whole adapter, nothing but LoRA of linear layers."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from omnilora.core.state import AdapterState
from omnilora.errors import NotExpressible
from omnilora.io.lycoris import plain
from omnilora.io.peft_names import family_of
from omnilora.parameterizations.lora import LoRA


def folded(state: AdapterState) -> AdapterState:
    """Linear LoRA of one rank with scale 1: B takes the scale, shorter factors are filled with zeros."""
    thin: dict[str, tuple[Tensor, Tensor, float]] = {}
    for name, s in state.sites.items():
        if s.region is not None:
            raise NotExpressible(f"{name} is a slice of a fused layer.", "Give rank= and the model to lower it.")
        ba = plain(name, s, state) if s.kind == "linear" else None
        if ba is None:
            what = "an own copy" if family_of(s.how) == "own" else f"{type(s.how).__name__} on a {s.kind}"
            raise NotExpressible(f"{name}: vLLM serves LoRA of linear layers, not {what}.",
                                 "Give rank= to lower it, or leave it out.")  # fmt: skip
        thin[name] = ba
    r = max((a.shape[0] for _, a, _ in thin.values()), default=0)
    sites = {}
    for name, (b, a, scale) in thin.items():
        pad = r - a.shape[0]
        s = state.sites[name]
        tensors = {"A": nn.functional.pad(a, (0, 0, 0, pad)), "B": nn.functional.pad(b * scale, (0, pad))}
        dropout = s.how.dropout if type(s.how) is LoRA else 0.0
        sites[name] = replace(s, how=LoRA(r=r, alpha=float(r), dropout=dropout), scale=1.0, tensors=tensors, shared={},
                              roles={"A": "input", "B": "output"})  # fmt: skip
    return replace(state, sites=sites, shared={})
