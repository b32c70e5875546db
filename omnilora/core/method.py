"""A method is a named sum of pieces, and its card: equation, defaults, claims.

An entry lives in ``omnilora/methods/<section>/<key>.py`` as a function ``key(...) -> Method`` beside ``CARD``;
entries are found by scanning, so adding one touches no other file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from omnilora.core.parameterization import Parameterization, Slot
from omnilora.core.rule import Rule
from omnilora.core.site import Site
from omnilora.core.targets import Targets
from omnilora.errors import BadValue, UnknownName, nearest

TAGS = frozenset({
    "zero_at_init",  # the adapted model equals the base at the start
    "mergeable",     # one weight equals the adapted map
    "low_rank",      # factors() gives (B, A)
    "additive",      # W + ΔW
    "scheduled",     # has rules that tick
    "trains_lm",     # `omnilora train --method KEY` fine-tunes a language model
    "rows",          # takes part in mixed batches
    "routed",        # the map depends on the token
    "shared",        # tensors are shared between sites
    "quantized",     # chooses how the base is stored
    "combines",      # works on adapter states
    "applies",       # `omnilora apply --method KEY` does its work: no training run of an adapter
})  # fmt: skip

KINDS = frozenset({"parameterization", "initialization", "schedule", "optimizer", "store", "routing", "composition",
                   "regularizer", "procedure", "posthoc", "theory", "kernel", "recipe", "system"})  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """An executable check of what is special about a method, and a control that must fail it.

    ``measure(broken)`` returns the figure with the method intact (False) or without its special part (True);
    ``holds(figure)`` judges it. A claim stands if it holds intact and fails broken.
    """

    name: str
    says: str
    measure: Callable[[bool], float]
    holds: Callable[[float], bool]
    control: str  # what is broken
    slow: bool = False


@dataclass(frozen=True)
class Card:
    """What a method is, in data. ``differs``: where official code contradicts the paper, and what we follow.

    ``command``: the command line that does the method's work, where that is not ``omnilora train --method KEY``.
    """

    key: str
    title: str
    section: str
    kind: str
    equation: str
    purpose: str
    arxiv: str = ""
    venue: str = ""
    tags: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    cases: tuple[Mapping[str, Any], ...] = ({},)
    not_with: Mapping[str, str] = field(default_factory=dict)
    differs: tuple[str, ...] = ()
    agreement: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    command: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.tags) - TAGS
        if unknown or self.kind not in KINDS:
            raise BadValue(f"Card {self.key!r}: unknown tags {sorted(unknown)} or kind {self.kind!r}.")


@dataclass(frozen=True)
class Method:
    """What ``ol.adapt`` puts on a model and ``ol.fit`` trains.

    ``store(model, sites)`` puts the base into the form the method wants, before sites are made (4 bits), and may return
    what it saw, by site name; a site knows the form planned for it (``site.how``); ``arrange(sites, how)`` gives each
    site its own parameterization (a rank by depth, None to leave it out); ``source`` makes context from the model's
    inputs; ``fill(slot, seen)`` sets a fresh slot's tensors, seen being what ``store`` or ``prepare`` saw at the site;
    ``prepare`` observes data and decides the method and targets before any tensor is made (``ol.prepare``);
    ``apply(job)`` does the work of a method that trains no adapter.
    """

    key: str
    parameterization: Parameterization | None
    rules: tuple[Rule, ...] = ()
    targets: Targets | None = None
    hyper: Mapping[str, Any] = field(default_factory=dict)
    store: Callable[[nn.Module, Sequence[Site]], Mapping[str, Any] | None] | None = None
    arrange: Callable[[Sequence[Site], Parameterization], Sequence[Parameterization | None]] | None = None
    seen: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    source: Parameterization | None = None
    rate: float = 1.0  # factor of the trainer's default learning rate, where the user gives none
    combine: Callable[..., Any] | None = None  # (states, weights) → state, for methods that make adapters of adapters
    fill: Callable[[Slot, Any], None] | None = None
    prepare: Callable[..., tuple[Method, Targets | None]] | None = None
    apply: Callable[[Any], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Entry:
    """A method found by scanning."""

    card: Card
    make: Callable[..., Method]
    claims: Callable[[], Sequence[Claim]]


_entries: dict[str, Entry] = {}
_scanned = False


def entries() -> dict[str, Entry]:
    """All methods by key."""
    global _scanned
    if not _scanned:
        import omnilora.methods as home

        _scanned = True

        for found in pkgutil.walk_packages(home.__path__, "omnilora.methods."):
            module = importlib.import_module(found.name)
            for card in _cards_in(module):
                made = Entry(card, getattr(module, card.key), getattr(module, "claims", tuple))
                _entries.setdefault(card.key, made)
    return _entries


def _cards_in(module: Any) -> list[Card]:
    return [v for v in vars(module).values() if isinstance(v, Card) and hasattr(module, v.key)]


def add_entry(card: Card, make: Callable[..., Method], claims: Callable[[], Sequence[Claim]] | None = None) -> None:
    """Register a method of your own under its card's key."""
    _entries[card.key] = Entry(card, make, claims or (lambda: ()))


def entry(key: str) -> Entry:
    known = entries()
    if key not in known:
        raise UnknownName(f"No method {key!r}.", nearest(key, known))
    return known[key]


def method(key: str, **hyper: Any) -> Method:
    """A method by name: ``ol.method("dora", r=16)``. Unknown names and hyper-parameters raise with the nearest."""
    make = entry(key).make
    allowed = inspect.signature(make).parameters
    for name in hyper:
        if name not in allowed:
            raise UnknownName(f"{key} has no hyper-parameter {name!r}.", nearest(name, allowed))
    try:
        made = make(**hyper)
        if made.parameterization is not None:
            made.parameterization.check()
    except (TypeError, AttributeError, OverflowError) as error:  # a value of another kind than the method computes with
        shown = ", ".join(f"{k}={v!r}" for k, v in hyper.items())[:200]
        raise BadValue(f"{key}({shown}): {' '.join(str(error).split())[:200]}.", f"See omnilora show {key}.") from error
    full = {n: hyper.get(n, p.default) for n, p in allowed.items()}
    return Method(**{**{f: getattr(made, f) for f in made.__dataclass_fields__}, "key": key, "hyper": {**full, **made.hyper}})


def prepare(model: nn.Module, made: Method, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor],
            targets: Targets | None = None) -> tuple[Method, Targets | None]:  # fmt: skip
    """Let a method look at data and decide ranks, sharing or sites before any of its tensors is made.

    Args:
        batches: what the method may look at; ``loss(model, batch)`` is differentiable.

    Returns: the method and targets to pass to ``ol.adapt``; methods that need no data come back as they are.
    """
    return (made, targets) if made.prepare is None else made.prepare(model, made, batches, loss, targets)


def combine(made: Method | str, states: Sequence[Any], weights: Sequence[float]) -> Any:
    """A new adapter state from others: ``ol.combine("lora_sum", [a, b], [0.5, 0.5])``."""
    made = method(made) if isinstance(made, str) else made
    if made.combine is None:
        able = [c.key for c in cards() if "combines" in c.tags]
        raise BadValue(f"{made.key!r} does not combine adapters.", f"These do: {', '.join(able)}.")
    return made.combine(states, weights)


class Methods:
    """``ol.methods.dora(r=16)``."""

    def __getattr__(self, key: str) -> Callable[..., Method]:
        if key.startswith("_"):
            raise AttributeError(key)
        entry(key)
        return lambda **hyper: method(key, **hyper)

    def __dir__(self) -> list[str]:
        return sorted(entries())


def cards() -> list[Card]:
    """All cards, by section and key."""
    return sorted((e.card for e in entries().values()), key=lambda c: (c.section, c.key))
