"""ReLoRA's restarts — Lialin et al., ICLR 2024, arXiv:2307.05695, algorithm 1.

Every K updates: the rate falls to 0 and ramps back to the schedule over ``warmup`` updates; after the update at rate 0,
ΔW_total += s B A;  A ← Kaiming, B ← 0;  the optimizer's moments of A and B are pruned.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from omnilora.core.rule import Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue
from omnilora.rules.folding import fold


class Restart(Rule):
    """Needs :class:`~omnilora.parameterizations.accumulated.Accumulated`.

    ``reset``: "zero", "magnitude" (keep the entries above the ``prune`` quantile of |moment|) or "random" (drop the
    share ``prune``), for both Adam moments of the adapter alone; step counters stay.
    """

    def __init__(self, every: int = 1000, warmup: int = 100, reset: str = "magnitude", prune: float = 0.9) -> None:
        if every < 2 or warmup < 0 or reset not in ("zero", "magnitude", "random") or not 0 <= prune <= 1:
            raise BadValue(f"every = {every!r}, warmup = {warmup!r}, reset = {reset!r}, prune = {prune!r}.",
                           "every ≥ 2, warmup ≥ 0, reset one of zero, magnitude, random, 0 ≤ prune ≤ 1.")  # fmt: skip
        self.every, self.warmup, self.reset, self.prune = every, warmup, reset, prune
        self.restarts = 0

    def attach(self, run: Run) -> None:
        if run.total_steps < self.every + 2:
            warnings.warn(f"The first restart comes after {self.every} updates, and this run has {run.total_steps}: it stays plain "
                          "LoRA. Give a smaller every.", stacklevel=2)  # fmt: skip

    def _since(self, run: Run) -> int | None:
        """Updates done since the last multiple of K that has a restart; None before the first. A restart after which
        nothing would be learnt is left out."""
        last = (min(run.step, run.total_steps - 2) // self.every) * self.every
        return run.step - last if last > 0 else None

    def rate(self, run: Run) -> float:
        since = self._since(run)
        return 1.0 if since is None or self.warmup == 0 else min(1.0, since / self.warmup)

    def after_step(self, run: Run) -> None:
        if self._since(run) != 1:
            return
        for t in fold(run):
            self._prune(run, t)
        self.restarts += 1

    def _prune(self, run: Run, t: Tensor) -> None:
        assert run.optimizer is not None
        for key, moment in run.optimizer.state.get(t, {}).items():
            if key == "step" or not isinstance(moment, Tensor) or moment.shape != t.shape:
                continue
            if self.reset == "zero":
                moment.zero_()
            elif self.reset == "magnitude":
                n = math.floor(self.prune * (moment.numel() - 1)) + 1 if self.prune else 0  # entries ≤ the quantile
                drop = torch.argsort(moment.flatten().abs(), stable=True)[:n]
                moment.view(-1)[drop] = 0
            else:
                moment.mul_(torch.rand_like(moment) >= self.prune)

    def state_dict(self) -> dict[str, Any]:
        return {"restarts": self.restarts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restarts = int(state["restarts"])
