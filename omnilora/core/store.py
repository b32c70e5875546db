"""How a base weight is held: a tensor, or anything that can give one back.

A store reads a tensor in the layer's stored layout, tells its own shape without reading, and writes where it can.
New backends register a store with :func:`register`; nothing else in the library asks what kind of weight it is.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from omnilora.core.standin import outermost, own_class
from omnilora.errors import NotMergeable, StateMismatch, UnknownName, nearest

if TYPE_CHECKING:
    from omnilora.core.op import Op
    from omnilora.core.site import Site


class Store(ABC):
    """The weight ``name`` of ``layer``."""

    dense = False  # True: a plain tensor of the stored layout
    exact = True  # False: writing loses precision beyond the dtype's rounding (a quantizer)
    linear = False  # layers with this store are linear layers, whatever their class

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

    def absorb(self, change: Op, site: Site) -> bool:
        """Fold W + change in exactly where the store can, without rounding W again; False: it cannot, nothing moved."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors themselves: what a fingerprint hashes and an unmerge restores."""
        return {self.name: self.parameter}

    @property
    def form(self) -> str:
        """What the stored bytes are called in counts; "": each tensor's dtype."""
        return ""

    @property
    def offset(self) -> Tensor | None:
        """What the layer adds to its product, (out,)."""
        value: Tensor | None = self.layer._parameters.get("bias")
        return value

    # -- weights that an adapter carries -------------------------------------------------------------------------------

    @property
    def carried(self) -> bool:
        """Whether the original base does not give these tensors again: they are saved with every adapter on the layer."""
        return False

    @property
    def origin(self) -> Any:
        """The fingerprint of the original weight behind a carried one, where it is known."""
        return None

    def describe(self) -> dict[str, Any]:
        """Plain data from which ``restored`` knows what the saved tensors mean."""
        return {}

    @classmethod
    def restored(cls, layer: nn.Module, said: Mapping[str, Any], tensors: Mapping[str, Tensor],
                 origin: Any = None) -> Callable[[], None]:  # fmt: skip
        """Check saved tensors of this store against ``layer``; what comes back puts them there and cannot fail."""
        raise StateMismatch(f"A {cls.__name__} cannot be restored from a file.", "The file is damaged or newer.")

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

    def write(self, value: Tensor) -> None:
        with torch.no_grad():
            self.parameter.copy_(value.to(self.parameter.dtype))


Matcher = Callable[[nn.Module, str], bool]
_backends: list[tuple[Matcher, type[Store]]] = []


def register(matches: Matcher, store: type[Store]) -> None:
    """``matches(layer, parameter name)`` decides; the last registered backend is asked first."""
    _backends.insert(0, (matches, store))


_imported = False
PLAIN = frozenset({nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d})  # themselves, with a plain parameter: no backend


def _import_backends() -> None:
    global _imported
    _imported = True
    for module in ("omnilora.stores.nf4_layer", "omnilora.stores.coded", "omnilora.stores.foreign"):
        importlib.import_module(module)


def store_named(name: str) -> type[Store]:
    """A registered store by the name of its class."""
    if not _imported:
        _import_backends()
    known = {store.__name__: store for _, store in _backends}
    if name not in known:
        raise UnknownName(f"No store {name!r}.", nearest(name, known))
    return known[name]


def store_of(layer: nn.Module, name: str = "weight") -> Store:
    """The store of a layer's parameter."""
    own = own_class(layer) if outermost(layer) else type(layer)
    if own in PLAIN and type(layer._parameters.get(name)) is nn.Parameter:
        return Dense(layer, name)
    if not _imported:
        _import_backends()
    for matches, store in _backends:
        if matches(layer, name):
            return store(layer, name)
    return Dense(layer, name)
