"""One adapted linear layer without gradients, with as little between the call and the products as there can be.

    y = c ⊙ (x Wᵀ + bias + s (D ⊙ x Aᵀ) Bᵀ) + b

A closure over the layer's own tensors. LoRA's factors are read where they are. What must be computed first (a norm, a tensor
train, another dtype) is a copy, good as long as :class:`~omnilora.plans.seen.Seen`, the epoch and the count of optimizers' steps
say so. A closure answers None to a call that is not of the kind it was made for, and NotImplemented where something has changed;
the layer's general forward answers instead, and in the second case has the closure made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnilora.core.context import EMPTY, Context
from omnilora.core.layer import Adapters, build
from omnilora.core.site import Base
from omnilora.core.standin import own_class
from omnilora.plans import executor, steps
from omnilora.plans.elementwise import magnify_
from omnilora.plans.normal import Normal, lower
from omnilora.plans.product import Line, divides, factor
from omnilora.plans.ragged import Job, few, function
from omnilora.plans.seen import Seen

MOST = 512  # jobs that a layer keeps: one for each number of tokens
Quick = Callable[[Tensor], Any]  # y, None or NotImplemented

class _Read(Exception):
    """A form looked at the context: its map is not one for all calls."""


@dataclass(frozen=True, eq=False)
class _Blind(Context):
    def get(self, key: str, default: Any = None) -> Any:
        raise _Read(key)


def quicken(layer: Any, mine: Adapters) -> None:
    """Put on ``mine`` the closure for the active set, or None where the map is no low-rank term beside a plain weight."""
    if executor.serves():
        mine.quick, mine.asked = _made(layer, mine), mine.hub.epoch


def _made(layer: Any, mine: Adapters) -> Quick | None:
    hub = mine.hub
    pairs = [(s, w) for name, w in hub.active for s in mine.slots.get(name, ())]
    if not pairs or mine.inner is not None or own_class(layer).forward is not nn.Linear.forward:
        return None
    if any(not s.site.called or s.site.kind != "linear" for s, _ in pairs):
        return None
    base, before = Base(pairs[0][0].site, layer, nn.Linear.forward.__get__(layer)), torch.get_rng_state()
    try:
        normal = lower(build(base, pairs, _Blind()))
    except _Read:
        return None
    if normal.base is None or not normal.low or executor.constants_of(normal.base, layer.weight)[0] is None:
        return None
    if any(k.p or k.gates for k in normal.low) or not torch.equal(before, torch.get_rng_state()):
        return None
    call = _direct(layer, pairs, normal) or _held(layer, pairs, normal)
    if call is None:
        return None
    active, epoch, local, dtype = hub.active, hub.epoch, hub.local, layer.weight.dtype
    scales = [(s, s.scale, s.how, s.training) for s, _ in pairs]
    grad, me = torch.is_grad_enabled, id(mine)

    def quick(x: Tensor) -> Any:
        if hub.epoch != epoch or hub.active is not active:
            return NotImplemented
        if hub.merged or local.context is not EMPTY or grad():
            return None
        if not executor.plain(x) or x.dtype is not dtype:
            return None
        for slot, scale, how, training in scales:
            if slot.scale != scale or slot.how is not how or slot.training is not training:
                return NotImplemented
        if (visits := local.visits) is not None:
            visits.add(me)
        return call(x)

    return quick


def _direct(layer: Any, pairs: list[tuple[Any, Any]], normal: Normal) -> Quick | None:
    """For one term whose factors are the slot's own parameters: nothing is copied."""
    (low, *more), (slot, _) = normal.low, pairs[0]
    params, own = layer._parameters, slot._parameters
    names = {id(t): n for n, t in own.items()}
    whole = isinstance(normal.base, Base) and normal.c is None and normal.b is None and low.D is None
    if more or not whole or id(low.A) not in names or id(low.B) not in names:
        return None
    a_name, b_name, a, b, w = names[id(low.A)], names[id(low.B)], low.A, low.B, params.get("weight")
    if w is None or a.dtype != w.dtype or b.dtype != w.dtype:
        return None
    dtype, add = w.dtype, _Update(a, b, low.s)

    def call(x: Tensor) -> Any:
        if params.get("weight") is not w or own.get(a_name) is not a or own.get(b_name) is not b or w.dtype is not dtype:
            return NotImplemented
        return add(x, F.linear(x, w, params.get("bias")))

    return call


def _held(layer: Any, pairs: list[tuple[Any, Any]], normal: Normal) -> Quick | None:
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
    c = None if c is None else factor(c) if divided else c.to(dtype)
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
        if self.s != 1.0:
            h.mul_(self.s)
        if y.dim() == 2:
            return y.addmm_(h, b.t())
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.t())
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
