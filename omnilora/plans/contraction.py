"""The orders in which a low-rank product beside a dense weight can be contracted, their cost, and which one to take.

    y = x (W + U V),   x (t, i), W (i, o), U (i, r), V (r, o);   Cherniuk et al., 2023, arXiv:2312.03415

    forward    F1  x W + (x U) V                    F2  x (W + U V)
    backward   dU  1: xᵀ (dy Vᵀ)                    2: (xᵀ dy) Vᵀ
               dV  1: (x U)ᵀ dy                     2: Uᵀ (xᵀ dy)        3: (Uᵀ xᵀ) dy
               dx  1: dy Wᵀ + (dy Vᵀ) Uᵀ            2: dy (W + U V)ᵀ     3: dy (Wᵀ + Vᵀ Uᵀ)

Stored weights are turned: W, U, V are the transposes of a layer's (o, i), A (r, i) and B (o, r). Whatever the order, x, W, A and
B are saved for the backward pass and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omnilora.errors import BadValue

FORWARD = ("F1", "F2")
BACKWARD = {  # (dU, dV, dx)
    "B1": (1, 1, 1), "B2": (1, 2, 1), "B3": (2, 2, 1), "B4": (2, 2, 2),
    "B5": (1, 1, 2), "B6": (2, 3, 1), "B7": (2, 3, 3), "B8": (1, 2, 3),
}  # fmt: skip
FOLDS = ("F2", "B4", "B5", "B7", "B8")  # form W + U V: in half precision that sum would round ΔW away


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool = True
    U: bool = True
    V: bool = True


ALL = Needs()


class Plan(NamedTuple):
    forward: str
    backward: str


def forward_flops(order: str, t: int, i: int, o: int, r: int) -> int:
    """Two for each multiplication of a matrix product; sums of matrices are not counted."""
    low = t * i * r + t * r * o if order == "F1" else i * r * o
    return 2 * (t * i * o + low)


def backward_flops(order: str, t: int, i: int, o: int, r: int, needs: Needs = ALL) -> int:
    """Each product once: dy Vᵀ and xᵀ dy serve several gradients; what nobody asks for is left out."""
    dU, dV, dx = BACKWARD[order]
    dU, dV, dx = dU * needs.U, dV * needs.V, dx * needs.x
    products = {
        "dy Vᵀ": (t * o * r, dU == 1 or dx == 1),
        "xᵀ dy": (t * i * o, dU == 2 or dV == 2),
        "x U": (t * i * r, dV in (1, 3)),
        "dU": (t * i * r if dU == 1 else i * o * r, dU > 0),
        "dV": (i * o * r if dV == 2 else t * o * r, dV > 0),
        "dx": (t * i * o, dx > 0),
        "(dy Vᵀ) Uᵀ": (t * i * r, dx == 1),
        "U V": (i * o * r, dx in (2, 3)),
    }
    return 2 * sum(cost for cost, used in products.values() if used)


@lru_cache(maxsize=4096)
def choose(t: int, i: int, o: int, r: int, needs: Needs = ALL, folds: bool = True) -> Plan:
    """The cheapest pair by FLOPs; the first of equals. ``folds`` False: none that forms W + U V."""
    first = [f for f in FORWARD if folds or f not in FOLDS]
    second = [b for b in BACKWARD if folds or b not in FOLDS]
    return Plan(min(first, key=lambda f: forward_flops(f, t, i, o, r)),
                min(second, key=lambda b: backward_flops(b, t, i, o, r, needs)))  # fmt: skip


@lru_cache(maxsize=512)
def fastest(t: int, i: int, o: int, r: int, needs: Needs = ALL, folds: bool = True, dtype: torch.dtype = torch.float32,
            device: str = "cpu", rounds: int = 5) -> Plan:  # fmt: skip
    """The pair that takes the least time here, measured once a shape on random tensors: the median of ``rounds``."""
    g = torch.Generator().manual_seed(0)
    x, W, A, B, dy = (torch.randn(s, generator=g).to(device, dtype) for s in ((t, i), (o, i), (r, i), (o, r), (t, o)))
    with torch.no_grad():
        first = {f: _time(lambda f=f: run_forward(f, x, W, A, B, None), x, rounds) for f in FORWARD if folds or f not in FOLDS}
        second = {b: _time(lambda b=b: run_backward(b, needs, x, W, A, B, dy), x, rounds)
                  for b in BACKWARD if folds or b not in FOLDS}  # fmt: skip
    return Plan(min(first, key=first.__getitem__), min(second, key=second.__getitem__))


def _time(call: Any, x: Tensor, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        begin = time.perf_counter()
        call()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[rounds // 2]


def run_forward(order: str, x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """x (t, i), W (o, i), A (r, i), B (o, r) → (t, o)."""
    weight = W if order == "F1" else torch.addmm(W, B, A)
    y = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    return torch.addmm(y, x @ A.t(), B.t(), out=y) if order == "F1" else y


def run_backward(order: str, needs: Needs, x: Tensor, W: Tensor, A: Tensor, B: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    """(dx (t, i), dA (r, i), dB (o, r)), None where a gradient is not asked for."""
    dU, dV, dX = BACKWARD[order]
    dU, dV, dX = dU * needs.U, dV * needs.V, dX * needs.x
    dy_v = dy @ B if dU == 1 or dX == 1 else None  # (t, r)
    dense = dy.t() @ x if dU == 2 or dV == 2 else None  # (o, i) = (xᵀ dy)ᵀ
    dA = None if not dU else dy_v.t() @ x if dU == 1 else B.t() @ dense  # type: ignore[union-attr]
    if dV == 3:
        dB = ((A @ x.t()) @ dy).t()
    else:
        dB = None if not dV else dy.t() @ (x @ A.t()) if dV == 1 else dense @ A.t()  # type: ignore[union-attr,assignment]
    if dX == 1:
        dx = torch.addmm(dy @ W, dy_v, A)  # type: ignore[arg-type]
    elif dX == 2:
        dx = dy @ torch.addmm(W, B, A)
    else:
        dx = dy @ torch.addmm(W.t(), A.t(), B.t()).t() if dX else None  # type: ignore[assignment]
    return dx, dA, dB


class Contraction(torch.autograd.Function):
    """One pair of orders. W and the bias are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.order = plan.backward
        return run_forward(plan.forward, x, W, A, B, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        want = ctx.needs_input_grad
        return (*_ordered(run_backward(ctx.order, Needs(want[0], want[2], want[3]), x, W, A, B, grads[0])), None, None)


def _ordered(found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    dx, dA, dB = found
    return dx, None, dA, dB


@dataclass(frozen=True)
class Planner:
    """``by``: "flops" or "time" (measured once for each shape)."""

    by: str = "flops"

    def check(self) -> None:
        if self.by not in ("flops", "time"):
            raise BadValue(f"by = {self.by!r}.", "Give 'flops' or 'time'.")

    def plan(self, x: Tensor, A: Tensor, B: Tensor) -> Plan:
        """For x (t, i), A (r, i), B (o, r)."""
        on = torch.is_grad_enabled()
        needs = Needs(on and x.requires_grad, on and A.requires_grad, on and B.requires_grad)
        shape = (x.shape[0], x.shape[1], B.shape[0], A.shape[0])
        folds = x.dtype in (torch.float32, torch.float64)
        if self.by == "flops":
            return choose(*shape, needs, folds)
        bucket = 1 << (shape[0] - 1).bit_length()  # lengths vary: one measurement for each power of two
        return fastest(bucket, *shape[1:], needs, folds, x.dtype, str(x.device))


def contract(x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, planner: Planner = Planner()) -> Tensor:
    """x (…, i) → x Wᵀ + bias + (x Aᵀ) Bᵀ, (…, o), by the planned orders."""
    flat = x.reshape(-1, x.shape[-1])
    y = Contraction.apply(flat, W, A, B, bias, planner.plan(flat, A, B))
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]
