"""SoRA's proximal step on gates — arXiv:2311.11696, eq. 7.   g ← sign(g) · max(|g| − ξ, 0) after every update"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from omnilora.core.attach import slots
from omnilora.core.rule import Group, Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue
from omnilora.rules.budget import compact


def shrink(g: Tensor, xi: float) -> Tensor:
    """The proximal map of ξ‖g‖₁: soft thresholding."""
    return g.sign() * (g.abs() - xi).clamp_min(0.0)


class Proximal(Rule):
    """Gates learn without weight decay and are shrunk by ``xi`` (times the learning rate if ``times_lr``).

    ``cut``: at the end ranks whose gate is zero are cut out of the tensors; the scale stays.
    """

    def __init__(self, xi: float = 3e-4, times_lr: bool = False, cut: bool = False) -> None:
        if not xi >= 0:
            raise BadValue(f"xi = {xi!r}.", "Give a number ≥ 0.")
        self.xi, self.times_lr, self.cut = xi, times_lr, cut

    def groups(self, model: nn.Module, adapter: str) -> list[Group]:
        gates = [t for s in slots(model, adapter) for _, t in s.by_role("gate")]
        return [Group(gates, weight_decay=0.0, name="gate")]

    def after_step(self, run: Run) -> None:
        assert run.optimizer is not None
        rate = next((g["lr"] for g in run.optimizer.param_groups if g.get("name") == "gate"), 1.0)
        for slot in run.slots():
            for _, g in slot.by_role("gate"):
                g.copy_(shrink(g, self.xi * rate if self.times_lr else self.xi))

    def finish(self, run: Run) -> None:
        for slot in run.slots("gate"):
            keep = torch.cat([g.detach() != 0 for _, g in slot.by_role("gate")])
            slot.marks["rank_pattern"] = keep.tolist()
            if self.cut:
                compact(slot, keep)
