"""What every quantized linear layer shares, whatever holds its weight.   y = x · dq(Ŵ)ᵀ + b"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnilora.core.site import role_of
from omnilora.core.targets import matches
from omnilora.errors import AttachError, TargetError, nearest


@dataclass(frozen=True, eq=False)
class Dequantized:
    """dq(Ŵ) (out, in) of a layer as a value that is made wherever it is read, in the dtype that is asked for."""

    layer: QuantizedLinear
    dtype: None = None  # no tensor's

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.out_features, self.layer.in_features

    def to(self, dtype: torch.dtype) -> Tensor:
        return self.layer.dequantized(dtype)


class _Product(torch.autograd.Function):
    """x dq(Ŵ)ᵀ that dequantizes again in the backward pass instead of keeping the dense weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.layer.dequantized(ctx.dtype), None


class QuantizedLinear(nn.Linear):
    """nn.Linear whose ``weight`` holds codes; a subclass says what dq(Ŵ) is."""

    compute_dtype: torch.dtype

    @abstractmethod
    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """dq(Ŵ) (out, in), by default in ``compute_dtype``."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.requires_grad:
            y = F.linear(x, self.dequantized(x.dtype))
        else:
            y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@dataclass(frozen=True)
class Quantized:
    """What quantizing did. ``before``, ``after``: bytes of the quantized layers' weights."""

    layers: int
    parameters: int
    before: int
    after: int

    @property
    def bits(self) -> float:
        return 8 * self.after / max(self.parameters, 1)


def dense_layers(model: nn.Module, exclude: Sequence[str] = ()) -> list[tuple[str, nn.Linear]]:
    """Every plain linear layer but those of the head, routers, weights tied to an embedding, and ``exclude``.

    Raises: :class:`AttachError` on an adapted model, :class:`TargetError` where nothing is linear.
    """
    if "_omnilora" in vars(model):
        raise AttachError("The model has adapters.", "Quantize first, then adapt.")
    chosen = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear
              and role_of(n, m) not in ("head", "router") and not any(matches(p, n, m) for p in exclude)]  # fmt: skip
    if not chosen:
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        raise TargetError("No plain linear layer is left to quantize.", nearest("linear", linear))
    tied = {id(p) for n, m in model.named_modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return [(n, m) for n, m in chosen if id(m.weight) not in tied]
