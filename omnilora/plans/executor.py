"""How an adapted map is applied: by one fused node where its tree lowers to the normal form, else by the tree itself.

Compiled code, function transforms, forward-mode derivatives and tensors that are not plain run the tree; under autocast, forms
without magnitudes and gates run fused. ``OMNILORA_PLANS=0`` and :func:`off` make everything run its tree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnilora.core.op import Geometry, Op, like
from omnilora.core.site import Base, ConvGeometry
from omnilora.plans.convolution import convolved
from omnilora.plans.elementwise import low_rank_squares
from omnilora.plans.native import watched
from omnilora.plans.node import Dropped, Entered, products
from omnilora.plans.normal import Low, Normal, lower
from omnilora.plans.product import Drop, Line, Weight, drawn
from omnilora.stores.quantized_layer import Dequantized, QuantizedLinear

_off = os.environ.get("OMNILORA_PLANS", "1") == "0"


@contextmanager
def off() -> Iterator[None]:
    """Every adapted map is applied by its tree inside."""
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def serves() -> bool:
    return not _off


def free(x: Tensor) -> bool:
    """Whether fused code may run on x: a plain floating tensor, no transform, no tracing, nobody who watches operations."""
    return not (
        _off
        or torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or not x.is_floating_point()
        or x.numel() == 0
        or x.is_meta
        or watched()
        or torch.autograd.forward_ad._current_level >= 0
    )


def autocasts(x: Tensor) -> bool:
    return torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def plain(x: Tensor) -> bool:
    """Whether fused code may run on x as it is: :func:`free`, and no autocast."""
    return free(x) and not autocasts(x)


def execute(op: Op, x: Tensor, geo: Geometry) -> Tensor:
    """op(x), by the fused node where there is one."""
    if not free(x):
        return op.apply(x, geo)
    if autocasts(x):
        y = _autocast(lower(op), x) if geo.plain else None
        return op.apply(x, geo) if y is None else y
    if not geo.plain:
        y = convolved(lower(op), x, geo) if isinstance(geo, ConvGeometry) else None
        return op.apply(x, geo) if y is None else y
    normal = lower(op)
    if normal.base is None or (not normal.low and normal.c is None):
        return op.apply(x, geo)
    p = normal.low[0].p if normal.low else 0.0
    if any(k.p != p for k in normal.low):
        return op.apply(x, geo)
    dropped = drawn(p)
    way = None
    if constants_of(normal.base, x)[0] is not None:  # a base that makes its own product reads x as it came
        x, (way,) = routed([normal], x, dropped)
    flat = x.reshape(-1, x.shape[-1])
    line = line_of(normal, x, flat, geo, dropped, way)
    if line is None:
        return op.apply(x, geo)
    (y,) = products(flat, (line,), dropped)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _autocast(normal: Normal, x: Tensor) -> Tensor | None:
    """The map in autocast's dtype where it is low-rank terms beside a plain weight; else None. The weight's copy in that dtype is
    made again in the backward pass, where autograd would keep one for every layer."""
    dtype, low = torch.get_autocast_dtype("cpu" if x.is_cpu else x.device.type), normal.low
    bare = normal.base is not None and low and normal.c is None and normal.b is None and x.dtype is not torch.float64
    if not bare or any(k.gates or k.p != low[0].p for k in low):
        return None
    weight, bias = constants_of(normal.base, None)  # type: ignore[arg-type]
    if weight is None or weight.dtype is torch.float64:
        return None
    dropped = drawn(low[0].p)
    with torch.autocast(x.device.type, enabled=False):
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        s, a, b, d = joined(low, flat)
        (y,) = products(flat, (ready(Line(weight, bias, s, A=a, B=b, D=d), flat, dropped),), dropped)
    return y.view(*x.shape[:-1], y.shape[-1])


def squares(w: Tensor, u: Tensor, b: Tensor, a: Tensor) -> Tensor | None:
    """Squared norms of the rows of W + B A by a kernel, where there is one and nobody follows the steps."""
    return low_rank_squares(w, u, b, a) if plain(b) and plain(u) and type(w) is Tensor else None


def line_of(normal: Normal, x: Tensor, flat: Tensor, geo: Geometry, dropped: Drop, way: Way | None = None) -> Line | None:
    """The normal form of a map that reads x (…, in), as one line of a fused pass over ``flat`` (tokens, in). ``way``: see
    :func:`routed`."""
    weight, bias = constants_of(normal.base, x)  # type: ignore[arg-type]
    y0 = None
    if weight is None:
        y0 = normal.base.apply(x, geo)  # type: ignore[union-attr]
        if type(y0) is not Tensor or y0.dtype != x.dtype or y0.shape[:-1] != x.shape[:-1]:
            return None
        y0 = y0.reshape(-1, y0.shape[-1])
    if not normal.low:
        return Line(weight, bias, y0=y0, c=normal.c, b=normal.b)
    if way is not None:
        return way.line(weight, bias, y0, normal)
    s, a, b, d = joined(normal.low, x)
    return ready(Line(weight, bias, s, y0, None, a, b, d, normal.c, normal.b), flat, dropped)


def ready(line: Line, flat: Tensor, dropped: Drop) -> Line:
    """``line`` for a pass over ``flat``: where A does not learn, x need not be kept for its sake, and h comes from outside."""
    if line.A is None or line.A.requires_grad or not torch.is_grad_enabled():
        return line
    x: Tensor = Dropped.apply(flat, dropped) if dropped else flat
    return line._replace(h=torch.nn.functional.linear(x, like(line.A, x)), A=None)


def constants_of(base: Op, x: Tensor | None) -> tuple[Weight | None, Tensor | None]:
    """(W, bias) where the base is x Wᵀ + bias of constants in x's dtype (None: in any), or of codes that give any."""
    whole = base if isinstance(base, Base) else getattr(base, "base", None)
    if not isinstance(whole, Base):
        return None, None
    if getattr(whole.forward, "__func__", None) is QuantizedLinear.forward:
        layer: Any = whole.layer
        constant = whole.y is None and not whole.args and not whole.kwargs and not any(learns(p) for p in layer._parameters.values())
        return (Dequantized(layer), base.offset) if constant else (None, None)
    weight = whole.plain_weight
    if weight is None or (x is not None and weight.dtype != x.dtype) or type(weight) not in (Tensor, torch.nn.Parameter):
        return None, None
    return weight, base.offset


def learns(p: Tensor | None) -> bool:
    return p is not None and p.requires_grad


def joined(low: tuple[Low, ...], x: Tensor) -> tuple[float, Tensor, Tensor, Tensor | None]:
    """Several terms as one: (s, A, B, D) with ranks side by side."""
    if len(low) == 1:
        return low[0].s, low[0].A, low[0].B, diagonal(low[0], x)
    ds = [diagonal(k, x) for k in low]
    a, b = torch.cat([k.A for k in low]), torch.cat([k.B * k.s for k in low], 1)
    if all(d is None for d in ds):
        return 1.0, a, b, None
    shape = next((d.shape[:-1] for d in ds if d is not None and d.dim() > 1), ())
    full = [(torch.ones(k.rank, dtype=x.dtype, device=x.device) if d is None else d).expand(*shape, k.rank) for k, d in zip(low, ds)]
    return 1.0, a, b, torch.cat(full, -1)


def diagonal(low: Low, x: Tensor) -> Tensor | None:
    """D (r,), or (tokens, r) where gates depend on x."""
    d = low.D
    for gate in low.gates:
        d = _times(d, gate.of(x), low, x)
    return d


def _times(d: Tensor | None, g: Tensor, low: Low, x: Tensor) -> Tensor:
    g = like(g, x).expand(*x.shape[:-1], low.rank).reshape(-1, low.rank)
    return g if d is None else d * g


class Way(NamedTuple):
    """What a routed term gets from its input: h (tokens, r) = A x, None where x is dropped first, and D (tokens, r)."""

    h: Tensor | None
    D: Tensor

    def line(self, weight: Weight | None, bias: Tensor | None, y0: Tensor | None, normal: Normal) -> Line:
        (low,) = normal.low
        return Line(weight, bias, low.s, y0, self.h, low.A if self.h is None else None, low.B, self.D, normal.c, normal.b)


def routed(normals: Sequence[Normal], x: Tensor, dropped: Drop) -> tuple[Tensor, list[Way | None]]:
    """x (…, in) again, to be read by the wide products, and the ways of those terms that a linear router directs: routers and A's
    of one dtype are one product, and what they give back to x joins the wide products' without a sum of its own."""
    lows = {i: n.low[0] for i, n in enumerate(normals) if len(n.low) == 1 and [g.R is not None for g in n.low[0].gates] == [True]}
    if not lows:
        return x, [None] * len(normals)
    flat, wanted = x.reshape(-1, x.shape[-1]), {}
    for i, low in lows.items():
        wanted["logits", i] = low.gates[0].R
        if not dropped:
            wanted["h", i] = like(low.A, x)
    found: dict[tuple[str, int], Tensor] = {}
    for dtype in dict.fromkeys(m.dtype for m in wanted.values()):
        same = {k: m for k, m in wanted.items() if m.dtype is dtype}
        again, *out = Entered.apply(flat, *same.values())
        flat = again if flat.requires_grad else flat
        found |= zip(same, out, strict=True)
    x = flat.view(x.shape)
    ways: list[Way | None] = [None] * len(normals)
    for i, low in lows.items():
        g = low.gates[0].f(found["logits", i].view(*x.shape[:-1], -1))
        ways[i] = Way(found.get(("h", i)), _times(low.D, g, low, x))
    return x, ways

