"""An adapter as a value: what is saved, sent, averaged, composed, served and exported."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import TiedUse, activate, check, find_hub, hub_of, place, slots
from omnilora.core.fingerprint import Fingerprint, compare, fingerprints, raw_bytes
from omnilora.core.layer import base_modules, path_name
from omnilora.core.method import Method
from omnilora.core.op import Op
from omnilora.core.parameterization import Leaf, Parameterization, Tensors, from_config, to_config
from omnilora.core.site import PLAIN, Site, called_site, read_site, reader_of, source_site
from omnilora.core.store import store_named
from omnilora.errors import AttachError, BaseMismatch, StateMismatch, nearest


@dataclass(frozen=True, eq=False)
class SiteState:
    """One site: its parameterization, scale, tensors by nested name, and which of them are shared. ``shape``: outputs and
    inputs of its matrix; older files do not have it."""

    how: Parameterization
    kind: str
    scale: float
    tensors: Mapping[str, Tensor]
    roles: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)  # nested name → key in AdapterState.shared
    region: tuple[int, int] | None = None
    marks: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, int] | None = None

    def tensor(self, name: str, state: AdapterState) -> Tensor:
        return state.shared[self.shared[name]] if name in self.shared else self.tensors[name]


@dataclass(frozen=True, eq=False)
class Carried:
    """A base weight that the original base does not give: the class of its store, what it says of itself, its tensors."""

    store: str
    said: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class AdapterState:
    """A whole adapter. ``extra``: plain JSON data that belongs to it (label names, added tokens). ``carried``: base
    weights that go with it, by layer."""

    method: str
    hyper: Mapping[str, Any]
    sites: Mapping[str, SiteState]
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, Fingerprint] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    carried: Mapping[str, Carried] = field(default_factory=dict)

    def flat(self) -> dict[str, Tensor]:
        """The adapter's tensors once, by a stable name."""
        out = {f"{site}::{name}": t for site, s in self.sites.items() for name, t in s.tensors.items()}
        return {**out, **{f"shared::{key}": t for key, t in self.shared.items()}}

    def everything(self) -> dict[str, Tensor]:
        """:meth:`flat`, and the tensors of carried weights."""
        held = {f"carried::{path}::{name}": t for path, c in self.carried.items() for name, t in c.tensors.items()}
        return {**self.flat(), **held}

    def content(self) -> str:
        """SHA-256 over names, shapes, dtypes, scales and bytes: the adapter's identity."""
        h = hashlib.sha256()
        for name, t in sorted(self.everything().items()):
            h.update(f"{name}|{tuple(t.shape)}|{t.dtype}|".encode())
            h.update(raw_bytes(t))
        hows: dict[int, str] = {}
        for name, s in sorted(self.sites.items()):
            how = hows.get(id(s.how)) or hows.setdefault(id(s.how), repr(to_config(s.how)))
            h.update(f"{name}|{s.scale!r}|{how}".encode())
        for path, c in sorted(self.carried.items()):
            h.update(f"{path}|{c.store}|{sorted(c.said.items())!r}".encode())
        return h.hexdigest()

    def numel(self) -> int:
        return sum(t.numel() for t in self.flat().values())


Combine = Callable[[Sequence[AdapterState], Sequence[float]], AdapterState]


def state(model: nn.Module, adapter: str | None = None, *, with_base: bool = True) -> AdapterState:
    """The adapter as a value; tensors are detached copies on the CPU."""
    from omnilora.core.run import _the_adapter

    name = _the_adapter(model, adapter)
    hub = hub_of(model)
    if hub.merged:
        raise AttachError("The model is merged: its weights are not the base that the adapter belongs to.",
                          "Call ol.unmerge(model) first.")  # fmt: skip
    check(model)
    method: Method = hub.values["methods"][name]
    sites: dict[str, SiteState] = {}
    pool: dict[str, Tensor] = {}
    for slot in slots(model, name):
        tensors = {}
        if not isinstance(slot.how, TiedUse):
            for key, t in slot.tensors():
                value = t.detach().cpu().clone()
                if key in slot.shared:
                    pool.setdefault(slot.shared[key], value)
                else:
                    tensors[key] = value
        marks = {k: v for k, v in slot.marks.items() if k != "optional"}
        sites[slot.site.name] = SiteState(slot.how, slot.site.kind, slot.scale, tensors, dict(slot.roles),
                                          dict(slot.shared), slot.site.region, marks,
                                          (slot.site.fan_out, slot.site.fan_in))  # fmt: skip
    base: dict[str, Fingerprint] = {}
    if with_base:
        touched: dict[str, Site] = {}
        for slot in slots(model, name):
            site = slot.site
            if site.param and not site.store.parameter.is_meta:
                touched.setdefault(f"{site.name.partition('[')[0]}", site)
        base = fingerprints(touched)
    carried = {s.site.name.partition("[")[0]: _carried(s.site) for s in slots(model, name)
               if s.site.param and s.site.store.carried}  # fmt: skip
    return AdapterState(method.key, dict(method.hyper), sites, pool, base,
                        dict(hub.values.get("extra", {}).get(name, {})), carried)  # fmt: skip


def _carried(site: Site) -> Carried:
    store = site.store
    tensors = {k: t.detach().cpu().clone() for k, t in store.tensors().items()}
    return Carried(type(store).__name__, store.describe(), tensors)


def carried_weights(state: AdapterState, layers: Mapping[str, nn.Module]) -> list[Callable[[], None]]:
    """Check the carried weights of ``state`` against the model's layers; calling what comes back puts them there."""
    out = []
    for path, c in state.carried.items():
        if path not in layers:
            raise StateMismatch(f"The model has no layer at {path!r}.", nearest(path, layers))
        out.append(store_named(c.store).restored(layers[path], c.said, c.tensors, state.base.get(path)))
    return out


def site_at(model: nn.Module, name: str, s: SiteState, layers: Mapping[str, nn.Module] | None = None) -> Site:
    """The site of ``model`` that a saved site names. Raises :class:`StateMismatch` where there is none."""
    layers = dict(base_modules(model)) if layers is None else layers
    path = name.partition("[")[0] if s.region is not None else name
    made: Site | None = None
    if s.kind == "source":
        made = source_site(model)
    elif s.kind == "tensor":
        owner, _, param = path.rpartition(".")
        layer = layers.get(owner)
        if layer is not None and param in layer._parameters and layer._parameters[param] is not None:
            made = read_site(owner, layer, param, bool(vars(layer).get("is_transposed", False)))
            made.host = reader_of(layer, layers.get(owner.rpartition(".")[0])) if owner else None
    elif path in layers:
        made = called_site(path, layers[path], block=s.kind == "block")
        if made is not None and s.region is not None:
            made.region, made.name, made.fan_out = s.region, name, s.region[1] - s.region[0]
    if made is None or made.kind != s.kind:
        raise StateMismatch(f"The model has no {s.kind} at {name!r}.", nearest(path, layers))
    return made


def load_state(model: nn.Module, state: AdapterState, name: str = "default", *, check_base: bool = True,
               take: bool = False) -> dict[str, Any]:  # fmt: skip
    """Put a saved adapter on a model, all or nothing, and activate it. Returns a report with named figures.

    ``take``: nobody else uses the tensors of ``state``, so that the adapter may have them instead of copies.
    """
    hub = find_hub(model)
    if hub is not None and name in hub.names:
        raise AttachError(f"An adapter named {name!r} is already on the model.", "Choose another name or detach it.")
    layers = dict(base_modules(model))
    plan = [(site_at(model, n, s, layers), s.how) for n, s in state.sites.items()]
    _peers(plan)
    taken: set[int] | None = set() if take else None
    made = [None if isinstance(s.how, TiedUse) else _leaves(site, s, state, taken)
            for (site, _), s in zip(plan, state.sites.values())]  # fmt: skip
    weights = carried_weights(state, layers)
    report: dict[str, Any] = {"sites": len(plan), "parameters": state.numel(), "base": "unproven", "distance": None}
    if state.base and check_base:
        fresh = set(state.extra.get("fresh", ()))
        known = {s.name.partition("[")[0]: s for s, _ in plan if s.param and not s.store.parameter.is_meta}
        verdict = compare(state.base, {n: known[n] for n in state.base if n in known and n not in fresh})
        report |= {"base": verdict.verdict, "distance": verdict.distance}
        if verdict.verdict == "another model":
            raise BaseMismatch(f"The adapter was made for another base: weights differ by {verdict.distance:.3g} relative "
                               f"(worst at {verdict.worst}).", "Load it on its own base, or pass check_base=False.")  # fmt: skip
    method = Method(state.method, None, hyper=dict(state.hyper))
    from omnilora.core.method import entries
    from omnilora.core.method import method as by_name

    if state.method in entries():
        method = by_name(state.method, **{k: _back(v) for k, v in state.hyper.items()})
    for put in weights:
        put()
    placed = place(model, plan, made, name, method, {n: s.scale for n, s in state.sites.items()})
    if any(s.marks for s in state.sites.values()):
        for slot in slots(model, name):
            slot.marks.update(state.sites[slot.site.name].marks)
    if state.extra:
        placed.values.setdefault("extra", {})[name] = dict(state.extra)
    if method.rules:
        placed.needs_run[name] = method.key
    activate(model, name)
    return report


def _back(value: Any) -> Any:
    """A hyper-parameter as it was before it became JSON."""
    return from_config(value) if isinstance(value, dict) and "kind" in value else value


def _peers(plan: list[tuple[Site, Parameterization]]) -> None:
    from omnilora.core.attach import _with_peers

    _with_peers(plan)


_sizes: dict[Any, dict[str, tuple[int, ...]]] = {}


def _expected(site: Site, s: SiteState) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the parameterization would make, by nested name; empty where that is not known."""
    if s.kind in ("block", "source"):
        return {}
    known = s.kind == "linear" and "by_size" in vars(type(s.how)) and s.how.by_size
    key = (type(s.how), s.how, site.fan_out, site.fan_in, site.batch, site.region, site.layout, site.store.shape()) if known else None
    if key is not None and key in _sizes:
        return _sizes[key]
    with torch.device("meta"):
        made = {name: tuple(leaf.value.shape) for name, leaf in s.how.init(_on_meta(site)).flat()}
    if key is not None:
        if len(_sizes) >= 4096:
            _sizes.clear()
        _sizes[key] = made
    return made


def _finite(t: Tensor) -> bool:
    """Whether all numbers are. A sum is not finite if one of them is not; only if it overflows they are looked at."""
    return (t.is_floating_point() and math.isfinite(t.sum().item())) or bool(torch.isfinite(t).all())


def _mine(t: Tensor, taken: set[int] | None) -> bool:
    """Whether the adapter may have ``t`` itself: whole, plain, in order, and given to no other tensor of it."""
    if taken is None or type(t) is not Tensor or t.requires_grad or not t.is_contiguous() or t.data_ptr() in taken:
        return False
    if t.untyped_storage().nbytes() != t.numel() * t.itemsize or not t.numel():
        return False
    taken.add(t.data_ptr())
    return True


def _leaves(site: Site, s: SiteState, state: AdapterState, taken: set[int] | None = None) -> Tensors:
    """The saved tensors of a site, checked against what its parameterization would make. ``taken``: see :func:`_mine`."""
    expected = _expected(site, s)
    names = set(s.tensors) | set(s.shared)
    rank_free = bool(s.marks.get("compacted"))
    if expected and names != set(expected):
        raise StateMismatch(f"{site.name}: missing {sorted(set(expected) - names)}, unexpected {sorted(names - set(expected))}.",
                            "The file does not belong to this method.")  # fmt: skip
    out = Tensors()
    device = site.store.device if site.param else torch.device("cpu")
    for name in s.roles:
        t = s.tensor(name, state)
        if expected and tuple(t.shape) != expected[name] and not rank_free:
            raise StateMismatch(f"{site.name}: {name} has shape {tuple(t.shape)}, the model needs "
                                f"{expected[name]}.", "Is this the right base model?")  # fmt: skip
        if not _finite(t):
            raise StateMismatch(f"{site.name}: {name} holds NaN or infinite numbers.", "The file is damaged.")
        *path, last = name.split(".")
        home: Tensors = out
        for step in path:
            home = home.setdefault(step, Tensors())  # type: ignore[assignment]
        keep = torch.float64 if t.dtype == torch.float64 else torch.float32
        own = t.dtype == keep and t.device == device and _mine(t, taken)
        value = t if own else t.to(device=device, dtype=keep).clone().contiguous()
        home[last] = Leaf(value, s.roles[name], s.shared.get(name))
    return out


def _on_meta(site: Site) -> Site:
    """The same site over a layer whose weight is on the meta device: ``init`` reads shapes, not numbers."""
    shell = nn.Module()
    store = site.store
    shell._parameters[site.param] = nn.Parameter(torch.empty(store.shape(), device="meta"), requires_grad=False)
    return replace(site, layer=shell)


def delta(site: SiteState, state: AdapterState, W: Op | None = None) -> Op:
    """ΔW of an additive site as a map, without a model."""
    from omnilora.core.context import Context
    from omnilora.core.parameterization import Slot

    slot = Slot(site.how, _alone(site, state), site.scale, path_name("state"))  # type: ignore[arg-type]
    leaves = Tensors()
    for name, role in site.roles.items():
        *path, last = name.split(".")
        home: Tensors = leaves
        for step in path:
            home = home.setdefault(step, Tensors())  # type: ignore[assignment]
        home[last] = Leaf(site.tensor(name, state), role, site.shared.get(name))
    slot.fill(leaves, frozenset(site.roles), {})
    slot.eval()
    return site.how.delta(slot, Context()) if W is None else site.how.adapt(W, slot, Context())


def _alone(s: SiteState, state: AdapterState) -> Site | None:
    """What forms ask of their site (name, kind, shape), where there is no model."""
    if s.shape is None:
        return None
    name = next((n for n, other in state.sites.items() if other is s), "")
    return Site(name, nn.Module(), "weight", s.kind, "other", *s.shape, PLAIN, region=s.region)


def config_of(s: SiteState) -> dict[str, Any]:
    return {"how": to_config(s.how), "kind": s.kind, "scale": s.scale, "roles": dict(s.roles), "shared": dict(s.shared),
            "region": list(s.region) if s.region else None, "marks": dict(s.marks),
            **({"shape": list(s.shape)} if s.shape else {})}  # fmt: skip


def site_from_config(data: Mapping[str, Any], tensors: Mapping[str, Tensor],
                     hows: dict[str, Parameterization] | None = None) -> SiteState:  # fmt: skip
    """The inverse of :func:`config_of`. ``hows``: parameterizations already made, by the text of their config."""
    hows = {} if hows is None else hows
    text = repr(data["how"])
    how = hows.get(text) or hows.setdefault(text, from_config(data["how"]))
    region = tuple(data["region"]) if data.get("region") else None
    return SiteState(how, data["kind"], float(data["scale"]), tensors, dict(data["roles"]),
                     dict(data.get("shared", {})), region, dict(data.get("marks", {})),
                     tuple(data["shape"]) if data.get("shape") else None)  # type: ignore[arg-type]  # fmt: skip
