from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from omnilora import proofs
from omnilora.contract import shake
from omnilora.core.attach import adapt, slots
from omnilora.core.method import Card, Claim, Method
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.run_lora import RunLoRA
from omnilora.plans.contraction import BACKWARD, FORWARD, Contraction, Plan

CARD = Card(
    key="run_lora",
    title="Run LoRA Run: Faster and Lighter LoRA Implementations",
    section="foundations",
    kind="kernel",
    equation=r"y = xW + (xU)V = x(W + UV),\quad dU = x^\top(dy\,V^\top) = (x^\top dy)V^\top,\quad "
    r"dV = (xU)^\top dy = U^\top(x^\top dy),\quad dx = dy\,W^\top + (dy\,V^\top)U^\top = dy\,(W + UV)^\top",
    purpose="LoRA's forward and backward by the cheapest of their equal orders, with nothing saved but x, W, U and V.",
    arxiv="2312.03415",
    tags=frozenset({"zero_at_init", "mergeable", "low_rank", "additive", "trains_lm", "rows"}),
    defaults={"by": "flops"},
    cases=({"r": 3, "alpha": 5.0}, {"r": 2, "alpha": 3.0, "by": "time"}),
    differs=(
        "F3 and F4 are F1 and F2 with another order of the sum or a batched product: not offered.",
        "In half precision no order that forms W + UV is taken: the sum would round the change away.",
    ),
    agreement=("Autograd over x W + (x U) V: all sixteen pairs of orders, fp64, 1e-12; FLOPs equal to torch's counter.",),
    limits=(
        "On dense linear layers with a frozen bias, without active dropout. 4-bit layers, convolutions, mixed batches, autocast, "
        "compiled code and function transforms run the tree.",
        "by='time' measures each shape once, lengths rounded up to powers of two, and the choice may differ between machines: "
        "results then differ by rounding.",
    ),
)


def run_lora(r: int = 8, alpha: float = 16.0, dropout: float = 0.0, by: str = "flops") -> Method:
    """LoRA whose products are contracted in the order that is cheapest for each layer. ``by``: "flops" or "time"."""
    return Method("run_lora", RunLoRA(r, alpha, dropout, by=by))


def _orders(broken: bool) -> float:
    """Largest relative gap of any pair of orders to autograd in fp64: value and three gradients (broken: W + UV is formed in
    bf16, as a half-precision base would)."""
    t, i, o, r = 9, 7, 5, 3
    x, W, A, B, dy = (torch.randn(s, dtype=torch.float64) for s in ((t, i), (o, i), (r, i), (o, r), (t, o)))

    def gradients(y: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y, (x, A, B), dy)]

    for v in (x, A, B):
        v.requires_grad_()
    want = gradients(x @ W.t() + (x @ A.t()) @ B.t())
    worst = 0.0
    for f in FORWARD:
        for b in BACKWARD:
            y = x @ (W + B @ A).bfloat16().double().t() if broken else Contraction.apply(x, W, A, B, None, Plan(f, b))
            worst = max(worst, *(proofs.relative(g, w) for g, w in zip(gradients(y), want)))
    return worst


def _adapted(broken: bool) -> tuple[proofs.Stack, Tensor]:
    """A layer of width 128 under rank 64, and 1024 tokens: the paper's t = 8192, i = o = 1024, r = 512, an eighth of each."""
    model = proofs.Stack(128, 128)
    how = LoRA(64, 64.0) if broken else RunLoRA(64, 64.0)
    adapt(model, Method("x", how))
    shake(model)
    return model, torch.randn(1024, 128, requires_grad=True)


def _flops(broken: bool) -> float:
    """FLOPs of a step over those of the order F1 and B1, counted (broken: LoRA as autograd runs it)."""
    model, x = _adapted(broken)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place}) as counter:
        model(x).sum().backward()
    t, i, o, r = 1024, 128, 128, 64
    return counter.get_total_flops() / (4 * t * i * o + 8 * t * i * r + 6 * t * r * o)


def _in_place(_: Any, a: torch.Size, b: torch.Size, **__: Any) -> int:
    """FLOPs of y += a b, which torch's counter does not know."""
    return 2 * a[0] * a[1] * b[1]


def _saved(broken: bool) -> float:
    """Numbers kept for the backward pass besides x and the weights (broken: LoRA as autograd runs it)."""
    model, x = _adapted(broken)
    (s,) = slots(model)
    known = {v.untyped_storage().data_ptr() for v in (x, s.A, s.B, model.layers[0].weight)}
    kept: dict[int, int] = {}

    def pack(v: Tensor) -> Tensor:
        kept[v.untyped_storage().data_ptr()] = v.numel()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        model(x)
    return float(sum(n for at, n in kept.items() if at not in known))


def claims() -> list[Claim]:
    return [
        Claim("every order", "two forward and eight backward orders equal autograd", _orders, lambda f: f < 1e-12,
              "W + UV formed in bf16"),
        Claim("fewer products", "at high rank a step takes less than 0.75 of LoRA's FLOPs", _flops, lambda f: f < 0.75,
              "LoRA as autograd runs it"),
        Claim("nothing else is saved", "x, W, U and V are all that is kept for the backward pass", _saved, lambda f: f == 0,
              "LoRA as autograd runs it"),
    ]  # fmt: skip
