"""A batch whose rows have adapters of their own, at one layer: the base runs once for all, then each run of rows gets its terms.

    y_m = W x_m + Σ_a w_a s_a B_a (A_a x_m)      a: the adapters of row m

Few tokens for each adapter: one native call a layer (``ragged.cpp``, sums in fp32), which reads the adapters' own tensors where
those have the data's dtype, so that nothing can be stale. Many: products of slices of rows, or of all rows with all adapters
under a mask. Rows without an adapter are neither read nor written. Only without gradients, outside training mode, and where every
adapter in use is W + a low-rank term; elsewhere the core runs the trees group by group.

Copies (another dtype than the tensors', factors that are computed) are made again when a tensor's version or address, a scale,
a forward with gradients, train ↔ eval or a step of any optimizer says that numbers may have moved. Whoever writes through
``.data`` or with a kernel of their own calls :func:`forget`.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from omnilora.core.attach import hub_of
from omnilora.core.context import ActiveSet, Context, Hub, RowGroups
from omnilora.core.layer import Adapters
from omnilora.core.op import LINEAR
from omnilora.core.parameterization import Slot
from omnilora.core.site import Base
from omnilora.errors import OmniloraError
from omnilora.plans import rules, steps
from omnilora.plans.blind import Blind, Looked
from omnilora.plans.executor import plain
from omnilora.plans.normal import Low, lower
from omnilora.plans.ragged import Job, few, function
from omnilora.plans.seen import Seen

KEPT = 8  # mixtures of adapters whose layouts a model keeps
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
Mark = tuple[int, int, int]


# -- what an adapter adds at a layer --------------------------------------------------------------------------------------


class Term(NamedTuple):
    """s B A: contiguous A (r, in) and B (out, r), the adapter's own memory or copies; ``seen``: what they were made from."""

    A: Tensor
    B: Tensor
    s: float
    seen: Seen


def forget(model: nn.Module) -> None:
    """Drop every copy of an adapter's tensors: for whoever wrote to them through ``.data`` or with a kernel of their own."""
    hub_of(model).written += 1


_made: weakref.WeakKeyDictionary[Slot, tuple[tuple[Any, ...], Term | None]] = weakref.WeakKeyDictionary()


def term_of(slot: Slot, layer: nn.Module, dtype: torch.dtype, mark: tuple[int, int]) -> Term | None:
    """The term of ``slot`` for data of ``dtype``; None where its map is no W + s B A, the same for every input."""
    key = (dtype, slot.scale, slot.training, mark)
    kept = _made.get(slot)
    if kept is not None and kept[0] == key and (kept[1] is None or kept[1].seen.still()):
        return kept[1]
    made = _lowered(slot, layer, dtype)
    _made[slot] = (key, made)
    return made


def _lowered(slot: Slot, layer: nn.Module, dtype: torch.dtype) -> Term | None:
    site = slot.site
    if slot.training or site.region is not None or site.kind != "linear" or site.geometry is not LINEAR:
        return None
    base = Base(site, layer)
    try:
        normal = lower(slot.how.adapt(base, slot, Blind()))
    except (Looked, OmniloraError, NotImplementedError):
        return None
    if normal.base is not base or normal.c is not None or normal.b is not None:
        return None
    if any(k.gates or k.p > 0.0 or (k.D is not None and k.D.dim() != 1) for k in normal.low):
        return None
    source = tuple(t for _, t in slot.tensors())
    if any(not t.is_cpu or not t.is_floating_point() for t in source):
        return None
    made = _joined(slot, normal.low, dtype, source, (site.fan_out, site.fan_in))
    return made if made.seen.tellable else None


def _joined(slot: Slot, low: tuple[Low, ...], dtype: torch.dtype, source: tuple[Tensor, ...],
            shape: tuple[int, int]) -> Term:  # fmt: skip
    """One pair of matrices; the adapter's own tensors where they already are that pair."""
    if len(low) == 1 and low[0].D is None:
        A, B = low[0].A, low[0].B
        own = any(A is t for t in source) and any(B is t for t in source)
        if own and A.dtype == B.dtype == dtype and A.is_contiguous() and B.is_contiguous():
            return Term(A.detach(), B.detach(), float(low[0].s), Seen(slot.modules(), written=False))
    rank = sum(k.rank for k in low)
    A, B = (torch.empty(s, dtype=dtype, device="cpu") for s in ((rank, shape[1]), (shape[0], rank)))
    at = 0
    for k in low:
        A[at : at + k.rank] = k.A if k.D is None else k.A * k.D.unsqueeze(1)
        B[:, at : at + k.rank] = k.B * k.s
        at += k.rank
    return Term(A, B, 1.0, Seen(slot.modules(), written=True))


# -- the rows of a batch --------------------------------------------------------------------------------------------------


class Batch:
    """Where the rows of each adapter are. Positions are rows (packed: tokens) in the order of their groups; ``order``: the row
    at each position, None where they come sorted. ``users``: (adapter, weight, first, last position)."""

    def __init__(self, rows: RowGroups, sites: dict[Adapters, Plan | None], mark: Mark) -> None:
        self.sites, self.mark = sites, mark
        self.repeat = rows.repeat
        self.shape = None if rows.segments is None else rows.segments.shape
        self.users: list[tuple[str, float, int, int]] = []
        at = 0
        for active, index in rows.groups:
            self.users += [(name, w, at, at + index.numel()) for name, w in active]
            at += index.numel()
        self.positions = at
        order = torch.cat([index for _, index in rows.groups])
        self.order = None if bool((order[1:] > order[:-1]).all()) else order.cpu()
        self.largest = max((b - a for _, _, a, b in self.users), default=0)
        self.calls: dict[Adapters, Call] = {}  # the short way of layers that were met with this batch
        self._index: dict[tuple[int, int, int], Tensor] = {}
        self._jobs: dict[tuple[Plan, int], Job] = {}

    def job(self, plan: Plan, per: int) -> int:
        """The address of the native call's job."""
        found = self._jobs.get((plan, per))
        if found is None:
            terms = [None if t is None else (t.A, t.B, s) for t, s in zip(plan.terms, plan.scales)]
            spans = [(first, last) for _, _, first, last in self.users]
            shape = (plan.fan_in, plan.fan_out)
            found = self._jobs[plan, per] = Job(shape, self.positions, per, self.order, spans, terms)
        return found.address

    def per(self, x: Tensor) -> int:
        """How many tokens of x (…, in) a position has; 0 where x has another leading shape than the rows say."""
        if self.shape is None:
            return x.numel() // x.shape[-1] // self.positions if x.shape[0] == self.positions * self.repeat and x.dim() > 1 else 0
        if x.shape[:2] != self.shape and x.shape[0] != self.positions:
            return 0
        return x.numel() // x.shape[-1] // self.positions if x.dim() > 1 else 0

    def tokens(self, first: int, last: int, per: int) -> slice | Tensor:
        """The tokens of positions [first, last) in x flattened to (tokens, in)."""
        if self.order is None:
            return slice(first * per, last * per)
        found = self._index.get((first, last, per))
        if found is None:
            found = (self.order[first:last, None] * per + torch.arange(per, device="cpu")).flatten()
            self._index[first, last, per] = found
        return found


def batch_of(hub: Hub, rows: RowGroups, mark: Mark) -> Batch:
    """The batch of ``rows``. Plans of layers are shared by all batches with the same sequence of active sets."""
    held = hub.kept.get("rows")
    if held is None or held[0] != mark:
        held = hub.kept["rows"] = (mark, OrderedDict())
    kept: OrderedDict[tuple[ActiveSet, ...], dict[Adapters, Plan | None]] = held[1]
    key = tuple(active for active, _ in rows.groups)
    sites = kept.get(key)
    if sites is None:
        sites = kept[key] = {}
        if len(kept) > KEPT:
            kept.popitem(last=False)
    made = Batch(rows, sites, mark)
    rows.plans.update(batch=made, calls=made.calls)
    return made


# -- one layer ------------------------------------------------------------------------------------------------------------


class Plan:
    """The terms of a layer, one for each user of the batch (None: that adapter is not at this layer)."""

    def __init__(self, users: list[tuple[str, float, int, int]], slots: list[Slot | None], terms: list[Term | None],
                 shape: tuple[int, int], dtype: torch.dtype) -> None:  # fmt: skip
        self.fan_out, self.fan_in = shape
        self.dtype, self.terms = dtype, terms
        self.scales = [0.0 if t is None else u[1] * t.s for u, t in zip(users, terms)]
        self.slots = [s for s, t in zip(slots, terms) if s is not None and t is not None]
        self.said = [(False, s.scale) for s in self.slots]
        self.seen = Seen.joined(t.seen for t in terms if t is not None)
        self.rank = sum(t.A.shape[0] for t in terms if t is not None)
        self.several = sum(t is not None for t in terms) > 1
        self.call = function(dtype)

    def fresh(self) -> bool:
        """Whether every slot is what it was."""
        return list(map(_says, self.slots)) == self.said and self.seen.still()

    def small(self, batch: Batch, per: int) -> bool:
        """Whether the native call serves this batch."""
        return self.call is not None and batch.largest * per <= few(self.dtype)

    def add(self, batch: Batch, x: Tensor, y: Tensor, per: int) -> None:
        """y (…, out) += every term on its tokens of x (…, in); both contiguous."""
        if self.small(batch, per):
            self.call(x.data_ptr(), y.data_ptr(), batch.job(self, per))  # type: ignore[misc]
            return
        x, y = x.view(-1, self.fan_in), y.view(-1, self.fan_out)
        if self.several and rules.stacks(batch.largest * per, self.rank, self.fan_in, self.dtype):
            self.stacked(batch, x, y, per)
        else:
            self.grouped(batch, x, y, per)

    def grouped(self, batch: Batch, x: Tensor, y: Tensor, per: int) -> None:
        for term, s, (_, _, first, last) in zip(self.terms, self.scales, batch.users):
            if term is None:
                continue
            at = batch.tokens(first, last, per)
            part = y[at]
            part.addmm_(x[at] @ term.A.t(), term.B.t(), alpha=s)
            if isinstance(at, Tensor):
                y.index_copy_(0, at, part)

    def stacked(self, batch: Batch, x: Tensor, y: Tensor, per: int) -> None:
        terms = [t for t in self.terms if t is not None]
        A, B = torch.cat([t.A for t in terms]), torch.cat([t.B for t in terms], 1)
        h = x @ A.t()
        own = torch.zeros_like(h)
        at = 0
        used = torch.zeros(x.shape[0], dtype=torch.bool, device="cpu")
        for term, s, (_, _, first, last) in zip(self.terms, self.scales, batch.users):
            if term is not None:
                rows, to = batch.tokens(first, last, per), slice(at, at + term.A.shape[0])
                own[rows, to] = h[rows, to] * s
                used[rows] = True
                at = to.stop
        if bool(used.all()):
            y.addmm_(own, B.t())
        else:
            y[used] = y[used].addmm_(own[used], B.t())


_says = attrgetter("training", "scale")
BARE, UNKNOWN = (Plan([], [], [], (0, 0), torch.float64) for _ in range(2))


def plan_of(layer: nn.Module, mine: Adapters, batch: Batch, dtype: torch.dtype) -> Plan | None:
    """The plan of a layer; BARE where no adapter of the batch is there, None where the trees have to run."""
    chosen: list[Slot | None] = []
    terms: list[Term | None] = []
    for name, *_ in batch.users:
        group = [s for s in mine.slots.get(name, ()) if s.site.kind != "source"]
        term = None
        if group:
            term = term_of(group[0], layer, dtype, batch.mark[1:]) if len(group) == 1 and dtype in DTYPES else None
            if term is None:
                return None
        chosen.append(group[0] if group else None)
        terms.append(term)
    site = next((s.site for s in chosen if s is not None), None)
    return BARE if site is None else Plan(batch.users, chosen, terms, (site.fan_out, site.fan_in), dtype)


def execute(layer: Any, mine: Adapters, ctx: Context, rows: RowGroups, forward: Callable[..., Any], args: tuple[Any, ...],
            kwargs: dict[str, Any]) -> Any:  # fmt: skip
    """The layer's output for a batch of different rows, or NotImplemented where the trees have to run."""
    hub = mine.hub
    batch: Batch | None = rows.plans.get("batch")
    if batch is not None and mine in batch.calls and len(args) == 1 and not kwargs:
        y = batch.calls[mine](layer, forward, args[0])
        if y is not NotImplemented:
            return y
    if torch.is_grad_enabled():
        hub.written += 1
        return NotImplemented
    if layer.training or mine.inner is not None or len(args) != 1 or kwargs or rows.batch_dim:
        return NotImplemented
    x = args[0]
    if not plain(x) or not x.is_cpu:
        return NotImplemented
    mark = (hub.epoch, hub.written, steps.taken())
    if batch is None or batch.mark != mark:
        batch = batch_of(hub, rows, mark)
    plan = batch.sites.get(mine, UNKNOWN)
    if plan is not None and plan is not BARE and (plan is UNKNOWN or plan.dtype != x.dtype or not plan.fresh()):
        plan = batch.sites[mine] = plan_of(layer, mine, batch, x.dtype)
    if plan is None:
        return NotImplemented
    if plan is BARE:
        batch.calls[mine] = _bare(batch, mine)
        return forward(x)
    per = batch.per(x)
    if per == 0 or x.shape[-1] != plan.fan_in:
        return NotImplemented
    if plan.small(batch, per) and x.is_contiguous():
        batch.calls[mine] = _small(batch, mine, plan, per, x.shape)
    return _added(plan, batch, per, x, forward(x))


def _added(plan: Plan, batch: Batch, per: int, x: Tensor, y: Tensor) -> Tensor:
    """y with every term, in place where y is the layer's own."""
    flat = x if x.is_contiguous() else x.contiguous()
    if type(y) is Tensor and y.dtype == x.dtype and y.is_contiguous() and y.data_ptr() != flat.data_ptr():
        plan.add(batch, flat, y, per)
        return y
    held = y.to(x.dtype, copy=True).contiguous()
    plan.add(batch, flat, held, per)
    return held.to(y.dtype)


# -- the short way of a layer and a batch that have met --------------------------------------------------------------------

Call = Callable[[Any, Callable[..., Any], Any], Any]  # (layer, its forward, x) → y, or NotImplemented: the general way


def _bare(batch: Batch, mine: Adapters) -> Call:
    """No row of the batch has an adapter here."""
    hub, (epoch, written, taken) = mine.hub, batch.mark

    def call(layer: Any, forward: Callable[..., Any], x: Any) -> Any:
        if hub.epoch != epoch or hub.written != written or steps.taken() != taken or torch.is_grad_enabled() or layer.training:
            return NotImplemented
        return forward(x)

    return call


def _small(batch: Batch, mine: Adapters, plan: Plan, per: int, shape: torch.Size) -> Call:
    """Few tokens of the same shape as before: the native call and the checks that it needs."""
    hub, (epoch, written, taken) = mine.hub, batch.mark
    native, job, dtype = plan.call, batch.job(plan, per), plan.dtype

    def call(layer: Any, forward: Callable[..., Any], x: Any) -> Any:
        if hub.epoch != epoch or hub.written != written or steps.taken() != taken or torch.is_grad_enabled():
            return NotImplemented
        if layer.training or mine.inner is not None or not plain(x):
            return NotImplemented
        if x.shape != shape or x.dtype is not dtype or not x.is_cpu or not x.is_contiguous() or not plan.fresh():
            return NotImplemented
        y = forward(x)
        if type(y) is Tensor and y.dtype is dtype and y.is_contiguous() and y.data_ptr() != x.data_ptr():
            native(x.data_ptr(), y.data_ptr(), job)  # type: ignore[misc]
            return y
        return _added(plan, batch, per, x, y)

    return call
