"""Cross-entropy of a language model's head without its logits: chunks of learned rows, gradient in the forward pass.

    z = s V h + b,  z ← c tanh(z / c),  L = Σ_i (log Σ_j e^{z_ij} − z_{i y_i}) / n,  ∂L/∂h = s (softmax(z) − e_y) V / n

Rows whose label is masked are never multiplied by the head. Of a chunk's logits nothing outlives the chunk; what is kept for
the backward pass is ∂L/∂h of the learned rows, and the head's own gradient where the head learns. FLOPs are those of the
usual forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omnilora.errors import BadValue, RunError
from omnilora.plans.native import call, serves

MASKED = -100
CHUNK = 256  # rows of logits that exist at a time


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int = CHUNK,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T`` against ``labels``; rows with label −100 do not count.

    Args:
        hidden: (..., d).
        weight, bias: the head's, (vocabulary, d) and (vocabulary,).
        labels: (...) integers: the class of each row of ``hidden``, nothing is shifted.
        reduction: "sum", or "mean" over the learned rows.
        divisor: divide the sum by this number instead of the count of learned rows.
        softcap: c of ``c tanh(z / c)``, None for none.
        scale: factor on the logits, before the cap.
        chunk: rows of logits held at a time.

    Returns: a scalar in fp32 (fp64 for fp64 inputs); sums are taken in that type whatever the inputs' one.

    Raises:
        BadValue: shapes or options do not fit.
        RunError: a second derivative is asked for. Function transforms, forward mode and compiled code run
            :func:`plain_cross_entropy`.
    """
    _check(hidden, weight, labels, reduction, softcap, chunk)
    if reduction == "sum":
        divisor = 1.0
    labels = labels.long()
    if _transformed(hidden):
        return plain_cross_entropy(hidden, weight, labels, bias, divisor=divisor, softcap=softcap, scale=scale)
    flat, truth = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    rows = (truth != MASKED).nonzero().flatten()
    _check_classes(truth.index_select(0, rows), weight.shape[0])
    given = len(rows) if divisor is None else divisor
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    if learns:
        total: Tensor = _Chunked.apply(flat, weight, bias, truth, rows, softcap, scale, chunk)  # type: ignore[no-untyped-call]
    else:
        total, *_ = _forward(flat, weight, bias, truth, rows, softcap, scale, chunk, (False, False, False))
    return total / given


def plain_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *,
                        divisor: float | Tensor | None = None, softcap: float | None = None,
                        scale: float = 1.0) -> Tensor:  # fmt: skip
    """The same by its formula, from all logits, differentiable as often as one likes. ``divisor`` None: the mean."""
    z = F.linear(hidden, weight, bias)
    z = z.to(_wide(z.dtype)).flatten(0, -2) * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    truth = labels.reshape(-1)
    total = F.cross_entropy(z, truth, ignore_index=MASKED, reduction="sum")
    return total / ((truth != MASKED).sum() if divisor is None else divisor)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, softcap: float | None, chunk: int) -> None:
    if reduction not in ("sum", "mean"):
        raise BadValue(f"reduction = {reduction!r}.", "Give 'sum' or 'mean'.")
    if chunk < 1:
        raise BadValue(f"chunk = {chunk!r}.", "Give a number of rows ≥ 1.")
    if softcap is not None and not softcap > 0:
        raise BadValue(f"softcap = {softcap!r}.", "Give a number above 0, or None.")
    if hidden.shape[:-1] != labels.shape:
        raise BadValue(f"hidden is {tuple(hidden.shape)}, labels {tuple(labels.shape)}.", "Give a label for every row.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise BadValue(f"labels are {labels.dtype}.", "Give whole numbers: the class of each row.")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise BadValue(f"hidden is {tuple(hidden.shape)}, weight {tuple(weight.shape)}.", "Give weight as (vocabulary, d).")


def _check_classes(classes: Tensor, n: int) -> None:
    if not len(classes):
        return
    low, high = torch.stack(classes.aminmax()).tolist()
    if low < 0 or high >= n:
        raise BadValue(f"labels lie between {low} and {high}, the head knows {n} classes.",
                       f"Give labels from 0 to {n - 1}, or {MASKED} for rows that do not count.")  # fmt: skip


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _transformed(hidden: Tensor) -> bool:
    return (torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
            or torch.autograd.forward_ad.unpack_dual(hidden).tangent is not None)  # fmt: skip


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, truth: Tensor, rows: Tensor, softcap: float | None,
             scale: float, chunk: int, wanted: tuple[bool, bool, bool]
             ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(summed loss, ∂/∂hidden[rows], ∂/∂weight, ∂/∂bias), the last three where ``wanted``."""
    wide, n = _wide(hidden.dtype), len(rows)
    total = hidden.new_zeros((), dtype=wide)
    dh = hidden.new_empty(n, hidden.shape[1]) if wanted[0] else None
    dw = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    db = torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None
    native = softcap is None and (wide == hidden.dtype or (dw is None and db is None)) and _native(hidden, weight, bias)
    buffer = hidden.new_empty(min(chunk, n), weight.shape[0], dtype=hidden.dtype if native else wide)
    for start in range(0, n, chunk):
        at = rows[start : start + chunk]
        h, y = hidden.index_select(0, at), truth.index_select(0, at)
        z = buffer[: len(at)]
        if native:
            _products(z, h, weight, bias)
            losses = torch.empty(len(at), dtype=torch.float32, device="cpu")
            call("cross_entropy", z.dtype, z, y, losses, *z.shape, float(scale), int(any(wanted)))
            total += losses.sum()
        else:
            total += _sloped(z, h, y[:, None], weight, bias, softcap, scale, any(wanted))
        if dh is not None:
            part = z.to(weight.dtype) @ weight
            dh[start : start + chunk] = part if scale == 1.0 else part.mul_(scale)
        if dw is not None:
            dw.addmm_(z.T, h.to(wide), alpha=scale)
        if db is not None:
            db.add_(z.sum(0), alpha=scale)
    return total, dh, dw, db


def _native(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = [t for t in (weight, bias) if t is not None]
    plain = type(hidden) is Tensor and all(type(t) in (Tensor, nn.Parameter) and t.device == hidden.device for t in given)
    return plain and all(t.dtype == hidden.dtype for t in given) and serves(hidden)


def _sloped(z: Tensor, h: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float,
            wanted: bool) -> Tensor:  # fmt: skip
    """The summed loss of rows h with labels y (rows, 1); z becomes its slope where ``wanted``, the factor ``scale`` left out."""
    slope = _logits(z, h, weight, bias, softcap, scale)
    top = z.amax(1, keepdim=True)
    own = z.gather(1, y) - top
    z.sub_(top).exp_()
    mass = z.sum(1, keepdim=True)
    if wanted:
        z.scatter_add_(1, y, -mass).div_(mass)  # softmax − e_y
        if slope is not None:
            z.mul_(slope)
    return (mass.log() - own).sum()


def _products(z: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None and bias.dtype == z.dtype:
        torch.addmm(bias, h, weight.T, out=z)
        return
    torch.mm(h, weight.T, out=z)
    if bias is not None:
        z.add_(bias)


def _logits(z: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None,
            scale: float) -> Tensor | None:  # fmt: skip
    """Fill z (rows, vocabulary); the cap's derivative, where there is a cap."""
    if z.dtype == h.dtype:
        _products(z, h, weight, bias)
    else:
        z.copy_(F.linear(h, weight, bias))
    if scale != 1.0:
        z.mul_(scale)
    if softcap is None:
        return None
    t = torch.tanh_(z.div_(softcap))
    slope = 1 - t * t
    z.mul_(softcap)
    return slope


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, truth: Tensor, rows: Tensor,
                softcap: float | None, scale: float, chunk: int) -> Tensor:  # fmt: skip
        total, *grads = _forward(hidden, weight, bias, truth, rows, softcap, scale, chunk, ctx.needs_input_grad[:3])
        ctx.save_for_backward(rows if grads[0] is not None else None, *grads)
        ctx.shape, ctx.dtypes = hidden.shape, tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RunError("The chunked cross-entropy has no second derivative.",
                           "Take the loss from the model's own logits, or plain_cross_entropy.")  # fmt: skip
        rows, dh, dw, db = ctx.saved_tensors
        out: list[Tensor | None] = [None if t is None else (t * grad).to(d) for t, d in zip((dh, dw, db), ctx.dtypes)]
        if out[0] is not None and len(rows) < ctx.shape[0]:
            out[0] = out[0].new_zeros(ctx.shape).index_copy_(0, rows, out[0])
        return (*out, None, None, None, None, None)
