"""PEFT adapters that were trained on a base from which their start was taken, and not converted since.

PEFT takes the start out of the base again when it loads one. Here the base stays: ΔW = s (B A − B₀ A₀), with B₀ A₀ computed
from the weight as PEFT computes it. PiSSA: s B₀ A₀ is the best approximation of W of rank r; OLoRA: B₀ = Q_{:r}, A₀ = R_{:r}
of W = Q R.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.site import called_site
from omnilora.core.state import SiteState
from omnilora.errors import NotExpressible, StateMismatch, nearest
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.shifted import ShiftedLoRA


def from_the_base(start: Any) -> bool:
    """Whether a value of init_lora_weights takes something out of the base that its weights alone give again."""
    return start == "olora" or start == "pissa"


def taken_out(W: Tensor, r: int, scale: float, start: str) -> tuple[Tensor, Tensor]:
    """(B₀, A₀)."""
    if start == "olora":
        Q, R = torch.linalg.qr(W)
        return Q[:, :r].contiguous(), R[:r].contiguous()
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (sigma[:r] / scale).sqrt()
    return U[:, :r] * root, root.unsqueeze(-1) * Vh[:r]


def shifted(sites: Mapping[str, SiteState], start: str, model: nn.Module) -> dict[str, SiteState]:
    """Every site of plain LoRA with its start beside it."""
    layers = dict(model.named_modules())
    out = {}
    for name, s in sites.items():
        if "A" not in s.roles and "inner.A" not in s.roles:
            out[name] = s
            continue
        site = called_site(name, layers[name]) if name in layers else None
        if site is None:
            raise StateMismatch(f"The model has no layer at {name!r}.", nearest(name, layers))
        if type(s.how) is not LoRA or s.kind != "linear" or site.kind != "linear":
            raise NotExpressible(f"{name}: init_lora_weights = {start!r} is read on linear layers under plain LoRA only.")
        if site.store.parameter.is_meta:
            raise NotExpressible(f"init_lora_weights = {start!r} asks for the base's weights.", "Give the model with its weights.")
        B0, A0 = taken_out(site.read().detach().float().cpu(), s.how.r, s.scale, start)
        fields = {f.name: getattr(s.how, f.name) for f in dataclasses.fields(s.how)}
        out[name] = replace(s, how=ShiftedLoRA(**fields), tensors={**s.tensors, "A0": A0, "B0": B0},
                            roles={**s.roles, "A0": "own", "B0": "own"})  # fmt: skip
    return out
