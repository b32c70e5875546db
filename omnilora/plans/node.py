"""Adapted products as one node of the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omnilora.plans.elementwise import drop
from omnilora.plans.product import (
    LEARNED,
    A,
    C,
    Drop,
    Kept,
    Line,
    Wanted,
    backward,
    cast,
    formula,
    forward,
    full,
    narrow_side,
    narrowed,  # fmt: skip
    outer,
)


class LowRank(torch.autograd.Function):
    """x (tokens, in) → y = x Wᵀ + bias + s (x Aᵀ) Bᵀ: the most frequent line, with no step that it does not need."""

    @staticmethod
    def forward(ctx: Any, line: Line, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y = full(x, line)
        h = x @ cast(A, x.dtype).t()
        ctx.line = line
        ctx.save_for_backward(x, A, B, h)
        return y.addmm_(h, cast(B, x.dtype).t(), alpha=line.s)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        x, A, B, h = ctx.saved_tensors
        line, (_, *needs) = ctx.line, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return None, *derivatives(lambda x, A, B: formula(x, (line._replace(A=A, B=B),), Drop()), gs, (x, A, B), needs)
        g = gs[0].contiguous()
        a, b = cast(A, g.dtype), cast(B, g.dtype)
        gh = narrowed(g, b, line.s)
        dx = (g @ cast(line.W, g.dtype)).addmm_(gh, a) if needs[0] else None  # type: ignore[arg-type]
        dA = cast(gh.t() @ x, A.dtype) if needs[1] else None
        return None, dx, dA, cast(outer(g, h, b, line.s), B.dtype) if needs[2] else None


class Products(torch.autograd.Function):
    """x (tokens, in) and the learned tensors of every line → every y (tokens, out)."""

    @staticmethod
    def forward(ctx: Any, lines: tuple[Line, ...], dropped: Drop, x: Tensor, *learned: Tensor | None) -> tuple[Tensor, ...]:
        ys, kept = forward(x, refilled(lines, learned), dropped)
        ctx.lines, ctx.dropped = lines, dropped
        reads_x = any(k is not None for k in (*learned[A::LEARNED], *learned[C::LEARNED]))
        ctx.save_for_backward(x if reads_x else None, *learned, kept.h, *kept.y)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        count = LEARNED * len(ctx.lines)
        learned, (h, *y) = saved[:count], saved[count:]
        lines, needs = refilled(ctx.lines, learned), ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return None, None, *again(gs, x, lines, ctx.dropped, learned, needs)
        gs = tuple(None if g is None else g.contiguous() for g in gs)
        want = wanted(needs[0], needs[1:])
        dx, grads, gh = backward(gs, lines, ctx.dropped, Kept(h, tuple(y)), want)
        narrow_side(gh, x, lines, ctx.dropped, want, grads)
        return None, None, dx, *grads


def constants(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    return tuple(Line(k.W, k.bias, k.s) for k in lines)


def refilled(lines: tuple[Line, ...], learned: Any) -> tuple[Line, ...]:
    """``lines`` with the tensors that autograd handed over."""
    return tuple(Line(k.W, k.bias, k.s, *learned[i * LEARNED : (i + 1) * LEARNED]) for i, k in enumerate(lines))


def wanted(x: bool, each: Any) -> Wanted:
    return Wanted(x, tuple(tuple(each[i : i + LEARNED]) for i in range(0, len(each), LEARNED)))


def again(gs: Any, x: Tensor | None, lines: tuple[Line, ...], dropped: Drop, learned: Any, needs: Any) -> list[Tensor | None]:
    """Gradients that can be differentiated once more."""
    if x is None:  # no A and no magnitude reads x: dx = Σ g W, the same at every x
        g = next(g for g in gs if g is not None)
        width = next((k.W.shape[1] for k in lines if k.W is not None), 1)
        x = g.new_zeros(g.shape[0], width).requires_grad_(needs[0])
    return derivatives(lambda x, *learned: formula(x, refilled(lines, learned), dropped), gs, (x, *learned), needs)


def derivatives(f: Callable[..., Sequence[Tensor]], gs: Any, inputs: Any, needs: Any) -> list[Tensor | None]:
    """Σ gs · ∂f/∂inputs with a graph of its own, None where it is not asked for. Partial derivatives: an input that was made from
    another one stands for itself."""
    own = [None if t is None else t.view_as(t) for t in inputs]
    ys = f(*own)
    asked = [t for t, need in zip(own, needs) if need]
    pairs = [(y, g) for y, g in zip(ys, gs) if g is not None and y.requires_grad]
    found = iter(torch.autograd.grad([y for y, _ in pairs], asked, [g for _, g in pairs], create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def products(x: Tensor, lines: tuple[Line, ...], dropped: Drop) -> tuple[Tensor, ...]:
    """x (tokens, in) → every y, as a node where gradients are wanted and plainly where they are not."""
    if len(lines) == 1 and not dropped and _bare(line := lines[0]) and torch.is_grad_enabled():
        return (LowRank.apply(Line(line.W, line.bias, line.s), x, line.A, line.B),)
    learned = [t for line in lines for t in line.learned]
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in learned)):
        return Products.apply(constants(lines), dropped, x, *learned)  # type: ignore[no-any-return]
    return tuple(forward(x, lines, dropped)[0])


def _bare(line: Line) -> bool:
    """Whether the line is W + s B A and nothing else."""
    parts = line.y0, line.h, line.D, line.c, line.b
    return line.W is not None and line.A is not None and line.B is not None and all(t is None for t in parts)


class Entered(torch.autograd.Function):
    """x (tokens, in), M_i (n_i, in) of one dtype → x again (its gradient joins here) and x M_iᵀ in that dtype, from one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *Ms: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *Ms)
        ctx.set_materialize_grads(False)
        h = cast(x, Ms[0].dtype) @ torch.cat(Ms).t()
        return x.view_as(x), *h.split([len(m) for m in Ms], 1)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *Ms = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(derivatives(lambda x, *Ms: (x, *(F.linear(cast(x, m.dtype), m) for m in Ms)), gs, (x, *Ms), ctx.needs_input_grad))
        through, *each = gs
        if all(g is None for g in each):
            return through, *[None] * len(Ms)
        M, dx = torch.cat(Ms), None
        g = torch.cat([M.new_zeros(len(x), len(m)) if g is None else g for g, m in zip(each, Ms)], 1)
        if ctx.needs_input_grad[0]:
            same = through is not None and M.dtype is x.dtype
            dx = torch.addmm(through, g, M) if same else cast(g @ M, x.dtype)  # type: ignore[arg-type]
            dx = dx if same or through is None else dx.add_(through)
        dM = (g.t() @ cast(x, M.dtype)).split([len(m) for m in Ms])
        return dx, *(d if need else None for d, need in zip(dM, ctx.needs_input_grad[1:]))


class Dropped(torch.autograd.Function):
    """x (tokens, in) with dropout that is made again from its seed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Drop) -> Tensor:
        ctx.dropped = dropped
        return drop(x, dropped.seed, dropped.p)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor, None]:
        return Dropped.apply(gs[0].contiguous(), ctx.dropped), None
