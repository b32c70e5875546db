"""Maps of LyCORIS files that no other form here has — Yeh et al., ICLR 2024, arXiv:2309.14859. Read, trained and written back.

TuckerLoRA   ΔW = s B (T × A),  T (r, r, k) over the kernel
TuckerLoHa   ΔW = s B₁ (T₁ × A₁) ⊙ B₂ (T₂ × A₂)
Kronecker    ΔW = s (w₁ ⊗ w₂),  w₁ (l, m) given, each whole or factored, w₂ also in Tucker form
InputDoRA    W' = V diag(m / ‖V‖),  the norm over all that reads one input channel
WeightScale  W' = diag(l) W or W diag(l);  the bias stays
OutputOFT    W' = diag(s) blockdiag(R_i)ᵀ W,  R_i = (I + Q_i)(I − Q_i)⁻¹,  Qᵀ = −Q;  the bias stays
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Dropout, Op, chain
from omnilora.core.parameterization import (
    Factored,
    Parameterization,
    Slot,
    Tensors,
    Wrapper,
    core,
    finite,
    input_side,
    kaiming,
    magnitude,
    normal,
    one_of,
    output_side,
    positive_rank,
    zeros,
)
from omnilora.core.site import Site, replaced
from omnilora.errors import BadValue, NotExpressible
from omnilora.parameterizations.hadamard import pairs
from omnilora.parameterizations.kronecker import Kron
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.orthogonal import Blocks


def channels_of(site: Site) -> tuple[int, int]:
    """(input channels of the stored weight, columns of the matrix a channel)."""
    if site.batch:
        raise NotExpressible(f"{site.name} is a stack of weights.", "Leave it out of the targets.")
    channels = site.store.shape()[1] if site.kind == "conv" else site.fan_in
    return channels, site.fan_in // channels


def spread(T: Tensor, A: Tensor) -> Tensor:
    """T × A: (r, q, k), (q, channels) → (r, channels · k)."""
    return torch.einsum("rqk,qc->rck", T, A).flatten(1)


@dataclass(frozen=True)
class TuckerLoRA(Factored):
    """A convolution of kernel 1, one of the layer's kernel among r channels, one of kernel 1."""

    def init(self, site: Site, seen: Any = None) -> Tensors:
        channels, per = channels_of(site)
        return Tensors(A=input_side(kaiming(self.r, channels)), T=core(kaiming(self.r, self.r, per)),
                       B=output_side(zeros(site.fan_out, self.r)))  # fmt: skip

    def delta(self, p: Slot, ctx: Context) -> Op:
        return p.scale * chain(p.B, spread(p.T, p.A), Dropout(self.dropout, p.training))


@dataclass(frozen=True)
class TuckerLoHa(Factored):
    """LoHa with a core over the kernel in each half."""

    def rank(self) -> int:
        return self.r**2

    def init(self, site: Site, seen: Any = None) -> Tensors:
        channels, per = channels_of(site)
        made = Tensors()
        for i, std in (("1", 0.1), ("2", 0.0)):
            made[f"A{i}"] = input_side(normal(1.0, self.r, channels))
            made[f"T{i}"] = core(normal(0.1, self.r, self.r, per))
            made[f"B{i}"] = output_side(normal(std, site.fan_out, self.r))
        return made

    def delta(self, p: Slot, ctx: Context) -> Op:
        A1, A2 = spread(p.T1, p.A1), spread(p.T2, p.A2)
        B, A = pairs(p.B1, p.B2), pairs(A1.mT, A2.mT).mT
        return p.scale * chain(B, A, Dropout(self.dropout, p.training))


@dataclass(frozen=True)
class Kronecker(Factored):
    """``l``, ``m``: rows and columns of w₁; ``first``: "whole" or "factored"; ``second``: also "tucker". The scale is 1 where both
    are whole."""

    l: int = 1
    m: int = 1
    first: str = "whole"
    second: str = "whole"

    def check(self) -> None:
        super().check()
        positive_rank(self.l, "l")
        positive_rank(self.m, "m")
        one_of(self.first, "first", "whole", "factored")
        one_of(self.second, "second", "whole", "factored", "tucker")

    def rank(self) -> int:
        return 0

    def first_scale(self, site: Site) -> float:
        return 1.0 if self.first == self.second == "whole" else self.alpha / self.r

    def init(self, site: Site, seen: Any = None) -> Tensors:
        (channels, per), r = channels_of(site), self.r
        if site.fan_out % self.l or channels % self.m:
            raise NotExpressible(f"{site.name} of {site.fan_out} × {channels} channels is no product with a "
                                 f"{self.l} × {self.m} matrix.", "Give divisors.")  # fmt: skip
        k, n, made = site.fan_out // self.l, channels // self.m, Tensors()
        if self.first == "whole":
            made["w1"] = core(kaiming(self.l, self.m))
        else:
            made["w1a"], made["w1b"] = output_side(kaiming(self.l, r)), input_side(kaiming(r, self.m))
        if self.second == "whole":
            made["w2"] = core(zeros(k, n * per))
        else:
            tucker = self.second == "tucker"
            made["w2a"] = output_side(kaiming(k, r))
            made["w2b"] = input_side(zeros(r, n if tucker else n * per))
            if tucker:
                made["t2"] = core(kaiming(r, r, per))
        return made

    def delta(self, p: Slot, ctx: Context) -> Op:
        w1 = p.w1 if self.first == "whole" else p.w1a @ p.w1b
        w2 = p.w2 if self.second == "whole" else p.w2a @ (spread(p.t2, p.w2b) if self.second == "tucker" else p.w2b)
        return p.scale * chain(Kron(w1, w2), Dropout(self.dropout, p.training))


def channel_norms(V: Tensor, channels: int) -> Tensor:
    """(out, channels · k) → (channels,)"""
    return V.unflatten(-1, (channels, -1)).square().sum((0, 2)).clamp_min(1e-24).sqrt()


@dataclass(frozen=True)
class InputDoRA(Wrapper):
    """DoRA with one magnitude for each input channel: LyCORIS files of before its per-output default."""

    inner: Parameterization = LoRA()
    detach_norm: bool = False
    reads_weight = True

    @property
    def exact_gradient(self) -> bool:
        return not self.detach_norm and self.inner.exact_gradient

    def init(self, site: Site, seen: Any = None) -> Tensors:
        channels, _ = channels_of(site)
        wide = site.W.dense().detach()
        return Tensors(inner=self.inner.init(site, seen),
                       m=core(channel_norms(wide if wide.dtype == torch.float64 else wide.float(), channels)))  # fmt: skip

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        V = self.inner.adapt(W, p.inner, ctx).dense()
        wide = V if V.dtype == torch.float64 else V.float()
        n = channel_norms(wide, p.m.shape[0])
        ratio = p.m / (n.detach() if self.detach_norm else n)
        return replaced(W, wide * ratio.repeat_interleave(wide.shape[-1] // p.m.shape[0]))


@dataclass(frozen=True)
class WeightScale(Parameterization):
    """LyCORIS' (IA)³: it rescales the weight and leaves the bias, on the "output" or the "input" ``side``."""

    side: str = "output"

    def check(self) -> None:
        one_of(self.side, "side", "output", "input")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        channels, _ = channels_of(site)
        if self.side == "output":
            return Tensors(l=magnitude(torch.ones(site.fan_out)))
        return Tensors(l=core(torch.ones(channels)))

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        if self.side == "output":
            return chain(p.l, W.linear).shift(W.offset)
        if p.site.geometry.plain:
            return chain(W, p.l)
        return replaced(W, W.dense().detach() * p.l.repeat_interleave(p.site.fan_in // p.l.shape[0]))


@dataclass(frozen=True)
class OutputOFT(Parameterization):
    """LyCORIS' and kohya's OFT: rotations of the outputs, Q = X − Xᵀ of a stored X (n, block, block). ``constraint``: c, the
    norm of Q is at most c · outputs (0: no bound). ``rescaled``: s learns."""

    block: int = 4
    constraint: float = 0.0
    rescaled: bool = False

    def check(self) -> None:
        positive_rank(self.block, "block")
        finite(self.constraint, "constraint", 0.0)
        if self.block < 2:
            raise BadValue(f"block = {self.block!r}.", "A rotation needs two features: give at least 2.")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if site.fan_out % self.block or site.batch:
            raise NotExpressible(f"{site.name} has {site.fan_out} outputs, no multiple of {self.block}.",
                                 "Give a divisor, or leave it out.")  # fmt: skip
        made = Tensors(X=core(zeros(site.fan_out // self.block, self.block, self.block)))
        return Tensors({**made, "s": magnitude(torch.ones(site.fan_out))}) if self.rescaled else made

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        Q, I = p.X - p.X.mT, torch.eye(self.block, dtype=p.X.dtype, device=p.X.device)
        if self.constraint:
            Q = Q * (self.constraint * p.X[..., 0].numel() / (Q.norm() + 1e-8)).clamp_max(1.0)
        R = torch.linalg.solve(I - Q, I + Q, left=False)
        turned = chain(p.s, Blocks(R.mT), W.linear) if self.rescaled else chain(Blocks(R.mT), W.linear)
        return replaced(W, turned.dense()) if p.site.geometry.separate else turned.shift(W.offset)
