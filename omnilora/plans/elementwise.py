"""The elementwise parts of fused passes: native where the library can be built, in PyTorch with the same numbers elsewhere.

Two-dimensional tensors (tokens, features), contiguous. None of them is differentiable by itself: nodes call them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omnilora.plans.native import call, serves


def wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def rms_forward(x: Tensor, w: Tensor, eps: float, shift: float = 0.0, between: bool = True) -> tuple[Tensor, Tensor]:
    """(w + shift) ⊙ x / √(mean x² + eps) and 1/√… (tokens,). ``between``: x / √… is rounded before w meets it (Llama)."""
    if serves(x, w):
        y, rstd = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        call("rms_forward", x.dtype, x, w, y, rstd, *x.shape, eps, shift, int(between))
        return y, rstd
    xw = wide(x)
    rstd = torch.rsqrt(xw.square().mean(-1) + eps)
    return normalized(x, w, rstd, shift, between), rstd


def normalized(x: Tensor, w: Tensor, rstd: Tensor, shift: float = 0.0, between: bool = True) -> Tensor:
    y = wide(x) * rstd.unsqueeze(-1)
    if between:
        return w * y.to(x.dtype) if shift == 0.0 else (wide(w) + shift).to(x.dtype) * y.to(x.dtype)
    return (y * (wide(w) + shift)).to(x.dtype)


def rms_backward(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, add: Tensor | None = None, shift: float = 0.0) -> Tensor:
    """dx = rstd (v − x̂ mean(v ⊙ x̂)) + add with v = (w + shift) ⊙ dy and x̂ = x · rstd."""
    if serves(dy, x, w) and (add is None or serves(add, x)):
        dx = torch.empty_like(x)
        call("rms_backward", x.dtype, dy, x, w, rstd, add, dx, *x.shape, shift)
        return dx
    r = rstd.unsqueeze(-1)
    v, xh = wide(dy) * (wide(w) + shift), wide(x) * r
    dx = r * (v - xh * (v * xh).mean(-1, keepdim=True))
    return (dx if add is None else dx + wide(add)).to(x.dtype)


def gated(g: Tensor, u: Tensor, act: str = "silu") -> Tensor:
    """act(g) ⊙ u, act "silu" or "gelu_tanh"."""
    if act == "gelu_tanh":
        return F.gelu(g, approximate="tanh") * u
    if serves(g, u):
        p = torch.empty_like(g)
        call("swiglu_forward", g.dtype, g, u, p, g.numel())
        return p
    return F.silu(g) * u


def gated_backward(dp: Tensor, g: Tensor, u: Tensor, act: str = "silu", spent: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(dg, du, p) from dp; ``spent``: dp is read by nobody else, and its memory may be used again."""
    if act == "gelu_tanh":
        on = F.gelu(g, approximate="tanh")
        return torch.ops.aten.gelu_backward(dp * u, g, approximate="tanh"), dp * on, on * u
    if serves(dp, g, u):
        dg, du, p = torch.empty_like(g), dp if spent else torch.empty_like(g), torch.empty_like(g)
        call("swiglu_backward", g.dtype, dp, g, u, dg, du, p, g.numel())
        return dg, du, p
    s = torch.sigmoid(wide(g))
    silu = wide(g) * s
    dg = wide(dp) * wide(u) * (s * (1 + wide(g) * (1 - s)))
    return dg.to(g.dtype), (wide(dp) * silu).to(g.dtype), silu.to(g.dtype) * u


def rope(x: Tensor, cosine: Tensor, sine: Tensor, into: Tensor | None = None, back: bool = False) -> Tensor:
    """Rotate x (batch, length, heads, d) by tables (batch or 1, length, d); ``back``: by the transposed map. ``into`` (contiguous)
    may be x itself; the result is contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if into is None else into
    batch, length, heads, d = x.shape
    if serves(y, cosine, sine) and x.dtype == y.dtype and x.device == y.device and x.stride(-1) == 1:
        table = 0 if cosine.shape[0] == 1 else length * d
        call("rope", y.dtype, x, y, cosine, sine, batch, length, heads, d, *x.stride()[:3], table, int(back))
        return y
    return y.copy_(rotated(x, cosine, sine, back))


def rotated(x: Tensor, cosine: Tensor, sine: Tensor, back: bool = False) -> Tensor:
    """The same by differentiable operations."""
    c, s = cosine.unsqueeze(2), sine.unsqueeze(2)
    if back:
        low, high = (x * s).chunk(2, -1)
        return x * c + torch.cat((high, -low), -1)
    low, high = x.chunk(2, -1)
    return x * c + torch.cat((-high, low), -1) * s


# -- dropout that is made again from its seed -----------------------------------------------------------------------------

Seed = tuple[int, int]


def draw_seed() -> Seed:
    """Two words of torch's own CPU generator, so that ``torch.manual_seed`` and checkpoints of its state repeat the masks."""
    a, b = torch.randint(0, 2**32, (2,)).tolist()
    return a, b


def _limit(p: float) -> int:
    return min(round(p * 2**32), 2**32 - 1)


def kept(shape: torch.Size, seed: Seed, p: float, device: torch.device) -> Tensor:
    """Which entries stay: True with probability 1 − p, a hash of the position and the seed."""
    i = torch.arange(shape.numel(), device=device) & 0xFFFFFFFF

    def times(h: Tensor, k: int) -> Tensor:
        return (h * k) & 0xFFFFFFFF  # products wrap at 64 bits, the low 32 are right

    h = times(i, 0x9E3779B1) ^ seed[0]
    h = times(h ^ (h >> 16), 0x7FEB352D)
    h = times((h ^ (h >> 15)) + seed[1], 0x846CA68B)
    h = times(h ^ (h >> 16), 0xC2B2AE35)
    return ((h ^ (h >> 15)) >= _limit(p)).view(shape)


def drop(x: Tensor, seed: Seed, p: float) -> Tensor:
    """x / (1 − p) where it stays, 0 elsewhere."""
    scale = 1 / (1 - p)
    if serves(x):
        y = torch.empty_like(x)
        call("drop", x.dtype, x, y, x.numel(), *seed, _limit(p), scale)
        return y
    return torch.where(kept(x.shape, seed, p, x.device), x * scale, 0.0)


def drop_add_(to: Tensor, v: Tensor, seed: Seed, p: float) -> Tensor:
    """to += v / (1 − p) where it stays."""
    scale = 1 / (1 - p)
    if serves(to, v):
        call("drop_add", to.dtype, v, to, to.numel(), *seed, _limit(p), scale)
        return to
    return to.add_(torch.where(kept(v.shape, seed, p, v.device), v * scale, 0.0))


# -- magnitudes --------------------------------------------------------------------------------------------------------------


def away(c: Tensor) -> Tensor:
    """c in fp32 or wider, kept from 0 by 1e-20, so that y / c always tells z."""
    c = wide(c)
    return torch.where(c.abs() < 1e-20, 1e-20, c)


def magnify_(y: Tensor, c: Tensor) -> Tensor:
    """y = away(c) ⊙ y in place; c (out,)."""
    if c.dtype == torch.float32 and c.is_contiguous() and serves(y):
        call("scale_columns", y.dtype, y, c, y, *y.shape)
        return y
    return y.mul_(away(c).to(y.dtype))


def magnify_backward(g: Tensor, y: Tensor, c: Tensor, divided: bool) -> tuple[Tensor, Tensor]:
    """(away(c) ⊙ g, Σ over tokens of g ⊙ y, over away(c) where ``divided``), the sum in fp32 or wider."""
    if c.dtype == torch.float32 and c.is_contiguous() and serves(g, y):
        gz, total = torch.empty_like(g), torch.empty(g.shape[1], dtype=torch.float32, device=g.device)
        call("scale_backward", g.dtype, g, y, c, gz, total, *g.shape, int(divided))
        return gz, total
    c = away(c)
    total = (wide(g) * wide(y)).sum(0)
    return g * c.to(g.dtype), total / c if divided else total


def low_rank_squares(w: Tensor, u: Tensor, b: Tensor, a: Tensor) -> Tensor | None:
    """Squared norms (out,) of the rows of W + B A from ‖W‖² (out,), W Aᵀ (out, r), B and A, constant; None: not by a kernel."""
    if torch.is_grad_enabled() or b.dim() != 2 or b.dtype != torch.float32 or not serves(w, u, b):
        return None
    n = torch.empty_like(w)
    call("low_rank_squares", w.dtype, w, u, b, a @ a.t(), n, *b.shape)
    return n
