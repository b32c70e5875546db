"""DyLoRA draws the rank of each update before its forward — arXiv:2210.07558, algorithm 1."""

from __future__ import annotations

import torch

from omnilora.core.rule import Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue


class DrawRank(Rule):
    """b ~ uniform{low … high}, or geometric with parameter ``p`` cut to that range; the same b at all sites."""

    def __init__(self, low: int, high: int, law: str = "uniform", p: float = 0.25) -> None:
        if not 1 <= low <= high or law not in ("uniform", "geometric"):
            raise BadValue(f"ranks {low!r} … {high!r}, law {law!r}.", "1 ≤ low ≤ high; 'uniform' or 'geometric'.")
        self.low, self.high, self.law, self.p = low, high, law, p

    def before_forward(self, run: Run) -> None:
        ranks = torch.arange(self.low, self.high + 1)
        weights = torch.ones(len(ranks)) if self.law == "uniform" else (1 - self.p) ** torch.arange(len(ranks)).float()
        run.set("rank", ranks[torch.multinomial(weights, 1)].squeeze())
