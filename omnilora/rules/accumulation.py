"""FLORA's compressed accumulation — arXiv:2402.03293, algorithm 1: gradients of micro-batches wait as C += down(G_k)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnilora.core.run import Run
from omnilora.optim.flora import down, up
from omnilora.rules.own_optimizer import OwnOptimizer


class CompressedAccumulation(OwnOptimizer):
    """The optimizer, and for matrices with sides of at least ``rank`` a full gradient that lives for one backward only.

    The trainer's clipping does not see these gradients; the optimizer clips its own updates.
    """

    def __init__(self, cls: type[torch.optim.Optimizer], rank: int, on: bool, **options: Any) -> None:
        super().__init__(cls, rank=rank, **options)
        self.rank, self.on, self.seed = rank, on, 0
        self.waiting: dict[Tensor, Tensor] = {}
        self._numbers: dict[Tensor, int] = {}
        self._handles: list[Any] = []

    def attach(self, run: Run) -> None:
        if not self.on:
            return
        for t in dict.fromkeys(t for s in run.slots() for _, t in s.tensors() if t.requires_grad):
            if t.dim() == 2 and min(t.shape) >= self.rank:
                self._numbers[t] = len(self._numbers)
                self._handles.append(t.register_post_accumulate_grad_hook(self._compress))

    def detach(self, run: Run) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _compress(self, t: Tensor) -> None:
        assert t.grad is not None
        C = down(t.grad, self._key(t), self.rank)
        t.grad = None
        self.waiting[t] = self.waiting[t] + C if t in self.waiting else C

    def _key(self, t: Tensor) -> int:
        """The seed of a tensor's projection in this update."""
        return self.seed * 65_537 + self._numbers[t]

    def before_step(self, run: Run) -> None:
        for t, C in self.waiting.items():
            t.grad = up(C, self._key(t), t.shape)
        self.waiting.clear()

    def after_step(self, run: Run) -> None:
        self.seed += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed = int(state["seed"])
