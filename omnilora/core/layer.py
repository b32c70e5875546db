"""An adapted layer stays what it was: the same object, its class replaced by a subclass of its own class.

The subclass has the base's name and module, pickles as base plus adapters, and calls the base's forward through
``super()`` (or through a forward that another library put on the instance before). Detaching restores it exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote

import torch
from torch import Tensor, nn

from omnilora.core.context import ActiveSet, Context, Hub, RowGroups
from omnilora.core.op import Geometry, Matrix, Op, Rows, Splice, weigh
from omnilora.core.parameterization import Slot, is_additive
from omnilora.core.site import Base, Site
from omnilora.core.standin import StandIn, outermost, own_class, stand_in
from omnilora.errors import AttachError, ContextError, NotExpressible

executor: Callable[[Op, Tensor, Geometry], Tensor] | None = None  # applies an adapted map; None: by its tree
rows_executor: Callable[..., Any] | None = None  # runs a layer whose rows differ, or says NotImplemented; None: group by group
quicken: Callable[[Any, Adapters, Any], Any] | None = None  # finds a layer's short way for calls like the one with x
placed: list[Callable[[nn.Module, Hub], None]] = []  # told of a model after adapters were put on it
removed: list[Callable[[nn.Module], None]] = []  # and after they were taken off


def path_name(name: str) -> str:
    """An adapter's name as a component of a parameter path: names are data and may hold dots."""
    return quote(name, safe="-_ ").replace(".", "%2E")


M = TypeVar("M", bound=nn.Module)
_plain = vars(nn.Module())
_containers = [(k, type(v)) for k, v in _plain.items() if isinstance(v, (dict, set))]
_constants = {k: v for k, v in _plain.items() if not isinstance(v, (dict, set))}


def blank(cls: type[M], values: Mapping[str, Any] | None = None) -> M:
    """An object as ``nn.Module.__init__`` leaves it, with more values, in a tenth of the time: a serving model makes thousands."""
    made = cls.__new__(cls)
    state = made.__dict__
    state.update(_constants)
    if values is not None:
        state.update(values)
    for name, kind in _containers:
        state[name] = kind()
    return made


class Adapters(nn.Module):
    """The one attribute an adapted layer gains: its slots, by adapter and place."""

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self.hub = hub
        self.inner: Callable[..., Any] | None = None  # a forward that was on the instance before us
        self.slots: dict[str, list[Slot]] = {}
        self.counts: dict[str, int] = {}  # name of a site → its slots here
        self.merged: dict[str, Tensor] = {}  # dense weights in place of stores that cannot be written
        self.quick: Any = None  # called with x: y; None: not for this call; NotImplemented: for no call any more
        self.asked = -1  # the hub's epoch at which ``quick`` was made, or found not to be there
        self.barren = -1  # the hub's epoch at which nothing was found that serves calls with gradients

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"quick": None, "asked": -1, "barren": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("barren", -1)
        if "counts" not in self.__dict__:  # from before sites were counted
            self.counts = dict(Counter(s.site.name for group in self.slots.values() for s in group))

    def add(self, name: str, slot: Slot) -> None:
        home = path_name(name)
        if home not in self._modules:
            self._modules[home] = nn.Module()
        key = slot.site.key.replace(".", "/")
        self._modules[home].add_module(key, slot)  # type: ignore[union-attr]
        self.slots.setdefault(name, []).append(slot)
        self.counts[slot.site.name] = self.counts.get(slot.site.name, 0) + 1

    def put(self, name: str, home: str, slot: Slot) -> None:
        """:meth:`add` for the first slot of an adapter at this layer; ``home``: its :func:`path_name`."""
        place = blank(nn.Module)
        place._modules[slot.site.key.replace(".", "/")] = slot
        self._modules[home] = place
        self.slots[name] = [slot]
        self.counts[slot.site.name] = self.counts.get(slot.site.name, 0) + 1

    def drop(self, name: str) -> None:
        for slot in self.slots.pop(name, ()):
            left = self.counts.pop(slot.site.name) - 1
            if left:
                self.counts[slot.site.name] = left
        self._modules.pop(path_name(name), None)

    @property
    def places(self) -> Set[str]:
        """Names of the sites at this layer, in time that does not depend on the number of adapters."""
        return self.counts.keys()


class Adapted(StandIn):
    """Stands before an adapted layer's own class."""

    adapters: Adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mine: Adapters = self.__dict__["_modules"]["adapters"]
        forward = mine.inner if mine.inner is not None else super().forward  # type: ignore[misc]
        if not torch.compiler.is_compiling() and not kwargs and len(args) == 1:  # that first: compiled code shall not see what changes
            y = shortly(self, mine, forward, args[0])
            if y is not None:
                return y
        return run(self, mine, forward, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and getattr(value, "__self__", None) is self:
            if value.__func__ is not Adapted.forward:
                if value.__func__ is not own_class(self).forward:
                    raise AttachError("The forward of an adapted layer may not be replaced.", "Detach first.")
                self.adapters.inner = None  # a saved forward is put back: the hook it came from is gone
            self.__dict__.pop("forward", None)
        else:
            super().__setattr__(name, value)

    def _get_name(self) -> str:
        return "Adapted" + super()._get_name()  # type: ignore[misc]


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` of the model itself: what adapters hold is left out, however many there are."""
    seen: set[int] = set()
    ahead = [(prefix, model)]
    while ahead:
        path, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        own = list(module._modules.items())  # at once: another thread may load an adapter
        inside = [(f"{path}.{n}" if path else n, m) for n, m in own if m is not None and not isinstance(m, Adapters)]
        inside.reverse()
        ahead += inside


def attach_layer(layer: nn.Module, hub: Hub) -> Adapters:
    if isinstance(layer, Adapted):
        if layer.adapters.hub is not hub:
            raise AttachError(f"A {type(layer).__name__} already belongs to another adapted model.",
                              "Adapt the outermost model only.")  # fmt: skip
        return layer.adapters
    if "adapters" in layer._modules or "adapters" in vars(layer) or isinstance(layer, torch.jit.ScriptModule):
        raise AttachError(f"{type(layer).__qualname__} cannot be adapted in place.",
                          "It is scripted, or already has an attribute 'adapters'.")  # fmt: skip
    inner = vars(layer).pop("forward", None)
    layer.__class__ = stand_in(Adapted, type(layer))
    layer.adapters = Adapters(hub)
    made: Adapters = layer.adapters
    made.inner = inner
    made.training = layer.training
    return made


def detach_layer(layer: nn.Module) -> None:
    if not outermost(layer) or "forward" in vars(layer):
        raise AttachError(f"{type(layer).__qualname__} was changed after it was adapted (sharding, parametrization, hook).",
                          "Undo that first: last on, first off.")  # fmt: skip
    adapters: Adapters = layer.adapters  # type: ignore[assignment]
    inner = adapters.inner
    del layer.adapters
    layer.__class__ = own_class(layer)
    if inner is not None:
        layer.forward = inner


# -- one forward of an adapted layer ------------------------------------------------------------------------------------


def shortly(layer: Any, mine: Adapters, forward: Callable[..., Any], x: Any) -> Any:
    """y by the short way of the layer, or of the layer and a batch that have met; None where there is none for this call."""
    local = mine.hub.local
    rows = local.context.rows
    if rows is None:
        quick = mine.quick
        if quick is None:
            return None
        y = quick(x)
        if y is NotImplemented:
            mine.asked = -1
            return None
        return y
    if local.visits is not None or (calls := rows.plans.get("calls")) is None or (call := calls.get(mine)) is None:
        return None
    y = call(layer, forward, x)
    return None if y is NotImplemented else y


def run(layer: Any, mine: Adapters, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hub = mine.hub
    ctx = hub.context()
    if torch.compiler.is_compiling():
        return _run_compiled(layer, mine, ctx, forward, args, kwargs)
    if mine.merged:
        return _run_merged(layer, mine, args, kwargs)
    if hub.merged:
        return forward(*args, **kwargs)
    if torch.is_grad_enabled() and not ctx.recomputed and torch._C._current_graph_task_id() != -1:
        ctx = in_backward(hub, ctx)
    active = hub.active if ctx.active is None else ctx.active
    if (visits := hub.local.visits) is not None:
        visits.add(id(mine))
    if ctx.rows is not None:
        return _run_rows(layer, mine, ctx, ctx.rows, forward, args, kwargs)
    if quicken is not None and mine.asked != hub.epoch and len(args) == 1 and not kwargs:
        quick = quicken(layer, mine, args[0])
        if quick is not None:  # from the first call on: one that rounds otherwise is none
            y = quick(args[0])
            if y is not None and y is not NotImplemented:
                return y
    return _run_set(layer, mine, active, ctx, forward, args, kwargs)


def _run_merged(layer: Any, mine: Adapters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer whose store cannot be written: its dense merged weight stands in for the layer's own forward."""
    site = next(s.site for group in mine.slots.values() for s in group if s.site.called)
    x, _, _ = _input(site, args, kwargs)
    return site.native(Matrix(mine.merged["weight"], site.store.offset).apply(x, site.geometry))


def in_backward(hub: Hub, ctx: Context) -> Context:
    """Activation checkpointing runs the layer again, without ``context_fn``: right only if nothing depends on rows."""
    if hub.rowed or ctx.rows is not None:
        raise ContextError("A layer is recomputed in the backward pass, and its rows are not known any more.",
                           "Pass context_fn=ol.checkpoint_context(model) with use_reentrant=False.")  # fmt: skip
    return replace(ctx, recomputed=True)


def _run_set(layer: Any, mine: Adapters, active: ActiveSet, ctx: Context, forward: Callable[..., Any],
             args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # fmt: skip
    slots = mine.slots
    pairs = [(slot, w) for name, w in active if name in slots for slot in slots[name] if slot.site.kind != "source"]
    if not pairs:
        return forward(*args, **kwargs)
    reads = [(s, w) for s, w in pairs if not s.site.called]
    if reads:
        with replaced_tensors(layer, adapted_tensors(reads, ctx)):
            return _run_called([p for p in pairs if p[0].site.called], ctx, layer, forward, args, kwargs)
    return _run_called(pairs, ctx, layer, forward, args, kwargs)


def _run_called(pairs: list[tuple[Slot, Any]], ctx: Context, layer: Any, forward: Callable[..., Any],
                args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # fmt: skip
    if not pairs:
        return forward(*args, **kwargs)
    site = pairs[0][0].site
    x, args, kwargs = _input(site, args, kwargs)
    base = Base(site, layer, forward, args, kwargs)
    op = build(base, pairs, ctx)
    y = site.native(op.apply(x, site.geometry) if executor is None else executor(op, x, site.geometry))
    return (y, *base.rest) if base.rest else y


def _input(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    for name in ("input", "hidden_states", "x"):
        if name in kwargs:
            return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}
    raise AttachError(f"{site.name} was called without an input that can be found.", "Pass it as the first argument.")


def build(W: Op, pairs: list[tuple[Slot, Any]], ctx: Context) -> Op:
    """The adapted map: each adapter on what the ones before it made, each at its weight."""
    for slot, w in pairs:
        region = slot.site.region
        part = W if region is None else Rows(W, *region)
        new = weigh(w, part, slot.how.adapt(part, slot, ctx))
        W = new if region is None else Splice(W, *region, new)
    return W


def adapted_tensors(pairs: list[tuple[Slot, Any]], ctx: Context) -> dict[str, Tensor]:
    """Stored-layout tensors of the read sites in ``pairs``, by slot key."""
    by_site: dict[str, list[tuple[Slot, Any]]] = {}
    for slot, w in pairs:
        by_site.setdefault(slot.site.key, []).append((slot, w))
    out = {}
    for key, group in by_site.items():
        site = group[0][0].site
        m = build(Base(site, site.layer), group, ctx).matrix(site.geometry)
        store = site.store
        out[key] = site.layout.stored(m, store.shape()).to(store.dtype)
    return out


@contextmanager
def replaced_tensors(layer: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """For one forward, the tensors of ``layer`` (or of a child that it reads) are others. Keys: slot keys."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    flat: list[Any] | None = None
    if isinstance(layer, nn.RNNBase):
        flat = list(layer._flat_weights)
    try:
        for key, value in tensors.items():
            child, _, param = key.rpartition("/")
            owner = layer._modules[child] if child else layer
            table: dict[str, Any] = owner._parameters  # type: ignore[union-attr]
            before.append((table, param, table[param]))
            if flat is not None:
                rnn: Any = layer
                rnn._flat_weights[rnn._flat_weights_names.index(param)] = value
            table[param] = value
        yield
    finally:
        for table, param, value in before:
            table[param] = value
        if flat is not None:
            layer._flat_weights = flat  # type: ignore[assignment]


# -- rows ----------------------------------------------------------------------------------------------------------------


def _run_rows(layer: Any, mine: Adapters, ctx: Context, rows: RowGroups, forward: Callable[..., Any],
              args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # fmt: skip
    """Each group of rows runs its own tree on its part of x; the base runs once for all."""
    if rows_executor is not None:
        y = rows_executor(layer, mine, ctx, rows, forward, args, kwargs)
        if y is not NotImplemented:
            return y
    used = {name for group, _ in rows.groups for name, _ in group}
    slots = [s for name in mine.slots if name in used for s in mine.slots[name] if s.site.kind != "source"]
    if not slots:
        return forward(*args, **kwargs)
    if len(rows.groups) == 1:
        return _run_set(layer, mine, rows.groups[0][0], ctx, forward, args, kwargs)
    for slot in slots:
        if not slot.site.called:
            raise ContextError(f"{slot.site.name} is read as a whole tensor, so rows of one batch cannot differ there.",
                               "Run the rows in batches of one adapter each, or leave this layer out of the targets.")  # fmt: skip
    site = slots[0].site
    if site.kind == "block":
        raise ContextError(f"{site.name} is a whole block; rows of one batch cannot differ there.")
    x, args, kwargs = _input(site, args, kwargs)
    batched, at, undo = _by_row(x, rows, site)
    y0 = forward(x, *args, **kwargs)
    y, _, _ = _by_row(y0, rows, site)
    whole = Base(site, layer, forward, args, kwargs)
    pieces, order = [], []
    for (active, _), index in zip(rows.groups, at, strict=True):
        if index.numel() == 0:
            continue
        xg, yg = batched.index_select(0, index), y.index_select(0, index)
        pairs = [(s, w) for name, w in active if name in mine.slots for s in mine.slots[name]]
        if pairs:
            op = build(whole.known(xg, site.features(yg)), pairs, ctx)
            yg = site.native(op.apply(xg, site.geometry) if executor is None else executor(op, xg, site.geometry))
        pieces.append(yg)
        order.append(index)
    back = torch.argsort(torch.cat(order))
    return undo(torch.cat(pieces).index_select(0, back))


def _by_row(x: Tensor, rows: RowGroups, site: Site) -> tuple[Tensor, list[Tensor], Callable[[Tensor], Tensor]]:
    """x with the leading dimension that ``rows`` numbers, the positions of each group there, and the way back."""
    groups = [index.to(x.device) for _, index in rows.groups]
    if rows.segments is not None:
        shape = rows.segments.shape
        if site.kind == "conv":
            raise ContextError(f"{site.name} is a convolution: packed segments do not apply.", "Give rows only.")
        if x.shape[:2] == shape:
            flat = x.flatten(0, 1)
            return flat, groups, lambda y: y.unflatten(0, shape)
        if x.shape[0] == shape.numel():
            return x, groups, lambda y: y
        raise ContextError(f"{site.name} sees {tuple(x.shape)}, the segments are {tuple(shape)}.",
                           "Segments need (batch, length, …) or (batch · length, …) at every adapted layer.")  # fmt: skip
    if rows.batch_dim:
        x = x.movedim(rows.batch_dim, 0)
    n = rows.count * rows.repeat
    if x.dim() < 2 - (site.kind == "embedding") or x.shape[0] != n:
        raise ContextError(
            f"{site.name} sees a leading dimension of {x.shape[0]}, the context has {rows.count} rows"
            + (f" × {rows.repeat}." if rows.repeat > 1 else "."),
            "Give one adapter a row, repeat= for beams, segments= for packed or flattened tokens, or batch_dim=.",
        )
    if rows.repeat > 1:
        step = torch.arange(rows.repeat, device=x.device)
        groups = [(g[:, None] * rows.repeat + step).flatten() for g in groups]
    dim = rows.batch_dim
    return x, groups, (lambda y: y.movedim(0, dim)) if dim else (lambda y: y)


# -- compiled code ---------------------------------------------------------------------------------------------------------


def _run_compiled(layer: Any, mine: Adapters, ctx: Context, forward: Callable[..., Any], args: tuple[Any, ...],
                  kwargs: dict[str, Any]) -> Any:  # fmt: skip
    """Every attached adapter takes part with its strength as data, so that switching recompiles nothing."""
    hub = mine.hub
    if mine.merged or hub.merged or not mine.slots:
        return _run_set(layer, mine, (), ctx, forward, args, kwargs)
    rows = ctx.rows
    if rows is not None and any(slot.how.reads_weight for slots in mine.slots.values() for slot in slots):
        return _run_sets_compiled(layer, mine, ctx, rows, forward, args, kwargs)
    pairs: list[tuple[Slot, Any]] = []
    for name, slots in mine.slots.items():
        at = hub.names.index(name)
        if rows is not None:
            w = _spread(rows.gates[:, at], rows)
        elif ctx.active is not None:
            w = torch.full((), dict(ctx.active).get(name, 0.0))
        else:
            w = hub.weights[at]
        pairs += [(slot, w) for slot in slots if slot.site.kind != "source"]
    called = [p for p in pairs if p[0].site.called]
    reads = [p for p in pairs if not p[0].site.called]
    if not pairs:
        return forward(*args, **kwargs)
    if not reads:
        return _run_called(called, ctx, layer, forward, args, kwargs)
    if rows is not None:
        raise NotExpressible(f"{reads[0][0].site.name} is read as a whole tensor; rows cannot differ there.")
    with replaced_tensors(layer, adapted_tensors(reads, ctx)):
        return _run_called(called, ctx, layer, forward, args, kwargs)


def _spread(per_row: Tensor, rows: RowGroups) -> Tensor:
    """One number a row → one for each leading index that layers see."""
    w = per_row if rows.segments is None else per_row[rows.segments]
    return w.repeat_interleave(rows.repeat, 0) if rows.repeat > 1 else w


def _run_sets_compiled(layer: Any, mine: Adapters, ctx: Context, rows: RowGroups, forward: Callable[..., Any],
                       args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # fmt: skip
    """Methods that read W need each set's own matrix: the sets are structure here, the rows that use them data."""
    site = next(slot.site for slots in mine.slots.values() for slot in slots)
    x, args, kwargs = _input(site, args, kwargs)
    base = Base(site, layer, forward, args, kwargs)
    y0 = base.apply(x, site.geometry)
    y = y0
    member = _spread(rows.member, rows)
    for i, (active, _) in enumerate(rows.groups):
        pairs = [(s, w) for name, w in active if name in mine.slots for s in mine.slots[name]]
        if pairs:
            z = build(base, pairs, ctx).apply(x, site.geometry)
            mask = (member == i).reshape(*member.shape, *[1] * (y0.dim() - member.dim()))
            y = torch.where(mask, z, y)
    return site.native(y)


def change_of(pairs: list[tuple[Slot, Any]], ctx: Context) -> Op | None:
    """The sum of the updates as one map, where all are additive and on the whole weight; else None."""
    out: Op | None = None
    for slot, w in pairs:
        if slot.site.region is not None or not is_additive(slot.how):
            return None
        part = w * slot.how.delta(slot, ctx)
        out = part if out is None else out + part
    return out


def merged_matrix(base: Base, pairs: list[tuple[Slot, Any]], ctx: Context) -> tuple[Tensor, Tensor | None]:
    """The adapted matrix in fp32 or wider, and the adapted offset (None: unchanged)."""
    op = build(base, pairs, ctx)
    m = op.matrix(base.site.geometry)
    offset = op.offset
    additive = all(is_additive(slot.how) for slot, _ in pairs)
    return m.detach(), None if additive or offset is None else offset.detach()
