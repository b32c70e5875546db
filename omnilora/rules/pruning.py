"""PRILoRA's pruning of A — Benedek & Wolf, Findings of EACL 2024, arXiv:2401.11316.

    S_kj = |A_kj| · x̄_j,   x̄_j ← β x̄_j + (1 − β) ‖X_:,j‖₂ at every training forward
    every so many updates: the lowest share of each row of A (or of the matrix) ← 0; entries go on learning
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from omnilora.core.observe import listen
from omnilora.core.parameterization import Slot, finite, one_of
from omnilora.core.rule import Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue


class PruneA(Rule):
    """``share`` of the entries in each ``group`` ("row" or "matrix") of A is zeroed every ``every`` updates and at the end."""

    def __init__(self, every: int = 40, share: float = 0.5, beta: float = 0.9, group: str = "row") -> None:
        finite(share, "share", 0.0, 1.0)
        finite(beta, "beta", 0.0, 1.0)
        one_of(group, "group", "row", "matrix")
        if every < 1:
            raise BadValue(f"every = {every!r}.", "Give a number of updates ≥ 1.")
        self.every, self.share, self.beta, self.group = every, share, beta, group
        self.norms: dict[str, Tensor] = {}  # x̄ by site
        self._handles: list[Any] = []

    def attach(self, run: Run) -> None:
        self._handles = [listen(slot.site, partial(self._heard, slot.site.name)) for slot in _prunable(run)]

    def detach(self, run: Run) -> None:
        for handle in self._handles:
            handle.remove()

    def _heard(self, site: str, x: Tensor) -> None:
        now = x.float().norm(dim=0)
        old = self.norms.get(site)
        self.norms[site] = now if old is None else self.beta * old + (1 - self.beta) * now

    def after_step(self, run: Run) -> None:
        if run.step % self.every == 0 or run.step == run.total_steps:
            for slot in _prunable(run):
                if slot.site.name in self.norms:
                    self.prune(slot)

    def prune(self, slot: Slot) -> None:
        """Zero the entries of A with the lowest S."""
        ((_, A),) = slot.by_role("input")
        score = A.abs() * self.norms[slot.site.name].to(A)
        flat = score if self.group == "row" else score.view(1, -1)
        lowest = torch.argsort(flat, dim=-1, stable=True)[:, : int(self.share * flat.shape[-1])]
        A.view(flat.shape).scatter_(-1, lowest, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": dict(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = dict(state["norms"])


def _prunable(run: Run) -> list[Slot]:
    """Slots with one A whose layer is called with features (an embedding's input has none)."""
    return [s for s in run.slots() if s.site.called and s.site.kind in ("linear", "conv")
            and len(list(s.by_role("input"))) == 1]  # fmt: skip
