"""A decoder block as three nodes: norm + projections + rotation; output + residual; norm + gated pair + down + residual.

They keep the residual, 1/rms, the narrow h and what attention and the gate need anyway. Norm outputs and gated products are
made again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from omnilora.plans.elementwise import gated, gated_backward, normalized, rms_backward, rms_forward, rope, rotated, wide
from omnilora.plans.node import derivatives, refilled, wanted
from omnilora.plans.product import LEARNED, Drop, Kept, Line, backward, divides, formula, forward, narrow_side

Lines = tuple[Line, ...]


@dataclass(frozen=True, eq=False)
class Norm:
    """(w + shift) ⊙ x / √(mean x² + eps), constant. ``between``: x / √… is rounded to the data's dtype before w meets it."""

    w: Tensor
    eps: float
    shift: float = 0.0
    between: bool = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return rms_forward(x, self.w, self.eps, self.shift, self.between)

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor, add: Tensor | None) -> Tensor:
        return rms_backward(dy, x, self.w, rstd, add, self.shift)

    def formula(self, x: Tensor) -> Tensor:
        return normalized(x, self.w, torch.rsqrt(wide(x).square().mean(-1) + self.eps), self.shift, self.between)


@dataclass(frozen=True, eq=False)
class Turn:
    """Rotation tables (batch or 1, length, d)."""

    cosine: Tensor
    sine: Tensor


@dataclass(frozen=True, eq=False)
class Heads:
    """``norm`` None: the input is normalized already. ``turn`` rotates q and k. ``count``: heads of q, k, v, each ``d`` wide."""

    lines: Lines
    dropped: Drop
    norm: Norm | None
    turn: Turn | None
    count: tuple[int, ...]
    d: int


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


class Projections(torch.autograd.Function):
    """x (batch, length, in) → x again (the residual; its gradient joins here) and q, k, v (batch, heads, length, d)."""

    @staticmethod
    def forward(ctx: Any, spec: Heads, x: Tensor, *learned: Tensor | None) -> tuple[Tensor, ...]:
        flat, rstd = _flat(x), None
        xn = flat
        if spec.norm is not None:
            xn, rstd = spec.norm.forward(flat)
        ys, kept = forward(xn, refilled(spec.lines, learned), spec.dropped)
        heads = [y.view(*x.shape[:2], n, spec.d) for y, n in zip(ys, spec.count)]
        if spec.turn is not None:
            for y in heads[:2]:
                rope(y, spec.turn.cosine, spec.turn.sine, into=y)
        ctx.spec, ctx.learned = spec, len(learned)
        ctx.save_for_backward(x, rstd, *learned, kept.h, *kept.y)
        return x.view_as(x), *(y.transpose(1, 2) for y in heads)

    @staticmethod
    def backward(ctx: Any, through: Tensor | None, *gs: Tensor | None) -> tuple[Any, ...]:
        x, rstd, *saved = ctx.saved_tensors
        spec: Heads = ctx.spec
        learned, (h, *ys) = saved[: ctx.learned], saved[ctx.learned :]
        lines, needs = refilled(spec.lines, learned), ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            again = partial(_heads_formula, spec)
            return None, *derivatives(again, (through, *gs), (x, *learned), needs)
        if all(g is None for g in gs):
            return None, through, *[None] * ctx.learned
        flat = _flat(x)
        grads_in, ys = _turned_back(spec, lines, gs, ys)
        want = wanted(needs[0], needs[1:])
        dx, out, gh = backward(grads_in, lines, spec.dropped, Kept(h, tuple(ys)), want)
        narrow_side(gh, flat if spec.norm is None else spec.norm.forward(flat)[0], lines, spec.dropped, want, out)
        if dx is not None:
            add = None if through is None else _flat(through).contiguous()
            if spec.norm is not None:
                dx = spec.norm.backward(dx, flat, rstd, add)
            elif add is not None:
                dx = dx.add_(add)
            dx = dx.view(x.shape)
        return None, dx, *out


def _turned_back(spec: Heads, lines: Lines, gs: tuple[Tensor | None, ...], ys: list[Tensor | None]) -> tuple[Any, list[Tensor | None]]:
    """Gradients (tokens, out) before the rotation; the y that magnitudes divide, before it too."""
    found: list[Tensor | None] = []
    ys = list(ys)
    for i, g in enumerate(gs):
        if g is None:
            found.append(None)
            continue
        g = g.transpose(1, 2)
        if spec.turn is not None and i < 2:
            c, s = spec.turn.cosine, spec.turn.sine
            found.append(rope(g, c, s, back=True).flatten(2).flatten(0, 1))
            y = ys[i]
            if y is not None and divides(lines[i], y.dtype):
                size = wide(c).square() + wide(s).square()  # not 1: tables are rounded, and may carry a factor
                ys[i] = rope(y.view(g.shape), (c / size).to(c.dtype), (s / size).to(c.dtype), back=True).flatten(2).flatten(0, 1)
        else:
            found.append(g.flatten(2).flatten(0, 1).contiguous())
    return tuple(found), ys


def _heads_formula(spec: Heads, x: Tensor, *learned: Tensor | None) -> list[Tensor]:
    lines = refilled(spec.lines, learned)
    xn = _flat(x) if spec.norm is None else spec.norm.formula(_flat(x))
    heads = [y.view(*x.shape[:2], n, spec.d) for y, n in zip(formula(xn, lines, spec.dropped), spec.count)]
    if spec.turn is not None:
        heads[:2] = [rotated(y, spec.turn.cosine, spec.turn.sine) for y in heads[:2]]
    return [x, *(y.transpose(1, 2) for y in heads)]


class Output(torch.autograd.Function):
    """residual (…, out) + the line of a (…, in)."""

    @staticmethod
    def forward(ctx: Any, line: Line, dropped: Drop, residual: Tensor, a: Tensor, *learned: Tensor | None) -> Tensor:
        (y,), kept = forward(_flat(a), refilled((line,), learned), dropped, into=_flat(residual))
        ctx.line, ctx.dropped = line, dropped
        ctx.save_for_backward(a, *learned, kept.h, *kept.y)
        return y.view(residual.shape)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        a, *saved = ctx.saved_tensors
        learned, (h, *y) = saved[:LEARNED], saved[LEARNED:]
        lines, needs = refilled((ctx.line,), learned), ctx.needs_input_grad[2:]
        g = gs[0]
        if torch.is_grad_enabled():
            again = partial(_output_formula, ctx.line, ctx.dropped)
            return None, None, g, *derivatives(again, (_flat(g),), (a, *learned), needs[1:])
        want = wanted(needs[1], needs[2:])
        da, out, gh = backward((_flat(g).contiguous(),), lines, ctx.dropped, Kept(h, tuple(y)), want)
        narrow_side(gh, _flat(a), lines, ctx.dropped, want, out)
        return None, None, g, None if da is None else da.view(a.shape), *out


def _output_formula(line: Line, dropped: Drop, a: Tensor, *learned: Tensor | None) -> list[Tensor]:
    return formula(_flat(a), refilled((line,), learned), dropped)


class Normed(torch.autograd.Function):
    """x → x again (the residual; its gradient joins here) and norm(x), for readers outside of the products."""

    @staticmethod
    def forward(ctx: Any, norm: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
        y, rstd = norm.forward(_flat(x))
        ctx.norm = norm
        ctx.save_for_backward(x, rstd)
        return x.view_as(x), y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Any, ...]:
        x, rstd = ctx.saved_tensors
        through, g = gs
        if torch.is_grad_enabled():
            return None, *derivatives(lambda x: (x, ctx.norm.formula(x)), gs, (x,), (True,))
        if g is None:
            return None, through
        add = None if through is None else _flat(through).contiguous()
        return None, ctx.norm.backward(_flat(g).contiguous(), _flat(x), rstd, add).view(x.shape)


class Gated(torch.autograd.Function):
    """act(e) ⊙ u."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, u: Tensor, act: str) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(e, u)
        return gated(e, u, act)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        e, u = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *derivatives(lambda e, u: [_gated_formula(e, u, ctx.act)], gs, (e, u), ctx.needs_input_grad[:2]), None
        de, du, _ = gated_backward(gs[0].contiguous(), e, u, ctx.act)
        return de, du, None


def _gated_formula(e: Tensor, u: Tensor, act: str) -> Tensor:
    return (torch.nn.functional.silu(e) if act == "silu" else torch.nn.functional.gelu(e, approximate="tanh")) * u


@dataclass(frozen=True, eq=False)
class Pair:
    """Gate and up read the norm of x, down reads act(gate) ⊙ up."""

    lines: Lines  # gate, up
    down: Line
    dropped: Drop
    dropped_down: Drop
    norm: Norm
    act: str


class GatedPair(torch.autograd.Function):
    """x (…, in) → x + down(act(gate(norm x)) ⊙ up(norm x))."""

    @staticmethod
    def forward(ctx: Any, spec: Pair, x: Tensor, *learned: Tensor | None) -> Tensor:
        flat = _flat(x)
        wide_, narrow = refilled(spec.lines, learned[: 2 * LEARNED]), refilled((spec.down,), learned[2 * LEARNED :])
        xn, rstd = spec.norm.forward(flat)
        (e, u), kept = forward(xn, wide_, spec.dropped)
        del xn
        (y,), kept_down = forward(gated(e, u, spec.act), narrow, spec.dropped_down, into=flat)
        ctx.spec = spec
        ctx.save_for_backward(x, rstd, e, u, kept.h, *kept.y, kept_down.h, *kept_down.y, *learned)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        x, rstd, e, u, h, y_gate, y_up, h_down, y_down, *learned = ctx.saved_tensors
        spec: Pair = ctx.spec
        wide_, narrow = refilled(spec.lines, learned[: 2 * LEARNED]), refilled((spec.down,), learned[2 * LEARNED :])
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *derivatives(partial(_pair_formula, spec), gs, (x, *learned), needs)
        g, flat = _flat(gs[0]).contiguous(), _flat(x)
        above = needs[0] or any(needs[1 : 1 + 2 * LEARNED])
        want = wanted(above, needs[1 + 2 * LEARNED :])
        dp, out_down, gh = backward((g,), narrow, spec.dropped_down, Kept(h_down, (y_down,)), want)
        if dp is None:
            narrow_side(gh, gated(e, u, spec.act), narrow, spec.dropped_down, want, out_down)
            return None, gs[0] if needs[0] else None, *[None] * (2 * LEARNED), *out_down
        de, du, p = gated_backward(dp, e, u, spec.act, spent=True)
        del dp
        narrow_side(gh, p, narrow, spec.dropped_down, want, out_down)
        del p
        want = wanted(needs[0], needs[1 : 1 + 2 * LEARNED])
        dx, out, gh = backward((de, du), wide_, spec.dropped, Kept(h, (y_gate, y_up)), want)
        narrow_side(gh, spec.norm.forward(flat)[0], wide_, spec.dropped, want, out)
        if dx is not None:
            dx = spec.norm.backward(dx, flat, rstd, g).view(x.shape)
        return None, dx, *out, *out_down


def _pair_formula(spec: Pair, x: Tensor, *learned: Tensor | None) -> list[Tensor]:
    wide_, narrow = refilled(spec.lines, learned[: 2 * LEARNED]), refilled((spec.down,), learned[2 * LEARNED :])
    e, u = formula(spec.norm.formula(_flat(x)), wide_, spec.dropped)
    return [x + formula(_gated_formula(e, u, spec.act), narrow, spec.dropped_down)[0].view(x.shape)]
