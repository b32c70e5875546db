"""Putting adapters on a model and taking them off: adapt, activate, disable, context, detach."""

from __future__ import annotations

import dataclasses
import importlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core import layer as layers
from omnilora.core import together
from omnilora.core.context import EMPTY, ActiveSet, CheckpointContext, Context, Hub, RowSpec, row_groups
from omnilora.core.full import Full
from omnilora.core.layer import Adapted, Adapters, attach_layer, base_modules, detach_layer
from omnilora.core.method import Method
from omnilora.core.parameterization import Parameterization, Slot, Tensors, where_field
from omnilora.core.site import PLAIN, Site, called_site, is_linear, source_site
from omnilora.core.targets import Targets, check_overrides, find_sites, matches, override_for, own_sites, targets_from
from omnilora.errors import AttachError, BadValue, RunError, TargetError, UnknownName, nearest

Plan = list[tuple[Site, Parameterization]]
_BIAS = re.compile(r"(.*_)?bias(_.*)?")  # also in_proj_bias of attention, bias_ih_l0 of an LSTM


def hub_of(model: nn.Module) -> Hub:
    """The hub of an adapted model. Raises where the model has no adapter."""
    hub = find_hub(model)
    if hub is None:
        raise AttachError(f"{type(model).__name__} has no adapter.", "Call ol.adapt(model, method) or ol.load first.")
    return hub


def find_hub(model: nn.Module) -> Hub | None:
    if not isinstance(model, nn.Module):
        raise BadValue(f"The model is a {type(model).__name__}.", "Give a torch.nn.Module.")
    found = vars(model).get("_omnilora")
    if found is not None:
        return found
    for layer in model.modules():
        if isinstance(layer, Adapted):
            return layer.adapters.hub
    return None


def hosts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every adapted layer."""
    for name, layer in base_modules(model):
        if isinstance(layer, Adapted):
            yield name, layer


def slots(model: nn.Module, adapter: str | None = None) -> list[Slot]:
    """The slots of one adapter (or of all), in the order of the model."""
    return [s for _, layer in hosts(model) for name, group in list(layer.adapters.slots.items())
            if adapter in (None, name) for s in group]  # fmt: skip


def plan(model: nn.Module, method: Method, targets: Targets) -> Plan:
    """Every site with its parameterization, before anything is allocated. Raises typed errors."""
    out: Plan = []
    how = method.parameterization
    chosen = find_sites(model, targets) if how is not None else []
    adapted = [site for site, _ in chosen]
    check_overrides(targets, adapted)
    arranged = [how] * len(adapted) if how is None or method.arrange is None else method.arrange(adapted, how)
    for site, first in zip(adapted, arranged, strict=True):
        hit = override_for(targets, site)
        made = first
        if hit is not None:
            made = _changed(how if first is None else first, hit[1], hit[0])  # type: ignore[arg-type]
        if made is not None:
            out.append((site, made))
    taken = {site.name for site, _ in out}
    extra = own_sites(model, targets.unfreeze) if targets.unfreeze else []
    biased = list(dict.fromkeys(_biases(model, targets, adapted)))
    out += [(s, Full()) for s, _ in extra if s.name not in taken]
    taken |= {s.name for s, _ in extra}
    out += [(s, Full()) for s, _ in (own_sites(model, biased) if biased else []) if s.name not in taken]
    if method.source is not None:
        out.append((source_site(model), method.source))
    if not out and targets.bias != "none":
        raise TargetError(f"{type(model).__name__} has no bias, and {method.key!r} trains nothing else.",
                          "Adapt layers with another method, or train norms: unfreeze=['norm'].")  # fmt: skip
    if not out:
        raise TargetError(f"Method {method.key!r} has nothing to adapt.",
                          "Give targets or unfreeze patterns; methods that combine adapters go through ol.combine.")  # fmt: skip
    for _, made in out:
        made.check()
    _warn_rank(out)
    _tied(model, targets, out)
    _with_peers(out)
    return out


def _changed(how: Parameterization, changes: Mapping[str, Any], pattern: str) -> Parameterization | None:
    if changes.get("unfreeze"):
        return Full()
    if changes.get("skip"):
        return None
    made: Any = changes.get("method", how)
    made = made.parameterization if isinstance(made, Method) else made
    for key, value in changes.items():
        if key == "method":
            continue
        setter = where_field(made, key)
        if setter is None:
            known = [f.name for f in dataclasses.fields(made)] + ["method", "unfreeze", "skip"]
            raise UnknownName(f"Override {pattern!r} sets {key!r}.", nearest(key, known))
        made = setter(value)
    return made


def _biases(model: nn.Module, targets: Targets, adapted: list[Site]) -> list[str]:
    if targets.bias == "none":
        return []
    chosen = {id(s.layer) for s in adapted}
    return [f"re:{re.escape(f'{n}.{p}')}" for n, m in model.named_modules() for p, value in m._parameters.items()
            if value is not None and n and ".adapters" not in f".{n}" and _BIAS.fullmatch(p)
            and (targets.bias == "all" or id(m) in chosen)]  # fmt: skip


def _warn_rank(out: Plan) -> None:
    wide = [s.name for s, how in out if how.rank() > min(s.fan_out, s.fan_in)]
    if wide:
        shown = ", ".join(wide[:4]) + (" …" if len(wide) > 4 else "")
        warnings.warn(f"The rank exceeds min(in, out) at {len(wide)} site(s): {shown}. It adds parameters, no freedom.",
                      stacklevel=4)  # fmt: skip


def _tied(model: nn.Module, targets: Targets, out: Plan) -> None:
    """A weight tied between embedding and head: both adapted apart would be two answers for one tensor."""
    by_weight: dict[int, list[tuple[Site, Parameterization]]] = {}
    for site, how in out:
        if site.called and site.param:
            by_weight.setdefault(id(site.store.parameter), []).append((site, how))
    for group in by_weight.values():
        layers = {id(s.layer) for s, _ in group}
        if len(layers) > 1 and targets.tied != "both":
            names = [s.name for s, _ in group]
            raise TargetError(f"{' and '.join(names)} share one weight and are both targeted.",
                              "Target the embedding alone, or pass tied='both' for one adapter in both uses.")  # fmt: skip
    if targets.tied != "both":
        return
    for site, how in list(out):
        if site.kind != "embedding":
            continue
        weight = site.store.parameter
        for name, layer in model.named_modules():
            if is_linear(layer) and layer._parameters.get("weight") is weight:
                out[:] = [(s, h) for s, h in out if s.layer is not layer]
                head = called_site(name, layer)
                assert head is not None
                out.append((head, TiedUse(how, site.name)))


@dataclasses.dataclass(frozen=True)
class TiedUse(Parameterization):
    """The second use of a tied weight: the embedding's own tensors, turned. ΔW_head = ΔW_embᵀ."""

    inner: Parameterization = Full()
    first: str = ""

    def first_scale(self, site: Site) -> float:
        return self.inner.first_scale(next(s for s in site.peers if s.name == self.first))

    def frozen(self) -> frozenset[str]:
        return frozenset(f"inner.{n}" for n in self.inner.frozen())

    def init(self, site: Site, seen: Any = None) -> Tensors:
        raise AttachError("A tied use has no tensors of its own.")

    def delta(self, p: Slot, ctx: Context) -> Any:
        return self.inner.delta(p.inner, ctx).transpose()  # type: ignore[arg-type]


def _with_peers(out: Plan) -> None:
    groups: dict[Any, list[Site]] = {}
    texts: dict[int, str] = {}
    for site, how in out:
        text = texts.get(id(how)) or texts.setdefault(id(how), repr(how))
        groups.setdefault(text, []).append(site)
    by_name = {s.name: s for s, _ in out}
    whole = {text: tuple(group) for text, group in groups.items()}
    for site, how in out:
        peers, site.how = whole[texts[id(how)]], how
        site.peers = (*peers, by_name[how.first]) if isinstance(how, TiedUse) else peers


def adapt(
    model: nn.Module,
    method: Method,
    targets: Targets | str | Sequence[str] | None = None,
    name: str = "default",
    **options: Any,
) -> nn.Module:
    """Put an adapter on ``model``, in place, and activate it. The base never changes.

    Args:
        model: any nn.Module (adapt the outermost one that you will call).
        method: from ``ol.method(key, …)`` or ``ol.methods.<key>(…)``.
        targets: patterns, see :mod:`omnilora.core.targets`; default: the method's, else every linear layer but the
            output head and routers.
        name: of the adapter; several can live on one model.
        options: ``exclude``, ``overrides``, ``unfreeze``, ``bias``, ``tied``, ``optional`` of :class:`Targets`.

    Returns: the same model.
    """
    if not isinstance(method, Method):
        raise BadValue(f"method = {method!r} is a {type(method).__name__}.", "Pass ol.method(key, …).")
    if method.prepare is not None:
        raise RunError(f"Method {method.key!r} decides its sites from data.",
                       "Pass it through ol.prepare(model, method, batches, loss) first; ol.fit and the command line do.")  # fmt: skip
    wanted = targets_from(targets if targets is not None else method.targets, **options)
    old = find_hub(model)
    if old is not None and name in old.names:
        raise AttachError(f"An adapter named {name!r} is already on the model.", "Choose another name or detach it.")
    if old is not None and old.merged:
        raise AttachError("The model is merged.", "Call ol.unmerge(model) first.")
    seen = dict(method.seen)
    if method.store is not None:
        seen.update(method.store(model, [s for s, _ in plan(model, method, wanted)]) or {})
    sites = plan(model, method, wanted)
    tensors = [None if isinstance(how, TiedUse) else _fresh(site, how, seen.get(site.name)) for site, how in sites]
    hub = place(model, sites, tensors, name, method)
    _optional(hub, model, wanted)
    if method.fill is not None:
        try:
            with torch.no_grad():
                for slot in slots(model, name):
                    method.fill(slot, seen.get(slot.site.name))
        except BaseException:
            detach(model, name)
            raise
    if method.rules:
        hub.needs_run[name] = method.key
    activate(model, name)
    return model


def _optional(hub: Hub, model: nn.Module, targets: Targets) -> None:
    for slot in slots(model):
        path = slot.site.name
        if any(matches(p, path, slot.site.layer) for p in targets.optional) or ".experts." in f".{path}.":
            slot.marks["optional"] = True


def _fresh(site: Site, how: Parameterization, seen: Any = None) -> Tensors:
    """New tensors for a site, fp32 (fp64 on an fp64 base), on the weight's device."""
    store = site.store if site.param else None
    device = store.device if store is not None else next(site.layer.parameters()).device
    if device.type == "meta" and not isinstance(how, Full):
        with torch.device("meta"):
            made = how.init(site, seen)
    else:
        made = how.init(site, seen)
    wide = store is not None and store.dtype == torch.float64
    return _moved(made, device, torch.float64 if wide else None)


def _moved(tensors: Tensors, device: torch.device, dtype: torch.dtype | None) -> Tensors:
    out = Tensors()
    for key, item in tensors.items():
        if isinstance(item, Tensors):
            out[key] = _moved(item, device, dtype)
        else:
            out[key] = dataclasses.replace(item, value=item.value.detach().to(device=device, dtype=dtype).contiguous())
    return out


def place(model: nn.Module, sites: Plan, tensors: Sequence[Tensors | None], name: str, method: Method,
          scales: Mapping[str, float] | None = None) -> Hub:  # fmt: skip
    """Attach slots with the given tensors. Nothing has been touched before; the base is frozen from here on."""
    importlib.import_module("omnilora.plans.install")  # adapted maps run fused from here on, where they can
    for site, _ in sites:
        if site.param:
            if type(site.store.parameter).__name__ == "DTensor":
                raise AttachError(f"{site.name} is sharded already: its adapter's gradients would not be reduced.",
                                  "Adapt before fully_shard or parallelize_module.")  # fmt: skip
            site.store.prepare()
    hub = find_hub(model)
    if hub is None:
        hub = Hub()
        model._omnilora = hub  # type: ignore[assignment]
        model.register_forward_pre_hook(_entry, with_kwargs=True)
        model.register_forward_hook(_exit)
        hub.values["frozen"] = [n for n, p in model.named_parameters() if p.requires_grad]
    with hub.changing:
        freeze(model)
        pool: dict[str, nn.Parameter] = {}
        made: dict[str, Slot] = {}
        fresh = False
        for (site, how), leaves in zip(sites, tensors, strict=True):
            host = site.host if site.host is not None else site.layer
            fresh = fresh or not isinstance(host, Adapted)
            mine = attach_layer(host, hub)
            scale = (scales or {}).get(site.name, how.first_scale(site))
            slot = Slot(how, site, scale, name)
            if leaves is None:
                assert isinstance(how, TiedUse)
                first = made[how.first]
                slot.add_module("inner", first)
            else:
                slot.fill(leaves, how.frozen(), pool)
            if host.training is not slot.training or slot._modules:
                slot.train(host.training)
            mine.add(name, slot)
            how.placed(site, model)
            made[site.name] = slot
        if fresh:
            announce(model, hub)
        hub.add(name)
        hub.values["planned"] = list(dict.fromkeys(n for _, layer in hosts(model) for n in layer.adapters.places))
        hub.values.setdefault("methods", {})[name] = dataclasses.replace(
            method, store=None, arrange=None, seen={}, fill=None, prepare=None, combine=None, apply=None)
    return hub


def freeze(model: nn.Module) -> None:
    """No tensor of the base learns."""
    for _, layer in base_modules(model):
        for parameter in layer._parameters.values():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)


def announce(model: nn.Module, hub: Hub) -> None:
    """What follows whenever a layer got its first adapter."""
    _slow_paths(model)
    for call in layers.placed:
        call(model, hub)


def _nothing(*_: Any) -> None:
    """Its presence keeps nn.TransformerEncoderLayer off the fused path that ignores its children's forwards."""


def _slow_paths(model: nn.Module) -> None:
    for _, parent in base_modules(model):
        if isinstance(parent, nn.TransformerEncoderLayer):
            for child in (parent.linear1, parent.linear2, parent.self_attn):
                if isinstance(child, Adapted) and _nothing not in child._forward_hooks.values():
                    child.register_forward_hook(_nothing)


# -- the model's entry and exit ------------------------------------------------------------------------------------------


def _entry(model: nn.Module, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    hub: Hub = vars(model)["_omnilora"]
    hub.sync()
    ctx = hub.context()
    if torch.is_grad_enabled() and not ctx.recomputed:
        hub.rowed = ctx.rows is not None
        hub.written += 1
    if hub.mode != model.training:
        hub.mode, hub.unproven = model.training, True
        hub.written += 1
    active = _used(hub, ctx)
    local = hub.local
    local.visits, local.epoch = (set() if hub.unproven else None), hub.epoch
    if hub.unproven:
        with hub.changing:
            check(model, active)
        hub.looked = set(active)
    elif not active <= hub.looked:
        with hub.changing:
            check(model, active - hub.looked)
        hub.looked |= active
    if torch.is_grad_enabled() and model.training and hub.run is None and not ctx.recomputed and not hub.merged:
        for name in active:
            if name in hub.needs_run:
                raise RunError(f"Adapter {name!r} is {hub.needs_run[name]!r}, whose rules need a run; none was started.",
                               "Train with ol.fit(…), or call run = ol.start(model, optimizer, total_steps=…) first; "
                               "ol.disabled or model.eval() for a plain forward.")  # fmt: skip
    if hub.run is not None:
        hub.run.on_forward(model)
    if not hub.merged:
        together.make(hub, lambda: slots(model), active)
    _sources(model, hub, active, args, kwargs)


def _sources(model: nn.Module, hub: Hub, used: set[str], args: Any, kwargs: Any) -> None:
    """Sources of the adapters in use make context from the model's inputs."""
    if not isinstance(model, Adapted) or hub.merged or hub.local.context.recomputed:
        return
    for name, group in model.adapters.slots.items():
        for slot in group:
            if name in used and slot.site.kind == "source":
                now = hub.local.context
                side = slot.how.make(model, slot, args, kwargs)  # type: ignore[attr-defined]
                hub.local.context = dataclasses.replace(now, side={**now.side, **side})


def _used(hub: Hub, ctx: Context) -> set[str]:
    if ctx.rows is not None:
        return {n for group, _ in ctx.rows.groups for n, _ in group}
    return {n for n, _ in (hub.active if ctx.active is None else ctx.active)}


def _exit(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    hub: Hub = vars(model)["_omnilora"]
    local = hub.local
    local.made = {}
    seen, local.visits = local.visits, None
    if seen is None or hub.merged:
        return
    used = _used(hub, hub.context())
    missed = [s.site.name for _, layer in hosts(model) if id(layer.adapters) not in seen
              for name in used for s in layer.adapters.slots.get(name, ()) if not s.marks.get("optional")]  # fmt: skip
    if missed:
        raise AttachError(
            f"{len(missed)} adapted site(s) took no part in the forward: {', '.join(missed[:4])}.",
            "Their weight is read without calling the layer, or the layer is skipped. Adapt the layer that reads it, "
            "exclude it, or pass optional=[pattern] if skipping is right.",
        )
    if local.epoch == hub.epoch:
        hub.unproven = False


def check(model: nn.Module, used: Iterable[str] | None = None) -> None:
    """Every planned site is still the same, adapted, of the same shape, and no adapter is left on meta.

    ``used``: only these adapters; sites where none of them is are not looked at, but a layer that is gone is found.
    """
    present: set[str] = set()
    for path, layer in hosts(model):
        present |= layer.adapters.places
        if "forward" in vars(layer):
            raise AttachError(f"{path}: a forward was set on the adapted layer and hides it.", "Detach first.")
        same: set[tuple[Any, ...]] = set()  # sites of other adapters at this layer that are the same place
        every = layer.adapters.slots
        for group in list(every.values()) if used is None else [every[n] for n in used if n in every]:
            for slot in group:
                site = slot.site
                if site.kind in ("block", "source"):
                    continue
                for _, t in slot.tensors():
                    if t.is_meta and not site.store.parameter.is_meta:
                        raise AttachError(f"{site.name}: the adapter is still on the meta device.",
                                          "Load its tensors (assign=True), or adapt after loading the base.")  # fmt: skip
                    break
                place = (id(site.layer), site.param, site.region, site.fan_out, site.fan_in, site.layout)
                if place in same:
                    continue
                same.add(place)
                shape = site.store.shape()[-2:] if site.layout is PLAIN else tuple(
                    site.layout.matrix(torch.empty(site.store.shape(), device="meta")).shape[-2:])  # fmt: skip
                rows = site.fan_out if site.region is None else shape[0]
                if shape != (rows, site.fan_in):
                    raise AttachError(f"{site.name} was resized from {(site.fan_out, site.fan_in)} to {shape}.",
                                      "Resize first, then adapt.")  # fmt: skip
    gone = [n for n in find_hub(model).values.get("planned", []) if n not in present]  # type: ignore[union-attr]
    if gone:
        raise AttachError(f"{len(gone)} adapted layer(s) were replaced: {', '.join(gone[:4])}.", "Adapt after replacing.")


# -- active set, rows, context ---------------------------------------------------------------------------------------------


def activate(model: nn.Module, adapters: RowSpec) -> None:
    """Make adapters active for all forwards: a name, an ordered list, {name: weight}, or None for the bare base."""
    hub = hub_of(model)
    if hub.merged:
        raise AttachError("The model is merged.", "Call ol.unmerge(model) first.")
    hub.activate(adapters)


def active(model: nn.Module) -> dict[str, float]:
    """{adapter: weight} of the active set, in order."""
    return dict(hub_of(model).active)


def adapters(model: nn.Module) -> list[str]:
    """Names of all adapters on the model."""
    found = find_hub(model)
    return [] if found is None else list(found.names)


def disabled(model: nn.Module) -> AbstractContextManager[Any]:
    """The bare base inside the block, for this task and thread only."""
    hub = hub_of(model)
    return hub.scope(dataclasses.replace(hub.current(), active=(), rows=None))


@contextmanager
def context(
    model: nn.Module,
    rows: Sequence[RowSpec] | None = None,
    *,
    adapters: RowSpec = None,
    segments: Tensor | None = None,
    repeat: int = 1,
    batch_dim: int = 0,
    **side: Any,
) -> Iterator[Context]:
    """Side information for every forward inside.

    Args:
        rows: for each row of the batch an adapter name, a list, {name: weight}, or None for the bare base. Rows that are
            all alike are not counted: layers may see flattened tokens, experts' tokens or tables of positions.
        adapters: the same for all rows.
        segments: (batch, length) integers: the row number of every token of a packed batch.
        repeat: consecutive copies of each row that layers see (beam search: number of beams).
        batch_dim: where the batch is, if not first (sequence-first models: 1).
        side: task, domain, cluster … that the methods in use read.
    """
    hub = hub_of(model)
    now = hub.current()
    chosen: ActiveSet | None = now.active if adapters is None else hub.resolve(adapters)
    groups = now.rows if rows is None else row_groups(hub, rows, segments, repeat, batch_dim)
    sink = hub.emitted if now.sink is None else now.sink
    merged = MappingProxyType({**now.side, **side})
    with hub.scope(dataclasses.replace(now, active=chosen, rows=groups, side=merged, sink=sink)) as made:
        yield made


def checkpoint_context(model: nn.Module) -> CheckpointContext:
    """``context_fn`` for torch.utils.checkpoint (use_reentrant=False): recomputations see their first run's rows."""
    return CheckpointContext(hub_of(model))


# -- taking off ----------------------------------------------------------------------------------------------------------------


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Remove one adapter, or all; the last one gives every layer its own class back."""
    hub = hub_of(model)
    if hub.merged:
        raise AttachError("The model is merged.", "Call ol.unmerge(model) first.")
    if name is not None and name not in hub.names:
        raise UnknownName(f"No adapter is named {name!r}.", nearest(name, hub.names))
    with hub.changing:
        gone = [name] if name is not None else list(hub.names)
        empty = []
        for _, layer in hosts(model):
            mine: Adapters = layer.adapters
            if not set(mine.slots) - set(gone):
                if "forward" in vars(layer):
                    raise AttachError(f"{type(layer).__name__} was changed after it was adapted.", "Undo that first.")
                empty.append(layer)
        for _, layer in hosts(model):
            layer.adapters.quick = None
            for adapter in gone:
                off = layer.adapters.slots.get(adapter, ())
                layer.adapters.drop(adapter)
                for slot in off:
                    slot.how.removed(slot.site, model)
        for layer in empty:
            detach_layer(layer)
            for key in [k for k, hook in layer._forward_hooks.items() if hook is _nothing]:
                del layer._forward_hooks[key]
        for adapter in gone:
            hub.drop(adapter)
            hub.values.get("methods", {}).pop(adapter, None)
        for key in ("rows", "groups"):  # what executors keep of batches holds the slots they met
            hub.kept.pop(key, None)
        hub.values["planned"] = list(dict.fromkeys(n for _, layer in hosts(model) for n in layer.adapters.places))
        for call in layers.removed:
            call(model)
        if not hub.names:
            _forget(model, hub)
    return model


def _forget(model: nn.Module, hub: Hub) -> None:
    trainable = set(hub.values.get("frozen", ()))
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in trainable)
    for table in (model._forward_pre_hooks, model._forward_hooks):
        for key in [k for k, hook in table.items() if hook in (_entry, _exit)]:
            del table[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    del model._omnilora


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's own state dict, without any adapter key: what ``save_pretrained(state_dict=…)`` should write."""
    return {k: v for k, v in model.state_dict().items() if ".adapters." not in f".{k}"}


__all__ = ["EMPTY", "activate", "active", "adapt", "adapters", "base_state_dict", "check", "checkpoint_context",
           "context", "detach", "disabled", "find_hub", "hosts", "hub_of", "place", "plan", "slots"]  # fmt: skip
