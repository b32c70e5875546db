"""Weights held by other libraries: read exactly, never written. Merging gives a dense copy beside them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omnilora.core.store import Store, register
from omnilora.stores import bnb


class BitsAndBytes(Store):
    """bitsandbytes' Linear4bit and Linear8bitLt."""

    exact = False

    def prepare(self) -> None:
        # an eval forward on a CPU with AVX512-BF16 would repack the weight and then cut gradients in training
        bnb.keep_layout(self.layer)

    def read(self) -> Tensor:
        return bnb.dequantized(self.layer)

    def shape(self) -> tuple[int, ...]:
        return (self.layer.out_features, self.layer.in_features)  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


class SelfDequantizing(Store):
    """A tensor subclass that gives its values by ``dequantize()`` (torchao's weight-only tensors)."""

    exact = False

    def read(self) -> Tensor:
        value: Tensor = self.parameter.dequantize()
        return value

    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {self.name: self.read()}


def _is_bnb(layer: nn.Module, name: str) -> bool:
    return name == "weight" and bnb.bits_of(layer) is not None


def _dequantizes(layer: nn.Module, name: str) -> bool:
    value = layer._parameters.get(name)
    kind = type(value.data) if value is not None else Tensor
    return kind not in (Tensor, nn.Parameter) and "torchao" in kind.__module__


register(_is_bnb, BitsAndBytes)
register(_dequantizes, SelfDequantizing)
