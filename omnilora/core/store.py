"""How a base weight is held: a tensor, or anything that can give one back.

A store reads a tensor in the layer's stored layout, tells its own shape without reading, and writes where it can.
New backends register a store with :func:`register`; nothing else in the library asks what kind of weight it is.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from omnilora.errors import NotMergeable


class Store(ABC):
    """The weight ``name`` of ``layer``."""

    dense = False  # True: a plain tensor of the stored layout
    exact = True  # False: writing loses precision beyond the dtype's rounding (a quantizer)

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name

    @abstractmethod
    def read(self) -> Tensor:
        """The weight that the layer multiplies with, stored layout. Differentiable for plain tensors."""

    @abstractmethod
    def shape(self) -> tuple[int, ...]: ...

    def prepare(self) -> None:
        """Called once before an adapter is put on the layer."""

    def write(self, value: Tensor) -> None:
        raise NotMergeable(f"{type(self.layer).__name__}.{self.name} cannot be written.", "Merge into a dense copy.")

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors themselves: what a fingerprint hashes and an unmerge restores."""
        return {self.name: self.parameter}

    @property
    def parameter(self) -> Tensor:
        value: Tensor = self.layer._parameters[self.name]  # type: ignore[assignment]
        return value

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layer computes in."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        return self.parameter.device


class Dense(Store):
    """A plain tensor."""

    dense = True

    def read(self) -> Tensor:
        return self.parameter

    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    def prepare(self) -> None:
        """Called once before an adapter is put on the layer."""

    def write(self, value: Tensor) -> None:
        with torch.no_grad():
            self.parameter.copy_(value.to(self.parameter.dtype))


Matcher = Callable[[nn.Module, str], bool]
_backends: list[tuple[Matcher, type[Store]]] = []


def register(matches: Matcher, store: type[Store]) -> None:
    """``matches(layer, parameter name)`` decides; the last registered backend is asked first."""
    _backends.insert(0, (matches, store))


_imported = False


def _import_backends() -> None:
    global _imported
    _imported = True
    for module in ("omnilora.stores.nf4_layer", "omnilora.stores.foreign"):
        importlib.import_module(module)


def store_of(layer: nn.Module, name: str = "weight") -> Store:
    """The store of a layer's parameter."""
    if not _imported:
        _import_backends()
    for matches, store in _backends:
        if matches(layer, name):
            return store(layer, name)
    return Dense(layer, name)
