"""What copies and addresses of tensors were made from, and whether it is still that."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_

from torch import Tensor, nn


class Seen:
    """The parameters of some modules: the same objects under the same names (None stays None) at the same addresses.

    ``written``: in the same version too, for whoever holds copies of the numbers. Three things leave no trace: kernels that write
    to the memory on their own, a fused optimizer's step (:mod:`omnilora.plans.steps` counts those), writes through ``.data``.
    """

    def __init__(self, modules: Iterable[nn.Module], written: bool) -> None:
        tables = {id(m._parameters): m._parameters for m in modules}.values()
        self.tables = [table for table in tables for _ in table]
        self.names = [name for table in tables for name in table]
        self.objects = [t for table in tables for t in table.values()]
        held = [t for t in self.objects if t is not None]
        self.tellable = not any(t.is_inference() for t in held)  # tensors of inference mode have no versions
        self.tensors = held if self.tellable else []
        self.versioned = list(self.tensors) if written else []
        self.addresses, self.versions = self._addresses(), self._versions()

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))

    def _versions(self) -> list[int]:
        return [t._version for t in self.versioned]

    def still(self) -> bool:
        there = all(map(is_, map(dict.get, self.tables, self.names), self.objects))  # maps: a server asks for every layer and token
        return there and self.tellable and self._addresses() == self.addresses and self._versions() == self.versions

    @classmethod
    def joined(cls, each: Iterable[Seen]) -> Seen:
        """All of them as one, which is told in one sweep."""
        made = cls((), False)
        for seen in each:
            made.tables += seen.tables
            made.names += seen.names
            made.objects += seen.objects
            made.tensors += seen.tensors
            made.versioned += seen.versioned
            made.addresses += seen.addresses
            made.versions += seen.versions
            made.tellable = made.tellable and seen.tellable
        return made
