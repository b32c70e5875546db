"""Every method's claims, and the controls that must fail them."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from omnilora.core.method import Claim, Entry, entries, entry
from omnilora.errors import UnknownName, nearest


@dataclass(frozen=True)
class Result:
    """One check. ``passed`` of a control: the claim fails without the method's special part, as it must.

    ``figure`` is None where the check raised; ``message`` then says what. ``threads``: of torch, in this check.
    """

    key: str
    check: str
    passed: bool
    figure: float | None
    seconds: float
    says: str = ""
    message: str = ""
    threads: int = 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def selected(keys: Sequence[str] | None = None, section: str | None = None) -> list[Entry]:
    """The entries that ``keys`` and ``section`` choose, by section and key. Unknown names raise with the nearest."""
    chosen = [entry(k) for k in dict.fromkeys(keys)] if keys else list(entries().values())
    if section is not None:
        known = {e.card.section for e in entries().values()}
        if section not in known:
            raise UnknownName(f"No section {section!r}.", nearest(section, known))
        chosen = [e for e in chosen if e.card.section == section]
    return sorted(chosen, key=lambda e: (e.card.section, e.card.key))


def verify(
    keys: Sequence[str] | None = None,
    section: str | None = None,
    controls: bool = False,
    slow: bool = False,
    progress: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run claims, each from the same seed.

    Args:
        keys: of methods; None: all.
        section: of the survey; None: all.
        controls: also measure every claim without the method's special part, where it must fail.
        slow: also run claims that take long.
        progress: called with each result as it comes.

    Returns: one result for each check, in the order of the methods. An entry without claims, or whose claims cannot
    be listed, gives one failed result.
    """
    out: list[Result] = []

    def note(result: Result) -> None:
        out.append(result)
        if progress is not None:
            progress(result)

    for e in selected(keys, section):
        key = e.card.key
        began = time.perf_counter()
        try:
            claims = list(e.claims())
            message = "" if claims else "The entry has no claims."
        except Exception as error:
            claims, message = [], _said(error)
        if not claims:
            spent = time.perf_counter() - began
            note(Result(key, "has claims", False, None, spent, message=message, threads=torch.get_num_threads()))
        for claim in claims:
            if claim.slow and not slow:
                continue
            note(_check(key, claim, broken=False))
            if controls:
                note(_check(key, claim, broken=True))
    return out


def slow_claims(keys: Sequence[str] | None = None, section: str | None = None) -> int:
    """How many claims run only with ``slow``."""
    return sum(c.slow for e in selected(keys, section) for c in e.claims())


def _check(key: str, claim: Claim, broken: bool) -> Result:
    """Measure and judge one claim, intact or broken, without touching the caller's random state."""
    name = f"control: {claim.name}" if broken else claim.name
    says = f"fails with {claim.control}" if broken else claim.says
    figure, message, passed = None, "", False
    python = random.getstate()
    began = time.perf_counter()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            random.seed(0)
            figure = float(claim.measure(broken))
            passed = bool(claim.holds(figure)) is not broken
    except Exception as error:
        message = _said(error)
    finally:
        random.setstate(python)
    spent = time.perf_counter() - began
    return Result(key, name, passed, figure, spent, says, message, torch.get_num_threads())


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
