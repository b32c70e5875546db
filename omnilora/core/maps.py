"""The map of a layer under its adapters: built from its slots, applied in the layer's forward, or formed as a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from omnilora.core.context import ActiveSet, Context
from omnilora.core.op import Geometry, Op, Rows, Splice, weigh
from omnilora.core.parameterization import Slot, is_additive
from omnilora.core.site import Base, Site
from omnilora.errors import AttachError

executor: Callable[[Op, Tensor, Geometry], Tensor] | None = None  # applies an adapted map; None: by its tree


def apply(op: Op, x: Tensor, geo: Geometry) -> Tensor:
    return op.apply(x, geo) if executor is None else executor(op, x, geo)


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


# -- in the forward of a layer ----------------------------------------------------------------------------------------------


def run_set(layer: Any, slots: Mapping[str, list[Slot]], active: ActiveSet, ctx: Context, forward: Callable[..., Any],
             args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # fmt: skip
    pairs = [(slot, w) for name, w in active if name in slots for slot in slots[name] if slot.site.kind != "source"]
    if not pairs:
        return forward(*args, **kwargs)
    reads = [(s, w) for s, w in pairs if not s.site.called]
    if reads:
        with replaced_tensors(layer, adapted_tensors(reads, ctx)):
            return run_called([p for p in pairs if p[0].site.called], ctx, layer, forward, args, kwargs)
    return run_called(pairs, ctx, layer, forward, args, kwargs)


def run_called(pairs: list[tuple[Slot, Any]], ctx: Context, layer: Any, forward: Callable[..., Any],
                args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # fmt: skip
    if not pairs:
        return forward(*args, **kwargs)
    site = pairs[0][0].site
    x, args, kwargs = input_of(site, args, kwargs)
    base = Base(site, layer, forward, args, kwargs)
    op = build(base, pairs, ctx)
    y = site.native(apply(op, x, site.geometry))
    return (y, *base.rest) if base.rest else y


def input_of(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    for name in ("input", "hidden_states", "x"):
        if name in kwargs:
            return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}
    raise AttachError(f"{site.name} was called without an input that can be found.", "Pass it as the first argument.")
