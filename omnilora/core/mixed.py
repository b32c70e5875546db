"""Forwards in which rows differ, and compiled forwards, in which every adapter takes part with its strength as data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from omnilora.core.context import Context, RowGroups
from omnilora.core.maps import adapted_tensors, apply, build, input_of, replaced_tensors, run_called, run_set
from omnilora.core.parameterization import Slot
from omnilora.core.site import Base, Site
from omnilora.errors import ContextError, NotExpressible

if TYPE_CHECKING:
    from omnilora.core.layer import Adapters

rows_executor: Callable[..., Any] | None = None  # runs a layer whose rows differ, or says NotImplemented; None: group by group


def run_rows(layer: Any, mine: Adapters, ctx: Context, rows: RowGroups, forward: Callable[..., Any],
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
        return run_set(layer, mine.slots, rows.groups[0][0], ctx, forward, args, kwargs)
    for slot in slots:
        if not slot.site.called:
            raise ContextError(f"{slot.site.name} is read as a whole tensor, so rows of one batch cannot differ there.",
                               "Run the rows in batches of one adapter each, or leave this layer out of the targets.")  # fmt: skip
    site = slots[0].site
    if site.kind == "block":
        raise ContextError(f"{site.name} is a whole block; rows of one batch cannot differ there.")
    x, args, kwargs = input_of(site, args, kwargs)
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
            yg = site.native(apply(op, xg, site.geometry))
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


def run_compiled(layer: Any, mine: Adapters, ctx: Context, forward: Callable[..., Any], args: tuple[Any, ...],
                  kwargs: dict[str, Any]) -> Any:  # fmt: skip
    """Every attached adapter takes part with its strength as data, so that switching recompiles nothing."""
    hub = mine.hub
    if mine.merged or hub.merged or not mine.slots:
        return run_set(layer, mine.slots, (), ctx, forward, args, kwargs)
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
        return run_called(called, ctx, layer, forward, args, kwargs)
    if rows is not None:
        raise NotExpressible(f"{reads[0][0].site.name} is read as a whole tensor; rows cannot differ there.")
    with replaced_tensors(layer, adapted_tensors(reads, ctx)):
        return run_called(called, ctx, layer, forward, args, kwargs)


def _spread(per_row: Tensor, rows: RowGroups) -> Tensor:
    """One number a row → one for each leading index that layers see."""
    w = per_row if rows.segments is None else per_row[rows.segments]
    return w.repeat_interleave(rows.repeat, 0) if rows.repeat > 1 else w


def _run_sets_compiled(layer: Any, mine: Adapters, ctx: Context, rows: RowGroups, forward: Callable[..., Any],
                       args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # fmt: skip
    """Methods that read W need each set's own matrix: the sets are structure here, the rows that use them data."""
    site = next(slot.site for slots in mine.slots.values() for slot in slots)
    x, args, kwargs = input_of(site, args, kwargs)
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
