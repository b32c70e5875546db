"""A context that tells nothing: whoever looks at it, or reports to it, has a map that is not one for all calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from omnilora.core.context import Context


class Looked(Exception):
    """A form read the context or reported to it."""


@dataclass(frozen=True, eq=False)
class Blind(Context):
    def get(self, key: str, default: Any = None) -> Any:
        raise Looked(key)

    def emit(self, site: str, name: str, value: Tensor) -> None:
        raise Looked(name)
