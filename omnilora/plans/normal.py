"""The normal form to which low-rank trees lower, whatever method made them.

    y = c ⊙ (base(x) + Σ_k s_k B_k (D_k ⊙ A_k drop(x))) + b

A (r, in), B (out, r), D (r,) or (…, r), c and b (out,) are tensors with their autograd history: masks, tensor trains, seeded
factors are ordinary operations upstream. A tree that does not lower is applied as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnilora.core.op import Chain, Dropout, Gate, Op, Part, Rows, Scaled, Shift, Splice, Sum, _product
from omnilora.core.site import Base, BaseLinear


class Low(NamedTuple):
    """One low-rank term. ``gates`` give factors of D, (…, r), from the layer's input. ``p``: dropout of x."""

    B: Tensor
    A: Tensor
    s: float = 1.0
    D: Tensor | None = None
    gates: tuple[Gate, ...] = ()
    p: float = 0.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]


class Normal(NamedTuple):
    """``base``: the map before the low-rank terms, applied by itself; None: nothing. It has its offset unless it says otherwise."""

    base: Op | None = None
    low: tuple[Low, ...] = ()
    c: Tensor | None = None
    b: Tensor | None = None


def lower(op: Op) -> Normal:
    """The normal form of a tree; what does not lower is the base of it, down to the whole tree."""
    kind = type(op)
    found: Normal | None = None
    if kind is Sum:
        found = _sum(op)  # type: ignore[arg-type]
    elif kind is Scaled:
        found = _scaled(op)  # type: ignore[arg-type]
    elif kind is Chain:
        found = _chain(op)  # type: ignore[arg-type]
    elif kind is Shift:
        inner = lower(op.op)  # type: ignore[attr-defined]
        found = inner._replace(b=_plus(inner.b, op.c))  # type: ignore[attr-defined]
    elif kind is Splice:
        found = _splice(op)  # type: ignore[arg-type]
    return Normal(base=op) if found is None else found


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _sum(op: Sum) -> Normal | None:
    left, right = lower(op.left), lower(op.right)
    if left.c is not None or right.c is not None:
        return None  # c would have to be divided out of the other term
    base = left.base if right.base is None else right.base if left.base is None else Sum(left.base, right.base)
    return Normal(base, left.low + right.low, None, _plus(left.b, right.b))


def _scaled(op: Scaled) -> Normal | None:
    inner, s = lower(op.op), op.s
    if inner.base is not None or inner.c is not None or inner.b is not None:
        return None
    if not isinstance(s, Tensor):
        return Normal(low=tuple(Low(k.B, k.A, k.s * s, k.D, k.gates, k.p) for k in inner.low))
    if s.dim() > 0:
        return None
    return Normal(low=tuple(Low(k.B * s.to(k.B.dtype), k.A, k.s, k.D, k.gates, k.p) for k in inner.low))


def _chain(op: Chain) -> Normal | None:
    links = op.links
    if isinstance(links[-1], Op):
        return _turned(op, links[-1])
    right, p = list(links), 0.0
    if type(right[-1]) is Dropout:
        drop = right.pop()
        p = drop.p if drop.training else 0.0
    A, D, gates = None, None, []
    while right and A is None:
        link = right.pop()
        if not isinstance(link, Tensor) or link.dim() > 2:
            return None
        if link.dim() == 2:
            A = link if D is None else link * D
        else:
            D = link if D is None else link * D
    if A is None:
        return None
    D = None
    while right and (isinstance(right[-1], Part) or (isinstance(right[-1], Tensor) and right[-1].dim() == 1)):
        link = right.pop()
        if isinstance(link, Tensor):
            D = link if D is None else link * D
        elif type(link) is Gate:
            gates.append(link)
        elif type(link) is not Dropout or (link.training and link.p > 0.0):
            return None
    if not right or any(not isinstance(k, Tensor) or k.dim() > 2 for k in right):
        return None
    B = _product(right)  # type: ignore[arg-type]
    if B.dim() != 2 or B.shape[1] != A.shape[0] or right[-1].dim() != 2:  # type: ignore[union-attr]
        return None
    return Normal(low=(Low(B, A, 1.0, D, tuple(gates), p),))


def _turned(op: Chain, last: Op) -> Normal | None:
    """Vectors left of a whole map: c ⊙ map."""
    inner = lower(last)
    front = op.links[:-1]
    if inner.base is None or any(not isinstance(k, Tensor) or k.dim() != 1 for k in front):
        return None
    c = inner.c
    for link in front:
        c = link if c is None else link * c  # type: ignore[assignment,operator]
    b = inner.b
    for link in reversed(front):
        b = None if b is None else link * b  # type: ignore[operator]
    return inner._replace(c=c, b=b)


def _splice(op: Splice) -> Normal | None:
    """Terms on rows [start, stop) of the output: the same terms with zero rows around them."""
    whole, part = lower(op.op), lower(op.part)
    if whole.c is not None or part.c is not None:
        return None
    rows = part.base
    if not isinstance(rows, Rows) or rows.op is not op.op or (rows.start, rows.stop) != (op.start, op.stop):
        return None
    if not isinstance(whole.base, (Base, BaseLinear)):
        return None
    around = (op.start, _fan_out(whole.base) - op.stop)

    def padded(t: Tensor) -> Tensor:
        return F.pad(t, around) if t.dim() == 1 else F.pad(t, (0, 0, *around))

    low = tuple(k._replace(B=padded(k.B)) for k in part.low)
    return whole._replace(low=whole.low + low, b=_plus(whole.b, None if part.b is None else padded(part.b)))


def _fan_out(base: Base | BaseLinear) -> int:
    """Rows of the whole weight, of which the site may be a region."""
    site = (base if isinstance(base, Base) else base.base).site
    return site.layout.matrix(torch.empty(site.store.shape(), device="meta")).shape[-2]
