"""What copies and addresses of tensors were made from, and whether it is still that."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Seen:
    """The parameters of some modules: the same objects under the same names (None stays None) at the same addresses.

    ``written``: in the same version too, for whoever holds copies of the numbers. Three things leave no trace: kernels that write
    to the memory on their own, a fused optimizer's step (:mod:`omnilora.plans.steps` counts those), writes through ``.data``.
    """

    def __init__(self, modules: Iterable[nn.Module], written: bool) -> None:
        self.entries: list[tuple[dict[str, Tensor | None], str, Tensor | None, int, int]] = []
        self.tellable = True  # whether changes can be told at all: tensors of inference mode have no versions
        for table in {id(m._parameters): m._parameters for m in modules}.values():
            for name, t in table.items():
                if t is None:
                    self.entries.append((table, name, None, 0, -1))
                    continue
                if t.is_inference():
                    self.tellable = False
                    continue
                self.entries.append((table, name, t, t.data_ptr(), t._version if written else -1))

    def still(self) -> bool:
        for table, name, t, address, version in self.entries:
            if table.get(name) is not t:
                return False
            if t is not None and (t.data_ptr() != address or (version >= 0 and t._version != version)):
                return False
        return self.tellable
