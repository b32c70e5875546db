"""An adapted convolution as one node: y = W * x + bias + s B (A * x), B (out, r) at every position.

Two orders of contraction. Factored: the narrow A * x, kept with x, and s B (A * x) added in place. Merged: (W + s B A) * x, where
the kernel holds fewer numbers than the images (RunLoRA's choice, for kernels) and no precision is lost by the sum; then only x
is kept, and of the backward pass only dA and dB take narrow convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnilora.core.op import Geometry
from omnilora.core.site import Base, ConvGeometry
from omnilora.plans import rules
from omnilora.plans.node import derivatives
from omnilora.plans.normal import Normal

CONV = {nn.Conv1d.forward: F.conv1d, nn.Conv2d.forward: F.conv2d, nn.Conv3d.forward: F.conv3d}
Options = tuple[Any, ...]  # stride, padding, dilation, groups


def convolved(normal: Normal, x: Tensor, geo: Geometry) -> Tensor | None:
    """y (N, *space, out), features last, where the map is low-rank terms beside a plain convolution of constants; else None."""
    base = normal.base
    if not isinstance(geo, ConvGeometry) or not isinstance(base, Base) or normal.c is not None or normal.b is not None or not normal.low:
        return None
    if geo.groups != 1 or geo.pad_mode != "zeros" or isinstance(geo.padding, str) or any(k.gates or k.p for k in normal.low):
        return None
    layer = base.layer
    weight = layer._parameters.get("weight")
    known = getattr(base.forward, "__func__", None) in CONV and not base.args and not base.kwargs and base.y is None
    if not known or type(weight) is not nn.Parameter or any(p is not None and p.requires_grad for p in layer._parameters.values()):
        return None
    if weight.dtype != x.dtype or x.dim() != weight.dim():
        return None
    a = [k.A if k.D is None else k.A * k.D.unsqueeze(-1) for k in normal.low]
    b = [k.B if len(normal.low) == 1 else k.B * k.s for k in normal.low]
    A, B = (a[0], b[0]) if len(a) == 1 else (torch.cat(a), torch.cat(b, 1))
    s = normal.low[0].s if len(a) == 1 else 1.0
    options = (geo.stride, geo.padding, geo.dilation, geo.groups)
    y: Tensor = Convolution.apply(x, weight.detach(), layer._parameters.get("bias"), A, B, s, options)
    return geo.features(y)


class Convolution(torch.autograd.Function):
    """x (N, in, *space), weight (out, in, *kernel), A (r, in · kernel), B (out, r) → y (N, out, *space)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float, options: Options) -> Tensor:
        conv, h = _conv(x), None
        if merges(x, weight, A, options):
            y = conv(x, _merged(weight, A, B, s), bias, *options)
        else:
            y = conv(x, weight, bias, *options)
            h = conv(x, _kernel(A, weight, x.dtype), None, *options)
            _add_(y, h, B.to(x.dtype), s)
        ctx.s, ctx.options = s, options
        ctx.save_for_backward(x, weight, A, B, h)
        return y

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Any, ...]:
        x, weight, A, B, h = ctx.saved_tensors
        g, needs = gs[0], ctx.needs_input_grad
        if torch.is_grad_enabled():
            def again(x: Tensor, A: Tensor, B: Tensor) -> list[Tensor]:
                return [formula(x, weight, A, B, ctx.s, ctx.options)]

            dx, dA, dB = derivatives(again, (g,), (x, A, B), (needs[0], needs[3], needs[4]))
            return dx, None, None, dA, dB, None, None
        through = dA = dB = None
        merged = h is None
        kernel = _merged(weight, A, B, ctx.s) if merged and needs[0] else weight
        dx = _back(g, x, kernel, ctx.options, (True, False))[0] if needs[0] else None
        if needs[3] or (needs[0] and not merged):
            gh = _products(B.to(g.dtype).t().expand(len(g), -1, -1), g.flatten(2), ctx.s).view(len(g), -1, *g.shape[2:])  # (N, r, *space)
            through, dA, _ = _back(gh, x, _kernel(A, weight, g.dtype), ctx.options, (needs[0] and not merged, needs[3]))
        if dx is not None and through is not None:
            dx = dx.add_(through)
        if needs[4]:
            h = _conv(x)(x, _kernel(A, weight, x.dtype), None, *ctx.options) if merged else h
            dB = _products(g.flatten(2), h.flatten(2).mT, ctx.s).sum(0).to(B.dtype)
        return dx, None, None, None if dA is None else dA.flatten(1).to(A.dtype), dB, None, None


def merges(x: Tensor, weight: Tensor, A: Tensor, options: Options) -> bool:
    """Whether (W + s B A) * x is the better order: the sum loses nothing (numbers of 24 bits or more, which the product does not
    round to fewer), and costs less than the narrow products at all positions."""
    exact = x.dtype is torch.float64 or (x.dtype is torch.float32 and _full_precision())
    if not exact or not x.is_cpu:
        return False
    stride, padding, dilation, _ = options
    positions = len(x)
    for size, kernel, step, pad, spread in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation):
        positions *= (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
    return rules.sums_kernels(positions, A, weight)


def _full_precision() -> bool:
    """Whether oneDNN's convolutions of fp32 numbers multiply fp32 numbers."""
    settings = getattr(torch.backends.mkldnn, "conv", None)  # older torch has no such setting
    return getattr(settings, "fp32_precision", "ieee") in ("none", "ieee")


def _merged(weight: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return torch.addmm(weight.flatten(1), B.to(weight.dtype), A.to(weight.dtype), alpha=s).view(weight.shape)


def _products(a: Tensor, b: Tensor, s: float) -> Tensor:
    """s a_n b_n; s is part of the products, for a pass of its own costs more."""
    return torch.baddbmm(a.new_empty(len(a), a.shape[1], b.shape[2]), a, b, beta=0, alpha=s)


def _conv(x: Tensor) -> Any:
    return (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]


def _kernel(A: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return A.to(dtype).view(A.shape[0], *weight.shape[1:])


def _points(b: Tensor, like: Tensor) -> Tensor:
    """A matrix as a convolution of kernel 1."""
    return b.reshape(*b.shape, *[1] * (like.dim() - 2))


def _add_(y: Tensor, h: Tensor, b: Tensor, s: float) -> Tensor:
    """y (N, out, *space) += s B h in place, whatever the memory format."""
    last = torch.channels_last if y.dim() == 4 else None
    if y.is_contiguous():
        y.view(*y.shape[:2], -1).baddbmm_(b.expand(len(y), *b.shape), h.flatten(2), alpha=s)
    elif last is not None and y.is_contiguous(memory_format=last):
        y.permute(0, 2, 3, 1).view(-1, y.shape[1]).addmm_(h.permute(0, 2, 3, 1).reshape(-1, h.shape[1]), b.t(), alpha=s)
    else:
        y.add_(_conv(h)(h, _points(b, h)), alpha=s)
    return y


def _back(g: Tensor, x: Tensor, weight: Tensor, options: Options, mask: tuple[bool, bool]) -> Any:
    stride, padding, dilation, groups = options
    call = torch.ops.aten.convolution_backward
    return call(g, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [*mask, False])


def formula(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, s: float, options: Options) -> Tensor:
    """The low-rank part and the base's, without the bias, by differentiable operations."""
    h = _conv(x)(x, _kernel(A, weight, x.dtype), None, *options)
    return _conv(x)(x, weight, None, *options) + s * _conv(x)(h, _points(B.to(x.dtype), x))
