"""One adapted linear layer, with as little between the call and the products as there can be.

    y = c ⊙ (x Wᵀ + bias + s (D ⊙ drop(x) Aᵀ) Bᵀ) + b

A short way over the layer's own tensors, for the active set. Factors that are the slot's own parameters are read where they are,
with gradients and without. What must be computed first (a norm, a tensor train, another dtype) is a copy, for calls without
gradients only, good as long as :class:`~omnilora.plans.seen.Seen`, the epoch and the count of optimizers' steps say so. A short way
answers None to a call that is not of the kind it was made for, and NotImplemented where something has changed; the layer's general
forward answers instead, and in the second case has the short way made again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnilora.core.context import ActiveSet
from omnilora.core.layer import Adapters
from omnilora.core.maps import build
from omnilora.core.site import Base
from omnilora.core.standin import own_class
from omnilora.plans import executor, steps
from omnilora.plans.blind import Blind, Looked
from omnilora.plans.elementwise import away, magnify_
from omnilora.plans.node import products
from omnilora.plans.normal import Low, Normal, lower
from omnilora.plans.product import Line, divides, drawn
from omnilora.plans.ragged import Job, few, function
from omnilora.plans.seen import Seen

MOST = 512  # jobs that a layer keeps: one for each number of tokens
Quick = Callable[[Tensor], Any]  # y, None or NotImplemented
Pairs = list[tuple[Any, Any]]  # slots of the active set with their weights


def quicken(layer: Any, mine: Adapters, x: Tensor) -> Short | None:
    """Put on ``mine`` the short way for the active set, for calls like the one with x: None where the map is no low-rank term beside
    a plain weight. Nothing is looked for where somebody follows the operations."""
    hub, learns = mine.hub, torch.is_grad_enabled()
    epoch, active = hub.epoch, hub.active  # in this order: a set that is newer than its epoch is found out
    if not executor.free(x) or (learns and mine.barren == epoch):
        return None
    made = _made(layer, mine, epoch, active)
    if learns and (made is None or made.own is None):
        mine.barren = epoch  # copies are made when a call without gradients wants them
        return None
    if made is not None and not (made.own or made.hold()):
        made = None
    mine.quick, mine.asked = made, epoch
    return made


def standing(layer: Any, mine: Adapters, x: Tensor) -> Normal | None:
    """The layer's normal form under the active set where it needs no building: over parameters that are the slot's own."""
    hub, found = mine.hub, mine.quick
    if mine.asked != hub.epoch:
        found = quicken(layer, mine, x)
    if found is None or found.own is None:
        return None
    if found.epoch == hub.epoch and found.active is hub.active and found.still() and found.own.still():
        return found.normal
    mine.asked = -1
    return None


def _made(layer: Any, mine: Adapters, epoch: int, active: ActiveSet) -> Short | None:
    pairs = [(s, w) for name, w in active for s in mine.slots.get(name, ())]
    if not pairs or mine.inner is not None or own_class(layer).forward is not nn.Linear.forward:
        return None
    if any(not s.site.called or s.site.kind != "linear" for s, _ in pairs):
        return None
    base, before = Base(pairs[0][0].site, layer, nn.Linear.forward.__get__(layer)), torch.get_rng_state()
    try:
        with torch.no_grad(), torch.autocast(layer.weight.device.type, enabled=False):
            normal = lower(build(base, pairs, Blind()))
    except Looked:
        return None
    finally:
        after = torch.get_rng_state()
        torch.set_rng_state(before)
    if normal.base is None or not normal.low or executor.constants_of(normal.base, layer.weight)[0] is None:
        return None
    if any(k.gates for k in normal.low) or not torch.equal(before, after):
        return None
    return Short(layer, mine, pairs, normal, epoch, active)


class Short:
    """The short way of one layer. ``own``: for a term over the slot's own parameters, which alone serves calls with gradients."""

    def __init__(self, layer: Any, mine: Adapters, pairs: Pairs, normal: Normal, epoch: int, active: ActiveSet) -> None:
        self.layer, self.pairs, self.normal = layer, pairs, normal  # the last for ``own``, or until copies are made of it
        self.hub, self.local, self.me = mine.hub, mine.hub.local, id(mine)
        self.active, self.epoch, self.dtype = active, epoch, layer.weight.dtype
        self.scales = [(s, s.scale, s.how, s.training) for s, _ in pairs]
        self.drops = any(k.p for k in normal.low)
        self.own = Own.of(layer, pairs, normal)
        self.call: Quick | None = None

    def __call__(self, x: Tensor) -> Any:
        hub, learns = self.hub, torch.is_grad_enabled()
        if hub.epoch != self.epoch or hub.active is not self.active:
            return NotImplemented
        ctx = self.local.context
        if hub.merged or ctx.active is not None or ctx.rows is not None or ctx.recomputed or (self.own is None if learns else self.drops):
            return None
        if not executor.plain(x) or x.dtype is not self.dtype:
            return None
        if not self.still():
            return NotImplemented
        if (visits := self.local.visits) is not None:
            visits.add(self.me)
        if learns:
            return self.own.learn(x)  # type: ignore[union-attr]
        call = self.call or self.hold()
        return None if call is None else call(x)

    def still(self) -> bool:
        for slot, scale, how, training in self.scales:
            if slot.scale != scale or slot.how is not how or slot.training is not training:
                return False
        return True

    def hold(self) -> Quick | None:
        """What answers calls without gradients."""
        self.call = None if self.drops else _direct(self.own) or _held(self.layer, self.pairs, self.normal)
        if self.own is None:
            self.normal = Normal()
        return self.call


class Own:
    """One term whose factors are a slot's own parameters, beside the layer's own weight: nothing is computed or copied."""

    def __init__(self, layer: Any, slot: Any, names: tuple[str | None, ...], low: Low) -> None:
        self.params, self.table, self.low = layer._parameters, slot._parameters, low
        self.w, self.dtype = layer.weight, layer.weight.dtype
        self.factors = [(name, t) for name, t in zip(names, (low.A, low.B, low.D)) if t is not None]

    @classmethod
    def of(cls, layer: Any, pairs: Pairs, normal: Normal) -> Own | None:
        (low, *more), (slot, _) = normal.low, pairs[0]
        names = {id(t): n for n, t in slot._parameters.items() if t is not None}
        inside = all(t is None or (id(t) in names and type(t) is nn.Parameter) for t in (low.A, low.B, low.D))
        whole = isinstance(normal.base, Base) and normal.c is None and normal.b is None
        if more or not inside or not whole or layer._parameters.get("weight") is not executor.constants_of(normal.base, layer.weight)[0]:
            return None
        return cls(layer, slot, tuple(None if t is None else names[id(t)] for t in (low.A, low.B, low.D)), low)

    def still(self) -> bool:
        if self.params.get("weight") is not self.w or self.w.dtype is not self.dtype:
            return False
        return all(self.table.get(name) is t for name, t in self.factors)

    def learn(self, x: Tensor) -> Any:
        """y of a call with gradients."""
        if not self.still():
            return NotImplemented
        if torch._C._current_graph_task_id() != -1 or any(map(executor.learns, self.params.values())):
            return None
        low, flat = self.low, x.reshape(-1, x.shape[-1])
        dropped = drawn(low.p)
        line = Line(self.w, self.params.get("bias"), low.s, A=low.A, B=low.B, D=low.D)
        (y,) = products(flat, (executor.ready(line, flat, dropped),), dropped)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _direct(own: Own | None) -> Quick | None:
    """For factors in the data's dtype: nothing is copied."""
    if own is None or own.low.D is not None or own.low.A.dtype != own.dtype or own.low.B.dtype != own.dtype:
        return None
    still, w, params, dtype, add = own.still, own.w, own.params, own.dtype, _Update(own.low.A, own.low.B, own.low.s)
    a, b = own.low.A, own.low.B

    def call(x: Tensor) -> Any:
        if not still() or a.dtype is not dtype or b.dtype is not dtype:
            return NotImplemented
        return add(x, F.linear(x, w, params.get("bias")))

    return call


def _held(layer: Any, pairs: Pairs, normal: Normal) -> Quick | None:
    """For everything else: factors made once, and what they were made from."""
    seen = Seen([*(m for slot, _ in pairs for m in slot.modules()), layer], written=True)
    if not seen.tellable:
        return None
    w, bias = executor.constants_of(normal.base, layer.weight)  # type: ignore[arg-type]
    s, a, b, d = executor.joined(normal.low, layer.weight)
    dtype, whole = w.dtype, isinstance(normal.base, Base)  # type: ignore[union-attr]
    a, b = a.detach().to(dtype), b.detach().to(dtype)
    d, off = (None if t is None else t.detach().to(dtype) for t in (d, normal.b))
    add = _Update(a, b if d is None else b * d, s)
    c = None if normal.c is None else normal.c.detach()
    divided = c is not None and divides(Line(w, bias, b=off), dtype)
    c = None if c is None else away(c) if divided else c.to(dtype)
    bias = bias if whole else None
    hub = layer.adapters.hub
    step, written = steps.taken(), hub.written

    def call(x: Tensor) -> Any:
        if steps.taken() != step or hub.written != written or not seen.still():
            return NotImplemented
        y = add(x, F.linear(x, w, bias))  # type: ignore[arg-type]
        if c is not None:
            y = magnify_(y.view(-1, y.shape[-1]), c).view(y.shape) if divided else y.mul_(c)
        return y if off is None else y.add_(off)

    return call


class _Update:
    """y (…, out) += s B (A x), A (r, in), B (out, r), in place: natively for few tokens, as two products for many."""

    def __init__(self, a: Tensor, b: Tensor, s: float) -> None:
        self.a, self.b, self.s = a, b, s
        self.shape, self.dtype = (a.shape[1], b.shape[0]), a.dtype
        self.native, self.most = function(a.dtype), few(a.dtype)
        self.jobs: dict[int, Job] = {}  # by the number of tokens
        self.at: tuple[int, ...] = ()  # where the factors were when those were made

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.a, self.b
        if x.is_cpu and x.is_contiguous() and 0 < (n := x.numel() // self.shape[0]) <= self.most and y.is_contiguous():
            at = (a.data_ptr(), b.data_ptr(), a.numel(), b.numel())  # memory may be exchanged under a parameter
            job = (self.jobs.get(n) if at == self.at else None) or self._job(n, at)
            if job is not None and a.is_contiguous() and b.is_contiguous():
                self.native(x.data_ptr(), y.data_ptr(), job.address)  # type: ignore[misc]
                return y
        h = F.linear(x, a)
        if y.dim() == 2:
            return y.addmm_(h, b.t(), alpha=self.s)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.t(), alpha=self.s)
        return y

    def _job(self, n: int, at: tuple[int, ...]) -> Job | None:
        """The native call's job for ``n`` tokens; None where the factors are not as they were."""
        a, b, (fan_in, fan_out) = self.a, self.b, self.shape
        same = a.shape[1:] == (fan_in,) and b.shape == (fan_out, a.shape[0])
        if not same or not all(t.is_cpu and t.dtype is self.dtype and t.is_contiguous() for t in (a, b)):
            return None
        if at != self.at or len(self.jobs) > MOST:
            self.jobs.clear()
            self.at = at
        made = self.jobs[n] = Job(self.shape, 1, n, None, [(0, 1)], [(a.detach(), b.detach(), self.s)])
        return made
