"""Weights held by other libraries: read exactly, never written. Merging gives a dense copy beside them.

Layers are recognised by the class names of their libraries, or by the buffers they hold; nothing is imported before.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.store import Store, register
from omnilora.stores import awq, bnb, gptq


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


class Hqq(Store):
    """HQQLinear (hqq 0.2.8): codes ``W_q``, scales and zeros in ``meta``. Its bias is a plain attribute."""

    layer: Any
    exact = False
    linear = True

    def read(self) -> Tensor:
        value: Tensor = self.layer.dequantize().detach()
        return value

    def shape(self) -> tuple[int, ...]:
        return (self.layer.out_features, self.layer.in_features)

    def tensors(self) -> dict[str, Tensor]:
        scaling = {k: v for k, v in self.layer.meta.items() if isinstance(v, Tensor)}
        return {"W_q": self.layer.W_q.data, **scaling}

    @property
    def parameter(self) -> Tensor:
        value: Tensor = self.layer.W_q
        return value

    @property
    def offset(self) -> Tensor | None:
        value: Tensor | None = self.layer.bias
        return value

    @property
    def dtype(self) -> torch.dtype:
        value: torch.dtype = self.layer.compute_dtype
        return value


class Gguf(Store):
    """transformers' GgufLinear (5.23): GGUF blocks (out, bytes of a row), inputs possibly permuted; it computes in its
    input's dtype. Its kernel for at most 8 rows may pass no gradient; what more rows use does."""

    layer: Any
    exact = False
    linear = True

    def read(self) -> Tensor:
        home = next(c.__module__ for c in type(self.layer).__mro__ if c.__name__ == "GgufLinear")
        out, inn = self.shape()
        value: Tensor = importlib.import_module(home).dequantize_blocks(
            self.layer.weight.data, self.layer.ggml_type, out, inn, torch.float32)  # fmt: skip
        order = self.layer.input_permutation  # y = x[order] Wᵀ
        return value if order is None else torch.empty_like(value).index_copy_(1, order, value)

    def shape(self) -> tuple[int, ...]:
        return (self.layer.out_features, self.layer.in_features)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


class Gptq(Store):
    """The layers of AutoGPTQ, GPTQModel and optimum. By layout, not run with the libraries: :mod:`omnilora.stores.gptq`."""

    exact = False
    linear = True
    dequantized = staticmethod(gptq.dequantized)

    def read(self) -> Tensor:
        value: Tensor = self.dequantized(self.layer)
        return value

    def shape(self) -> tuple[int, ...]:
        return (self._held["scales"].shape[1], self._inputs())

    def _inputs(self) -> int:
        return int(self._held["g_idx"].numel())

    @property
    def _held(self) -> dict[str, Tensor]:
        return self.layer._buffers  # type: ignore[return-value]

    def tensors(self) -> dict[str, Tensor]:
        return {k: self._held[k] for k in ("qweight", "qzeros", "scales", "g_idx") if self._held.get(k) is not None}

    @property
    def parameter(self) -> Tensor:
        return self._held["qweight"]

    @property
    def offset(self) -> Tensor | None:
        held = {**self.layer._parameters, **self.layer._buffers}
        return held.get("bias")

    @property
    def dtype(self) -> torch.dtype:
        return self._held["scales"].dtype


class Awq(Gptq):
    """AutoAWQ's WQLinear_GEMM and layers of its layout. By layout, not run with the library: :mod:`omnilora.stores.awq`."""

    dequantized = staticmethod(awq.dequantized)

    def _inputs(self) -> int:
        return int(self._held["qweight"].shape[0])


def _class_names(layer: nn.Module) -> set[str]:
    return {c.__name__ for c in type(layer).__mro__}


def _is_bnb(layer: nn.Module, name: str) -> bool:
    return name == "weight" and bnb.bits_of(layer) is not None


def _is_hqq(layer: nn.Module, name: str) -> bool:
    return name == "weight" and "HQQLinear" in _class_names(layer)


def _is_gguf(layer: nn.Module, name: str) -> bool:
    return name == "weight" and "GgufLinear" in _class_names(layer)


def _is_gptq(layer: nn.Module, name: str) -> bool:
    return name == "weight" and layer._buffers.keys() >= {"qweight", "qzeros", "scales", "g_idx"}


def _is_awq(layer: nn.Module, name: str) -> bool:
    held = layer._buffers
    return name == "weight" and held.keys() >= {"qweight", "qzeros", "scales"} and "g_idx" not in held


def _dequantizes(layer: nn.Module, name: str) -> bool:
    value = layer._parameters.get(name)
    kind = type(value.data) if value is not None else Tensor
    return kind not in (Tensor, nn.Parameter) and "torchao" in kind.__module__


register(_is_bnb, BitsAndBytes)
register(_dequantizes, SelfDequantizing)
register(_is_hqq, Hqq)
register(_is_gguf, Gguf)
register(_is_gptq, Gptq)
register(_is_awq, Awq)
