"""ROSA — Gamal & Rabusseau, 2023: a random slice of the weight's own singular vectors trains, is kept, and is drawn anew.

    W_t = U Σ Vᵀ,   B = U_I,  A = Σ_I V_Iᵀ,  |I| = r;   W_{t+1} = W_t − B₀ A₀ + B A
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnilora.core.parameterization import Slot, one_of
from omnilora.core.rule import Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue
from omnilora.parameterizations.shifted import start_at
from omnilora.rules.folding import fold

PICKS = ("random", "top", "bottom", "window")


def slice_of(W: Tensor, r: int, pick: str) -> tuple[Tensor, Tensor]:
    """(B (…, out, r), A (…, r, in)) of the singular triplets that ``pick`` names: a random subset, the largest, the
    smallest, or a random run of neighbours."""
    u, s, vh = torch.linalg.svd(W if W.dtype == torch.float64 else W.float(), full_matrices=False)
    n = s.shape[-1]
    if pick == "random":
        at = torch.randperm(n)[:r].sort().values
    else:
        first = {"top": 0, "bottom": n - r}.get(pick, int(torch.randint(n - r + 1, ())))
        at = torch.arange(first, first + r)
    at = at.to(W.device)
    return u[..., at], s[..., at, None] * vh[..., at, :]


def redraw(slot: Slot, pick: str) -> None:
    """Let a slot of Accumulated(ShiftedLoRA) start at a slice of its current weight."""
    W = slot.site.W.dense().detach()
    B, A = slice_of(W.to(slot.acc.dtype) + slot.acc, slot.how.inner.r, pick)
    start_at(slot.inner, B, A)


class Resample(Rule):
    """Every ``every`` updates (an int, or a share of the run below 1): keep what was learnt, draw a new slice, drop the
    optimizer's states of its factors."""

    def __init__(self, every: int | float = 0.25, pick: str = "random") -> None:
        one_of(pick, "pick", *PICKS)
        if every <= 0 or (every >= 1 and every != int(every)):
            raise BadValue(f"every = {every!r}.", "Give a number of updates, or a share of the run below 1.")
        self.every, self.pick, self.drawn = every, pick, 0

    def after_step(self, run: Run) -> None:
        every = max(1, round(self.every * run.total_steps)) if self.every < 1 else int(self.every)
        if run.step % every or run.step >= run.total_steps:
            return
        assert run.optimizer is not None
        for t in fold(run, lambda slot: redraw(slot, self.pick)):
            run.optimizer.state.pop(t, None)
        self.drawn += 1

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = int(state["drawn"])
