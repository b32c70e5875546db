"""LoRA-the-Explorer's protocol — Huh et al., 2024, arXiv:2402.16828: heads learn apart and meet every so many updates.

In one process the batch is cut into H chunks. In several, each process owns H / world heads and its own batch; a merge
sends H·r·(in + out) numbers a site, and nothing else is ever exchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from omnilora.core.parameterization import Slot
from omnilora.core.rule import Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue


class ParallelHeads(Rule):
    """Merges every ``every`` updates and at the end; needs :class:`~omnilora.parameterizations.heads.Heads`."""

    own_gradients = True

    def __init__(self, heads: int, every: int = 10) -> None:
        if every < 1:
            raise BadValue(f"every = {every!r}.", "Give a number of updates ≥ 1.")
        self.heads, self.every, self.merges = heads, every, 0

    def attach(self, run: Run) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if self.heads % world:
            raise BadValue(f"{self.heads} heads cannot be divided among {world} processes.", "Choose a multiple.")
        self.count = self.heads // world
        self.first = self.count * (dist.get_rank() if world > 1 else 0)
        self.world = world

    def before_forward(self, run: Run) -> None:
        run.set("heads", (self.first, self.count))

    def after_step(self, run: Run) -> None:
        if run.step % self.every == 0 or run.step == run.total_steps:
            for slot in run.slots():
                if "A_hat" in slot.roles:
                    self.merge(slot)
            self.merges += 1

    def merge(self, slot: Slot) -> None:
        """acc ← acc + (s/H) Σ (B A − B̂ Â), then Â ← A, B̂ ← B."""
        if self.world > 1:
            r = slot.A.shape[0] // self.heads
            mine = slice(self.first * r, (self.first + self.count) * r)
            for t, part in ((slot.A, (mine,)), (slot.B, (slice(None), mine))):
                others = torch.zeros_like(t)
                others[part] = t[part]
                dist.all_reduce(others)
                t.copy_(others)
        slot.acc.add_(product(slot), alpha=slot.scale / self.heads)
        slot.A_hat.copy_(slot.A)
        slot.B_hat.copy_(slot.B)

    def state_dict(self) -> dict[str, Any]:
        return {"merges": self.merges}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.merges = int(state["merges"])


def product(slot: Slot) -> Tensor:
    """B A − B̂ Â."""
    change: Tensor = slot.B @ slot.A - slot.B_hat @ slot.A_hat
    return change
