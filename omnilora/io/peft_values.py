"""Figures of an adapter as PEFT's configuration holds them: one value, or a default and patterns."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from omnilora.errors import BadValue, NotExpressible


def one(adapted: Mapping[str, Any], what: str, values: Mapping[str, Any]) -> Any:
    """The value that all sites share. Raises NotExpressible where PEFT has one for the adapter and we have several."""
    first = next(iter(values), None)
    for name, value in values.items():
        if value != values[first]:
            raise NotExpressible(f"{name} has {what} {value!r}, {first} has {values[first]!r}; PEFT has one for all.")
    return None if first is None else values[first]


def alpha_for(scale: float, divisor: float) -> float:
    """α with α / divisor == scale, to the last bit where a float exists; whole numbers as integers."""
    guess = scale * divisor
    for alpha in (float(round(guess)), guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf)):
        if alpha / divisor == scale:
            return int(alpha) if alpha.is_integer() else alpha
    return guess


def patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """(the most frequent value, {anchored path: value} of the others)."""
    counts = Counter(values.values())
    default = min(counts, key=lambda v: (-counts[v], v))
    return default, {f"^{re.escape(n)}": v for n, v in values.items() if v != default}


def matched(found: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the path."""
    for pattern, value in (found or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", key):
                return value
        except re.error as error:
            raise BadValue(f"The pattern {pattern!r} is no regular expression: {error}.") from error
    return (found or {}).get(key, default)


def targeted(wanted: Any, module: str) -> bool:
    """PEFT's rule for target_modules and its like: an expression for the whole path, or ends of paths."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == w or module.endswith(f".{w}") for w in wanted or ())
