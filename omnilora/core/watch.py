"""What meets the matrices inside an adapted map: inputs a and outputs h = M a of every matrix M that an adapter owns.

``observe`` sees a site from outside, x and W'x. Curvature and Jacobians of an adapter's own tensors need the links of
its chain: B A x is two linear layers, A with x and B with A x. A form needs nothing for that; its operator is rebuilt
with links that tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.op import Geometry, Op
from omnilora.core.parameterization import Parameterization, Slot
from omnilora.errors import NotExpressible

Heard = Callable[[Tensor, Tensor], Tensor]  # (a, M a) → what goes on


class Telling(Op):
    """The matrix m as a link that tells what it was given and what it made."""

    def __init__(self, m: Tensor, heard: Heard) -> None:
        self.m, self.heard = m, heard

    def apply(self, x: Tensor, geo: Geometry) -> Tensor:
        return self.heard(x, geo.full(x, self.m))

    def matrix(self, geo: Geometry) -> Tensor:
        return self.m


def told(op: Any, heard: Mapping[int, Heard]) -> Any:
    """``op`` with the matrices among its links that ``heard`` knows (by identity) replaced by telling ones."""
    if not dataclasses.is_dataclass(op) or not isinstance(op, Op):
        return op
    changed = {}
    for f in dataclasses.fields(op):
        old = getattr(op, f.name)
        if isinstance(old, tuple):
            links = [Telling(k, heard[id(k)]) if isinstance(k, Tensor) and id(k) in heard else told(k, heard) for k in old]
            new: Any = old if all(a is b for a, b in zip(links, old)) else tuple(links)
        else:
            new = told(old, heard)
        if new is not old:
            changed[f.name] = new
    return dataclasses.replace(op, **changed) if changed else op


class _Form:
    """The form of a slot for the time that it is watched."""

    def __init__(self, how: Parameterization, heard: Mapping[int, Heard]) -> None:
        self._how, self._heard = how, heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._how, name)

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        made: Op = told(self._how.adapt(W, p, ctx), self._heard)
        return made


class Tape:
    """One forward, by ``site.tensor``: inputs a (n, tokens, in) and the outputs that gradients are taken at.

    ``mask`` (n, length), where it is given: tokens it does not keep count as zero.
    """

    def __init__(self) -> None:
        self.met: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def inputs(self, n: int, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {name: torch.cat([_rows(name, a, n, mask) for a, _ in calls], 1) for name, calls in self.met.items()}

    def gradients(self, value: Tensor, n: int, mask: Tensor | None = None, keep: bool = True) -> dict[str, Tensor]:
        """∂value/∂h, (n, tokens, out); ``value`` is a sum over rows. ``keep``: another call will follow."""
        flat = [h for calls in self.met.values() for _, h in calls]
        found = iter(torch.autograd.grad(value, flat, retain_graph=keep, materialize_grads=True))
        return {name: torch.cat([_rows(name, next(found), n, mask) for _ in calls], 1) for name, calls in self.met.items()}


def _rows(name: str, t: Tensor, n: int, mask: Tensor | None) -> Tensor:
    """(n, tokens, features) of a tensor that a matrix met, fp32 or wider."""
    t = t.detach() if t.dtype == torch.float64 else t.detach().float()
    length = 1 if mask is None else mask.shape[1]
    if t.shape[0] not in (n, n * length):
        raise NotExpressible(f"{name} sees {t.shape[0]} rows in a batch of {n}.",
                             "Its tokens are rearranged (experts): leave it out by the layers to include.")  # fmt: skip
    t = t.reshape(n, -1, t.shape[-1])
    if mask is not None and t.shape[1] == length and length > 1:
        t = t * mask.to(t.dtype).unsqueeze(-1)
    return t


def matrices(slots: Sequence[Slot]) -> dict[str, Tensor]:
    """The tensors that can be watched, by ``site.tensor``: matrices that learn, on layers that are called on tokens."""
    found: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for slot in slots:
        if not (slot.site.called and slot.site.geometry.plain):
            continue
        for name, t in slot.tensors():
            if t.dim() == 2 and slot.roles[name] in ("input", "output", "core") and t.requires_grad:
                path = f"{slot.site.name}.{name}"
                if id(t) in seen:
                    raise NotExpressible(f"{path} is the same tensor as {seen[id(t)]}.", "Use a form without sharing.")
                found[path], seen[id(t)] = t, path
    return found


@contextmanager
def watching(slots: Sequence[Slot], names: Sequence[str] | None = None) -> Iterator[Tape]:
    """Forwards in this scope write what the matrices of ``slots`` met on the tape; ``names``: those of ``matrices``."""
    tape, forms = Tape(), [(slot, slot.how) for slot in slots]

    def listener(name: str) -> Heard:
        def heard(a: Tensor, h: Tensor) -> Tensor:
            if not h.requires_grad:
                h.requires_grad_()
            tape.met.setdefault(name, []).append((a.detach(), h))
            return h

        return heard

    chosen = {id(t): listener(name) for name, t in matrices(slots).items() if names is None or name in names}
    try:
        for slot, how in forms:
            slot.how = _Form(how, chosen)  # type: ignore[assignment]
        with torch.enable_grad():
            yield tape
    finally:
        for slot, how in forms:
            slot.how = how
