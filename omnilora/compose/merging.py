"""Adapters as values, combined without training.   ΔW = Σ_i w_i ΔW_i"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from omnilora.core.parameterization import is_additive
from omnilora.core.state import AdapterState, SiteState, delta
from omnilora.errors import BadValue, NotExpressible
from omnilora.parameterizations.lora import LoRA


def _factors(state: AdapterState, site: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a site with its scale in B."""
    s = state.sites[site]
    ba = delta(s, state).factors() if is_additive(s.how) else None
    if ba is None:
        raise NotExpressible(f"{site}: {type(s.how).__name__} is not low-rank and additive.",
                             "Only sums of low-rank updates can be combined exactly.")  # fmt: skip
    return ba[0].detach(), ba[1].detach()


def _check(states: Sequence[AdapterState], weights: Sequence[float]) -> list[str]:
    if not states or len(states) != len(weights):
        raise BadValue(f"{len(states)} adapters and {len(weights)} weights.", "Give one weight for each adapter.")
    if any(s.carried for s in states):
        raise NotExpressible("One of the adapters carries base weights of its own.",
                             "Adapters can be combined only on one and the same base.")  # fmt: skip
    return list(dict.fromkeys(name for s in states for name in s.sites))


def _lora_state(like: AdapterState, sites: dict[str, tuple[Tensor, Tensor]], kinds: dict[str, SiteState]) -> AdapterState:
    made = {}
    for name, (b, a) in sites.items():
        r = a.shape[-2]
        made[name] = SiteState(LoRA(r, float(r)), kinds[name].kind, 1.0, {"A": a.contiguous(), "B": b.contiguous()},
                               {"A": "input", "B": "output"}, {}, kinds[name].region)  # fmt: skip
    top = max(s.how.rank() for s in made.values())
    return AdapterState("lora", {"r": top, "alpha": float(top)}, made, {}, dict(like.base), dict(like.extra))


def concat(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """The exact weighted sum, of rank Σ r_i: A = [A_1; …], B = [w_1 s_1 B_1, …]."""
    sites, kinds = {}, {}
    for name in _check(states, weights):
        parts = [(w, *_factors(s, name)) for s, w in zip(states, weights) if name in s.sites]
        kinds[name] = next(s.sites[name] for s in states if name in s.sites)
        sites[name] = (torch.cat([w * b for w, b, _ in parts], -1), torch.cat([a for _, _, a in parts], -2))
    return _lora_state(states[0], sites, kinds)


def svd(states: Sequence[AdapterState], weights: Sequence[float], rank: int) -> AdapterState:
    """The best rank-``rank`` approximation of the weighted sum, by QR and an SVD of the small core."""
    if rank < 1:
        raise BadValue(f"rank = {rank!r}.", "Give an integer ≥ 1.")
    whole = concat(states, weights)
    sites = {}
    for name, s in whole.sites.items():
        qb, rb = torch.linalg.qr(s.tensors["B"])
        qa, ra = torch.linalg.qr(s.tensors["A"].mT)
        u, sigma, vt = torch.linalg.svd(rb @ ra.mT)
        k = min(rank, len(sigma))
        root = sigma[:k].sqrt()
        sites[name] = (qb @ u[:, :k] * root, (root.unsqueeze(1) * vt[:k]) @ qa.mT)
    return _lora_state(states[0], sites, dict(whole.sites))


def average(states: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """A and B averaged apart, Â = Σ w A_i, B̂ = Σ w B_i (LoraHub, FedAvg): the product is *not* the sum of products."""
    names = _check(states, weights)
    sites, kinds = {}, {}
    for name in names:
        parts = [(w, *_factors(s, name)) for s, w in zip(states, weights) if name in s.sites]
        if len({a.shape for _, _, a in parts}) != 1:
            raise BadValue(f"{name}: ranks differ.", "Use concat, which takes any ranks.")
        kinds[name] = next(s.sites[name] for s in states if name in s.sites)
        sites[name] = (sum_of([w * b for w, b, _ in parts]), sum_of([w * a for w, _, a in parts]))
    return _lora_state(states[0], sites, kinds)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)
