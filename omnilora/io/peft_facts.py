"""What PEFT's layout depends on and an adapter state does not show: how and beside what a weight is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from omnilora.core.attach import slots
from omnilora.core.site import TURNED, Site
from omnilora.core.state import AdapterState, SiteState, site_at
from omnilora.errors import StateMismatch

STORED = "stored"  # the mark of a site that holds its facts


def facts(site: Site, paths: Iterable[str] = (), tied: bool = False) -> dict[str, Any]:
    """Plain data about the stored tensor of a site. ``paths``: all modules; ``alike``: those that end like this one."""
    layer = site.layer
    out: dict[str, Any] = {
        "shape": list(site.store.shape()),
        "turned": site.layout is TURNED and site.kind != "embedding",
        "order": (list(layer._parameters).index(site.param) if site.param in layer._parameters else 0),
        "holds": sorted(k for k in layer.state_dict() if not k.startswith("adapters.")),
    }
    if site.kind == "conv":
        geo: Any = site.geometry
        out |= {"groups": geo.groups, "dilation": list(geo.dilation), "padding": geo.pad_mode}
    if site.kind == "embedding":
        out |= {"tied": tied, "pad": site.geometry.padding}  # type: ignore[attr-defined]
    module = site.name if site.kind != "tensor" else site.name.rpartition(".")[0]
    out["alike"] = sorted(p for p in paths if p.endswith(module) and p != module and ".adapters" not in f".{p}")
    return out


def _uses(model: nn.Module) -> Counter[int]:
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))


def noted(model: nn.Module, state: AdapterState) -> AdapterState:
    """``state``, an adapter of ``model``, with the facts of each site among its marks."""
    uses = _uses(model)
    here = {slot.site.name: slot.site for slot in slots(model)}
    paths = [n for n, _ in model.named_modules()]
    sites = {}
    for name, s in state.sites.items():
        site = here.get(name)
        if site is not None and site.param:
            tied = uses.get(id(site.layer._parameters.get(site.param)), 1) > 1
            s = replace(s, marks={**s.marks, STORED: facts(site, paths, tied)})
        sites[name] = s
    return replace(state, sites=sites)


def check_facts(model: nn.Module, state: AdapterState) -> None:
    """PEFT ignores dilation and padding mode, and trains tied heads along: a bare PEFT folder read for another kind of
    layer than PEFT took it for would be another map. Raises StateMismatch."""
    uses: Mapping[int, int] | None = None
    for name, s in state.sites.items():
        known = s.marks.get(STORED, {})
        if s.kind not in ("conv", "embedding") or not known:
            continue
        uses = _uses(model) if uses is None else uses
        site = site_at(model, name, s)
        here = facts(site, tied=uses.get(id(site.layer._parameters.get(site.param)), 1) > 1)
        for key in ("groups", "dilation", "padding", "tied"):
            if key in known and key in here and known[key] != here[key]:
                raise StateMismatch(f"{name} has {key} {here[key]!r}; the adapter was read for {known[key]!r}.",
                                    "PEFT's map of this layer is another one.")  # fmt: skip


def shape_of(name: str, s: SiteState, state: AdapterState | None) -> tuple[int, ...] | None:
    """The stored shape of the weight, where the state knows it."""
    known = s.marks.get(STORED, {}).get("shape")
    if known is None and state is not None and name in state.base:
        known = state.base[name].shape
    return None if known is None else tuple(known)
