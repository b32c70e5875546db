"""Side information of one forward pass: which adapters, for which rows, on which task; and what layers report.

A :class:`Context` is an immutable value. :class:`Hub` is what all layers of one adapted model share: the
adapters' names, the active set, and, per thread, the context of the forward under way. Structure is Python,
choice and strength are tensors, so compiled code never specializes on them.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from omnilora.errors import BadValue, ContextError, UnknownName, nearest

ActiveSet = tuple[tuple[str, float], ...]  # ordered (adapter, weight)
RowSpec = str | None | Mapping[str, float] | Sequence[str]


@dataclass(frozen=True, eq=False)
class RowGroups:
    """A different active set for each row (or packed segment) of a batch.

    ``groups``: distinct sets with the row numbers that use them. ``gates`` (rows, adapters): the same as weights,
    for code that must not branch. ``segments`` (batch, length): the row number of every token, when packed.
    ``repeat``: consecutive copies of each row that a layer may see (beams, several returned sequences).
    """

    groups: tuple[tuple[ActiveSet, Tensor], ...]
    gates: Tensor
    member: Tensor  # (rows,): the group of each row
    count: int
    segments: Tensor | None = None
    repeat: int = 1
    batch_dim: int = 0
    plans: dict[str, Any] = field(default_factory=dict, repr=False)  # what executors keep for these rows


@dataclass(frozen=True, eq=False)
class Context:
    """What one forward pass knows. ``side`` holds task, domain, cluster ids, gates by site, drawn values …"""

    active: ActiveSet | None = None  # None: the model's own active set
    rows: RowGroups | None = None
    side: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    recomputed: bool = False
    training: bool = False
    sink: list[tuple[str, str, Tensor]] | None = None

    def get(self, key: str, default: Any = None) -> Any:
        return self.side.get(key, default)

    def emit(self, site: str, name: str, value: Tensor) -> None:
        """Report a tensor (router logits, a mask, features) of ``site`` to losses and figures.

        A recomputation reports nothing twice.
        """
        if self.sink is not None and not self.recomputed:
            self.sink.append((site, name, value))


EMPTY = Context()
KEPT = 8  # batches of rows that a model remembers
_scopes: contextvars.ContextVar[tuple[tuple[int, Context], ...]] = contextvars.ContextVar("omnilora", default=())


class _Local(threading.local):
    """One value a thread; a class attribute, so that compiled code finds (and guards) it in every thread."""

    context: Context = EMPTY
    made: Mapping[Any, Any] = MappingProxyType({})  # see omnilora.core.together
    visits: set[int] | None = None  # ids of the Adapters that took part in a forward that proves the model; None: no such forward
    epoch = -1  # of the hub when that forward began


class Hub:
    """Shared by all adapted layers of a model. Holds names and small tensors, never the model."""

    roster = 0  # counts changes of ``names``

    def __init__(self) -> None:
        self.names: list[str] = []  # slot number = position; compiled code indexes ``weights`` by it
        self.active: ActiveSet = ()
        self.weights = torch.zeros(0, device="cpu")  # strength of every attached adapter, in the order of ``names``
        self.epoch = 0  # counts changes of the active set, of tensors by load, of merges
        self.written = 0  # counts moments at which an adapter's numbers may have moved: a forward with gradients, train ↔ eval
        self.merged: tuple[str, ...] = ()
        self.values: dict[str, Any] = {}  # what rules set for coming forwards: a drawn rank, a step
        self.run: Any = None
        self.needs_run: dict[str, str] = {}  # adapter → method whose rules need a run
        self.mode: bool | None = None  # train or eval at the last forward
        self.rowed = False  # whether the last training forward had rows of its own
        self.unproven = False  # whether no forward has reached all adapted layers since the last change
        self.looked: set[str] = set()  # adapters that were checked since the last change
        self.emitted: list[tuple[str, str, Tensor]] = []
        self._set_up()

    def _set_up(self) -> None:
        self.groups: Any = None
        self.kept_made: Mapping[Any, Any] = {}
        self.key = id(self)
        self.local = _Local()
        self.changing = threading.RLock()  # held while adapters come and go, and by who looks whether all are there
        self.kept: dict[str, Any] = {}  # what executors and loaders keep for this model; never copied or saved

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("local", "changing", "key", "run", "groups", "kept_made", "kept"):
            state.pop(name)
        return state | {"emitted": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__dict__.setdefault("looked", set())
        self.run = None
        self._set_up()

    # -- names and the active set -------------------------------------------------------------------------------

    def add(self, name: str) -> None:
        self.names.append(name)
        self.roster += 1
        self.weights = torch.cat((self.weights, self.weights.new_zeros(1)))
        self.changed()

    def drop(self, name: str) -> None:
        at = self.names.index(name)
        self.names.pop(at)
        self.roster += 1
        self.weights = torch.cat((self.weights[:at], self.weights[at + 1 :]))
        self.active = tuple((n, w) for n, w in self.active if n != name)
        self.needs_run.pop(name, None)
        self.changed()

    def changed(self) -> None:
        self.epoch += 1
        self.unproven, self.looked = True, set()

    def resolve(self, spec: RowSpec) -> ActiveSet:
        """A name, an ordered list, a weighted mapping or None → an active set. Unknown names raise."""
        if spec is None:
            return ()
        pairs = [(spec, 1.0)] if isinstance(spec, str) else (
            list(spec.items()) if isinstance(spec, Mapping) else [(n, 1.0) for n in spec])  # fmt: skip
        for name, weight in pairs:
            if name not in self.names:
                raise UnknownName(f"No adapter is named {name!r}.", nearest(name, self.names))
            if not isinstance(weight, (int, float)) or weight != weight or abs(weight) == float("inf"):
                raise BadValue(f"The weight of adapter {name!r} is {weight!r}.", "Give a finite number.")
        if len({n for n, _ in pairs}) != len(pairs):
            raise BadValue(f"An adapter is named twice in {spec!r}.", "Add the weights up and name it once.")
        return tuple((n, float(w)) for n, w in pairs)

    def activate(self, spec: RowSpec) -> None:
        self.active = self.resolve(spec)
        strengths = self.weights.numpy()  # the same memory
        strengths[:] = 0.0
        for name, weight in self.active:
            strengths[self.names.index(name)] = weight
        self.changed()

    # -- the context of the forward under way ------------------------------------------------------------------------

    def context(self) -> Context:
        """The context that a layer reads: thread-local, so threads cannot see each other's rows."""
        return self.local.context

    def sync(self) -> None:
        """Bring the caller's (async-safe) scope into this thread; run at the model's entry, never compiled."""
        if self.context().recomputed:
            return
        for key, context in reversed(_scopes.get()):
            if key == self.key:
                self.local.context = context
                return
        self.local.context = EMPTY

    @contextmanager
    def scope(self, context: Context) -> Iterator[Context]:
        """``context`` holds for every forward inside, in this task and thread."""
        before = self.context()
        token = _scopes.set((*_scopes.get(), (self.key, context)))
        self.local.context = context
        try:
            yield context
        finally:
            _scopes.reset(token)
            self.local.context = before

    def current(self) -> Context:
        """The context of the calling task (outside a forward)."""
        for key, context in reversed(_scopes.get()):
            if key == self.key:
                return context
        return EMPTY


def row_groups(
    hub: Hub,
    rows: Sequence[RowSpec],
    segments: Tensor | None = None,
    repeat: int = 1,
    batch_dim: int = 0,
) -> RowGroups:
    """Rows of a batch by adapter. ``rows[i]``: a name, a list, a weighted mapping, or None for the bare base."""
    if not rows:
        raise BadValue("rows is empty.", "Give one adapter (or None) for each row of the batch.")
    named = segments is None and all(r is None or isinstance(r, str) for r in rows)
    key = (tuple(rows), repeat, batch_dim) if named else None
    if key is not None and (known := _kept(hub).get(key)) is not None:
        return known
    if segments is not None:
        if segments.dim() != 2 or segments.is_floating_point():
            raise ContextError(f"segments has shape {tuple(segments.shape)} and dtype {segments.dtype}.",
                               "Give integers of shape (batch, length): the row number of every token.")  # fmt: skip
        low, high = int(segments.min()), int(segments.max())
        if low < 0 or high >= len(rows):
            raise ContextError(f"segments names rows {low} … {high}, but there are {len(rows)} rows.")
    sets = [hub.resolve(r) for r in rows]
    groups: dict[ActiveSet, list[int]] = {}
    for i, s in enumerate(sets):
        groups.setdefault(s, []).append(i)
    number = {name: i for i, name in enumerate(hub.names)}
    entries = [(i, number[name], w) for i, s in enumerate(sets) for name, w in s]
    gates = torch.zeros(len(sets), len(hub.names), device="cpu")
    if entries:
        row, column, weight = zip(*entries)
        gates[list(row), list(column)] = torch.tensor(weight, dtype=gates.dtype, device="cpu")
    which = {s: g for g, s in enumerate(groups)}
    member = torch.tensor([which[s] for s in sets], device="cpu")
    if segments is None:
        at = tuple((s, torch.tensor(i, device="cpu")) for s, i in groups.items())
    else:
        of_token = member.to(segments.device)[segments.reshape(-1)]
        count = torch.bincount(of_token, minlength=len(groups)).tolist()
        at = tuple(zip(groups, torch.argsort(of_token, stable=True).split(count)))
    made = RowGroups(at, gates, member, len(rows), segments, repeat, batch_dim)
    if key is not None:
        with hub.changing:
            kept = _kept(hub)
            kept[key] = made
            if len(kept) > KEPT:
                del kept[next(iter(kept))]
    return made


def _kept(hub: Hub) -> dict[Any, RowGroups]:
    """Batches of named rows met last, by their names: a server that decodes asks for the same one at every token."""
    roster, kept = hub.kept.get("groups", (None, {}))
    if roster != hub.roster:
        kept = {}
        hub.kept["groups"] = (hub.roster, kept)
    return kept  # type: ignore[no-any-return]


@contextmanager
def restored(hub: Hub, context: Context) -> Iterator[None]:
    """Layers inside see ``context`` as a recomputation of its first run."""
    before = hub.context()
    hub.local.context = replace(context, recomputed=True)
    try:
        yield
    finally:
        hub.local.context = before


class _Recompute:
    """A context manager for checkpoint's recomputation that can be entered in any thread."""

    def __init__(self, hub: Hub) -> None:
        self.hub, self.context = hub, hub.context()

    def __enter__(self) -> None:
        self._scope = restored(self.hub, self.context)
        self._scope.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._scope.__exit__(*error)


class _Plain:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


class CheckpointContext:
    """``context_fn`` of torch.utils.checkpoint: a recomputation sees the context of its first run."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def __call__(self) -> tuple[_Plain, _Recompute]:
        return _Plain(), _Recompute(self.hub)
