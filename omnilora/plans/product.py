"""One fused pass for adapted products that read the same input.

    y_i = c_i ⊙ (x W_iᵀ + bias_i + s_i (D_i ⊙ drop(x) A_iᵀ) B_iᵀ) + b_i

One product with all A's; products with B are added in place; nothing is kept for the backward pass but x, the narrow h = drop(x) Aᵀ
and, where there is a magnitude c, y. Dropout is made again from its seed. The base is constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from omnilora.plans.elementwise import Seed, draw_seed, drop, drop_add_, kept, magnify_, magnify_backward, wide
from omnilora.plans.rules import thin

Weight = Any  # a Tensor (out, in), or :class:`~omnilora.stores.quantized_layer.Dequantized`


class Line(NamedTuple):
    """One product. W (out, in) and bias (out,) are constants, in any dtype, W also as codes; where W is None, ``y0`` (tokens, out)
    is what the base gave.

    A (r, in), B (out, r), D (r,) or (tokens, r), c and b (out,), in any floating dtype; B None: the base alone. Where A is None
    beside a B, ``h`` (tokens, r) is what it gave.
    """

    W: Weight | None
    bias: Tensor | None
    s: float = 1.0
    y0: Tensor | None = None
    h: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    D: Tensor | None = None
    c: Tensor | None = None
    b: Tensor | None = None

    @property
    def learned(self) -> tuple[Tensor | None, ...]:
        return self[3:]

    @property
    def out(self) -> int:
        return int(self.W.shape[0]) if self.W is not None else self.y0.shape[-1]  # type: ignore[union-attr]


LEARNED = len(Line._fields) - 3
Y0, H, A, B, D, C, OFFSET = range(LEARNED)  # places of y0, h, A, B, D, c, b among the learned tensors


@dataclass(frozen=True)
class Drop:
    p: float = 0.0
    seed: Seed = (0, 0)

    def __bool__(self) -> bool:
        return self.p > 0.0


class Kept(NamedTuple):
    """What a forward pass leaves: h (tokens, ΣR) of all lines; of those with magnitudes y = c ⊙ z, or z where b is added."""

    h: Tensor | None
    y: tuple[Tensor | None, ...]


def drawn(p: float) -> Drop:
    """Dropout at rate p, from torch's generator where there is any."""
    return Drop(p, draw_seed()) if p > 0.0 else Drop()


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


def stacked(lines: tuple[Line, ...], dtype: torch.dtype) -> Tensor | None:
    """All A's, (ΣR, in)."""
    parts = [k.A for k in lines if k.A is not None]
    if len({a.dtype for a in parts}) > 1:
        parts = [cast(a, dtype) for a in parts]
    return None if not parts else cast(parts[0] if len(parts) == 1 else torch.cat(parts), dtype)


def spans(lines: tuple[Line, ...]) -> list[slice]:
    """Where each line's rank lies in the stacked one."""
    out, at = [], 0
    for k in lines:
        r = 0 if k.A is None else k.A.shape[0]
        out.append(slice(at, at + r))
        at += r
    return out


def forward(x: Tensor, lines: tuple[Line, ...], dropped: Drop, into: Tensor | None = None) -> tuple[list[Tensor], Kept]:
    """x (tokens, in) → every y (tokens, out). ``into`` (one line): the base's product is added to this tensor, out of place."""
    a = stacked(lines, x.dtype)
    where = spans(lines)
    h = None if a is None else (drop(x, dropped.seed, dropped.p) if dropped else x) @ a.t()
    ys, magnified = [], []
    for line, span in zip(lines, where):
        y = _based(x, line, into)
        if line.B is not None:
            u: Any = line.h if line.A is None else _part(h, span)
            u = u if line.D is None else u * cast(line.D, u.dtype)
            b = cast(line.B, u.dtype).t()
            y = torch.addmm(y, u, b, alpha=line.s) if line.W is None else y.addmm_(u, b, alpha=line.s)
        elif line.W is None and (line.c is not None or line.b is not None):
            y = y.clone()
        if line.c is not None and not divides(line, y.dtype):
            magnified.append(y)
            y = y * line.c.to(y.dtype)
        else:
            if line.c is not None:
                magnify_(y, line.c)
            magnified.append(y if line.c is not None else None)
        if line.b is not None:
            y.add_(line.b.to(y.dtype))
        if into is not None and line.c is not None:
            y = into + y
        ys.append(y)
    return ys, Kept(h, tuple(magnified))


def divides(line: Line, dtype: torch.dtype) -> bool:
    """Whether z = y / c gives back what the magnitude met, so that z need not be kept beside y."""
    return line.b is None and dtype != torch.float16


def full(x: Tensor, line: Line) -> Tensor:
    """x Wᵀ + bias in the data's dtype; copies under autocast and of codes are made where they are read."""
    W, bias = cast(line.W, x.dtype), None if line.bias is None else cast(line.bias, x.dtype)  # type: ignore[arg-type]
    if bias is None or isinstance(line.W, Tensor):
        return F.linear(x, W, bias)
    return F.linear(x, W) + bias  # as the layer itself rounds


def _based(x: Tensor, line: Line, into: Tensor | None) -> Tensor:
    if line.W is None:
        return line.y0  # type: ignore[return-value]
    if into is None or line.c is not None:
        return full(x, line)
    y = torch.addmm(into, x, cast(line.W, x.dtype).t())
    return y if line.bias is None else y.add_(cast(line.bias, x.dtype))


class Wanted(NamedTuple):
    """Whose gradients are asked for: of x, and of each line's learned tensors."""

    x: bool
    lines: tuple[tuple[bool, ...], ...]


def backward(gs: tuple[Tensor | None, ...], lines: tuple[Line, ...], dropped: Drop, kept_: Kept,
             want: Wanted) -> tuple[Tensor | None, list[Tensor | None], Tensor | None]:  # fmt: skip
    """(dx, gradients of the learned tensors of every line in order, dh (tokens, ΣR), each line's by its s); those of the A's come
    from :func:`narrow_side`, which alone needs x."""
    some = next(g for g in gs if g is not None)
    a, where = stacked(lines, some.dtype), spans(lines)
    gh = None if a is None else some.new_empty(some.shape[0], a.shape[0])
    dx: Tensor | None = None
    out: list[Tensor | None] = []
    for g, line, span, y, wants in zip(gs, lines, where, kept_.y, want.lines):
        grads: list[Tensor | None] = [None] * LEARNED
        if g is None:
            if line.A is not None:
                gh[:, span] = 0  # type: ignore[index]
            out += grads
            continue
        if line.b is not None and wants[OFFSET]:
            grads[OFFSET] = wide(g).sum(0).to(line.b.dtype)
        if line.c is not None:
            g, total = magnify_backward(g, y, line.c, divides(line, g.dtype))  # type: ignore[arg-type]
            grads[C] = cast(total, line.c.dtype) if wants[C] else None
        if wants[Y0]:
            grads[Y0] = g
        if want.x and line.W is not None:
            W = cast(line.W, g.dtype)
            dx = g @ W if dx is None else dx.addmm_(g, W)
        if line.B is not None:
            h, into = (line.h, None) if line.A is None else (_part(kept_.h, span), _part(gh, span))
            part = _narrow(g, line, h, into, wants, grads)
            if line.A is None:
                grads[H] = part if wants[H] else None
        out += grads
    if gh is not None and want.x:
        if dropped:
            through = gh @ a  # type: ignore[operator]
            dx = drop_add_(torch.zeros_like(through) if dx is None else dx, through, dropped.seed, dropped.p)
        else:
            dx = gh @ a if dx is None else dx.addmm_(gh, a)  # type: ignore[operator,arg-type]
    return dx, out, gh


def _part(h: Any, span: slice) -> Any:
    return h if span.stop - span.start == h.shape[1] else h[:, span]


def _narrow(g: Tensor, line: Line, h: Any, into: Tensor | None, wants: tuple[bool, ...], grads: list[Tensor | None]) -> Tensor:
    """Gradients of B and D into ``grads``; that of h, into ``into`` where it is given."""
    b, diagonal = cast(line.B, g.dtype), None if line.D is None else cast(line.D, g.dtype)  # type: ignore[arg-type]
    if wants[B]:
        grads[B] = cast(outer(g, h if diagonal is None else h * diagonal, b, line.s), line.B.dtype)  # type: ignore[union-attr]
    part = narrowed(g, b, line.s, into)
    if diagonal is not None:
        if wants[D]:
            dD = part * h if diagonal.dim() > 1 else (wide(part) * wide(h)).sum(0)
            grads[D] = dD.to(line.D.dtype)  # type: ignore[union-attr]
        part = part.mul_(diagonal)
    return part


def narrowed(g: Tensor, b: Tensor, s: float, into: Tensor | None = None) -> Tensor:
    """s g B (tokens, r); s is part of the product, for a pass of its own costs more."""
    into = g.new_empty(g.shape[0], b.shape[1]) if into is None else into
    return into.addmm_(g, b.t().contiguous().t() if thin(b) else b, beta=0, alpha=s)


def outer(g: Tensor, u: Tensor, b: Tensor, s: float) -> Tensor:
    """s gᵀ u (out, r), from the side on which the libraries are faster."""
    if g.dtype == torch.float32 and not thin(b):
        return torch.addmm(b, g.t(), u, beta=0, alpha=s)
    return torch.addmm(b.t(), u.t(), g, beta=0, alpha=s).t()


def narrow_side(gh: Tensor | None, x: Tensor | None, lines: tuple[Line, ...], dropped: Drop, want: Wanted,
                out: list[Tensor | None]) -> None:  # fmt: skip
    """Gradients of the A's into ``out``."""
    if gh is None or not any(w[A] for w in want.lines):
        return
    dA = gh.t() @ (drop(x, dropped.seed, dropped.p) if dropped else x)  # type: ignore[arg-type]
    dtypes = {line.A.dtype for line, wants in zip(lines, want.lines) if wants[A]}  # type: ignore[union-attr]
    dA = cast(dA, dtypes.pop()) if len(dtypes) == 1 else dA
    for i, (line, span, wants) in enumerate(zip(lines, spans(lines), want.lines)):
        if wants[A]:
            out[i * LEARNED + A] = cast(dA[span], line.A.dtype)  # type: ignore[union-attr]


def formula(x: Tensor, lines: tuple[Line, ...], dropped: Drop) -> list[Tensor]:
    """The same by differentiable operations, for derivatives of higher order."""
    xd = torch.where(kept(x.shape, dropped.seed, dropped.p, x.device), x / (1 - dropped.p), 0.0) if dropped else x
    ys = []
    for line in lines:
        y = line.y0 if line.W is None else full(x, line)
        if line.B is not None:
            u = line.h if line.A is None else F.linear(xd, line.A.to(x.dtype))
            u = u if line.D is None else u * cast(line.D, u.dtype)
            y = y + line.s * F.linear(u, line.B.to(u.dtype))  # type: ignore[union-attr,operator]
        y = y if line.c is None else y * line.c.to(y.dtype)  # type: ignore[union-attr]
        ys.append(y if line.b is None else y + line.b.to(y.dtype))  # type: ignore[union-attr,operator]
    return ys  # type: ignore[return-value]
