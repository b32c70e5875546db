"""An adapted layer stays what it was: the same object, its class replaced by a subclass of its own class.

The subclass has the base's name and module, pickles as base plus adapters, and calls the base's forward through
``super()`` (or through a forward that another library put on the instance before). Detaching restores it exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any, TypeVar
from urllib.parse import quote

import torch
from torch import Tensor, nn

from omnilora.core.context import Context, Hub
from omnilora.core.maps import input_of, run_set
from omnilora.core.mixed import run_compiled, run_rows
from omnilora.core.op import Matrix
from omnilora.core.parameterization import Slot
from omnilora.core.standin import StandIn, outermost, own_class, stand_in
from omnilora.errors import AttachError, ContextError

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
        return run_compiled(layer, mine, ctx, forward, args, kwargs)
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
        return run_rows(layer, mine, ctx, ctx.rows, forward, args, kwargs)
    if quicken is not None and mine.asked != hub.epoch and len(args) == 1 and not kwargs:
        quick = quicken(layer, mine, args[0])
        if quick is not None:  # from the first call on: one that rounds otherwise is none
            y = quick(args[0])
            if y is not None and y is not NotImplemented:
                return y
    return run_set(layer, mine.slots, active, ctx, forward, args, kwargs)


def _run_merged(layer: Any, mine: Adapters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer whose store cannot be written: its dense merged weight stands in for the layer's own forward."""
    site = next(s.site for group in mine.slots.values() for s in group if s.site.called)
    x, _, _ = input_of(site, args, kwargs)
    return site.native(Matrix(mine.merged["weight"], site.store.offset).apply(x, site.geometry))


def in_backward(hub: Hub, ctx: Context) -> Context:
    """Activation checkpointing runs the layer again, without ``context_fn``: right only if nothing depends on rows."""
    if hub.rowed or ctx.rows is not None:
        raise ContextError("A layer is recomputed in the backward pass, and its rows are not known any more.",
                           "Pass context_fn=ol.checkpoint_context(model) with use_reentrant=False.")  # fmt: skip
    return replace(ctx, recomputed=True)
