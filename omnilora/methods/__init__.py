"""The methods, found by scanning. ``ol.methods.<key>(…)`` makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def __getattr__(key: str) -> Callable[..., Any]:
    from omnilora.core.method import Methods

    return getattr(Methods(), key)


def __dir__() -> list[str]:
    from omnilora.core.method import Methods

    return dir(Methods())
