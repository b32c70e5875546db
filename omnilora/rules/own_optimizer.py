"""A method whose idea is its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from omnilora.core.rule import Rule
from omnilora.core.run import Run


class OwnOptimizer(Rule):
    """Trains with ``cls(groups, **options)``; rates and weight decay of the groups stay the trainer's."""

    def __init__(self, cls: type[torch.optim.Optimizer], **options: Any) -> None:
        self.cls, self.options = cls, options

    def optimizer(
        self, run: Run, params: Iterable[Any], make: Callable[[Iterable[Any]], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        return self.cls(params, **self.options)
