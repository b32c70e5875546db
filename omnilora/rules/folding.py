"""Moments at which an adapter keeps what it has learnt and goes on: restarts, Delta-LoRA's start, COLA's knots."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from omnilora.core.context import Context
from omnilora.core.parameterization import Slot
from omnilora.core.rule import Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue


def fresh(slot: Slot) -> None:
    """The start of the form inside: LoRA's A Kaiming, B zero."""
    made = dict(slot.how.inner.init(slot.site).flat())  # type: ignore[attr-defined]
    for name, t in slot.inner.tensors():
        if t.requires_grad:
            t.copy_(made[name].value)


def fold(run: Run, renew: Callable[[Slot], None] = fresh) -> list[Tensor]:
    """Accumulate what every slot has learnt, let ``renew`` start its inner form anew, and return the tensors that learn."""
    folded = [slot for slot in run.slots() if "acc" in slot.roles]
    for slot in folded:
        slot.acc.add_(slot.how.inner.delta(slot.inner, Context()).dense())  # type: ignore[attr-defined]
    for slot in folded:  # tensors that sites share are renewed when all have been read
        renew(slot)
    return [t for slot in folded for _, t in slot.inner.tensors() if t.requires_grad]


class Snapshot(Rule):
    """Delta-LoRA: after ``start`` updates the change of s B A begins to count again, λ times. 0: from the beginning."""

    def __init__(self, start: int = 500) -> None:
        if start < 0:
            raise BadValue(f"start = {start!r}.", "Give a number of updates ≥ 0.")
        self.start = start

    def attach(self, run: Run) -> None:
        if self.start >= run.total_steps:
            warnings.warn(f"The second term begins after {self.start} updates, and this run has {run.total_steps}: it stays plain "
                          "LoRA. Give a smaller start.", stacklevel=2)  # fmt: skip
        if self.start == 0 and run.step == 0:
            with torch.no_grad():
                self._take(run)

    def after_step(self, run: Run) -> None:
        if run.step == self.start:
            self._take(run)

    def _take(self, run: Run) -> None:
        for slot in run.slots():
            if "on" in slot.roles:
                slot.AK.copy_(slot.A)
                slot.BK.copy_(slot.B)
                slot.on.fill_(1.0)


class Chain(Rule):
    """COLA: ``links`` LoRAs one after the other. At a knot the link is folded into the accumulator, drawn anew, and its
    optimizer state is dropped (a fresh AdamW)."""

    def __init__(self, links: int = 3) -> None:
        if links < 1:
            raise BadValue(f"links = {links!r}.", "Give at least 1.")
        self.links = links
        self.knots: list[int] = []

    def after_step(self, run: Run) -> None:
        planned = {run.total_steps * k // self.links for k in range(1, self.links)}
        if run.step not in planned:
            return
        assert run.optimizer is not None
        for t in fold(run):
            run.optimizer.state.pop(t, None)
        self.knots.append(run.step)

    def state_dict(self) -> dict[str, Any]:
        return {"knots": list(self.knots)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.knots = [int(k) for k in state["knots"]]
