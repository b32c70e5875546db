"""Load balance of routers, from the logits that layers report.

    f_e = share of tokens whose largest gate is e,  P_e = mean p_e,  loss = c · N Σ_e f_e P_e   (1 when uniform)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omnilora.core.op import softmax
from omnilora.core.rule import Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue, RunError


class Balance(Rule):
    """The Switch loss, per router, averaged over routers; padding tokens do not count."""

    loss_is_added = True

    def __init__(self, weight: float = 0.01) -> None:
        if weight < 0:
            raise BadValue(f"weight = {weight!r}.", "Give a number ≥ 0.")
        self.weight = weight

    def loss(self, run: Run, batch: Any, outputs: Any) -> Tensor | float:
        logits = [value for _, name, value in run.emitted if name == "router_logits"]
        if not logits:
            raise RunError("No router reported its logits in the last forward.",
                           "Run the model's forward before run.loss, and do not use reentrant checkpointing.")  # fmt: skip
        if not any(v.requires_grad for v in logits):
            raise RunError("The routers' logits carry no gradient.", "Use checkpointing with use_reentrant=False.")
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return self.weight * torch.stack([switch_loss(v, mask) for v in logits]).mean()


def switch_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """N Σ f_e P_e of one router; logits (..., N), mask of the leading dimensions (1 = counts)."""
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.bool()]
    p = softmax(logits).flatten(0, -2)
    n = p.shape[-1]
    f = torch.bincount(p.argmax(-1), minlength=n).to(p.dtype) / p.shape[0]
    return n * (f * p.mean(0)).sum()
