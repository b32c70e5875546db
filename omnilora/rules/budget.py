"""AdaLoRA's rank budget — Zhang et al., ICLR 2023, arXiv:2303.10512, §3.2–3.3 and algorithm 1.

    I(w)  = |w ∂L/∂w|,  Ī ← β₁Ī + (1−β₁)I,  U ← β₂U + (1−β₂)|I − Ī|,  s(w) = Ī·U
    S_i   = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)
    b(t)  = b₀ up to t_i;  ⌊b_T + (b₀ − b_T)(1 − (t − t_i)/(T − t_i − t_f))³⌋;  b_T after T − t_f
    λ_i   ← 0 outside the b(t) largest S of all sites
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from omnilora.core.parameterization import Slot
from omnilora.core.rule import Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue


def steps_of(value: int | float, total: int) -> int:
    """An int is a number of steps, a float below 1 a share of the run."""
    return int(value * total) if isinstance(value, float) and 0 <= value < 1 else int(value)


class Budget(Rule):
    """Shrinks the total rank of all sites from r·n to ``target``·n on the cubic schedule.

    Args:
        target: the average rank per site at the end.
        t_init, t_final: steps (int) or shares of the run (float < 1) before pruning starts and after it ends.
        every: steps between two prunings in the middle phase.
        compact: at the end, cut pruned directions out of the tensors (the scale stays that of the initial rank).
    """

    def __init__(self, target: int = 8, t_init: int | float = 0.1, t_final: int | float = 0.5, every: int = 10,
                 beta1: float = 0.85, beta2: float = 0.85, compact: bool = False) -> None:  # fmt: skip
        if every < 1 or target < 1:
            raise BadValue(f"every = {every!r}, target = {target!r}.", "Both are at least 1.")
        self.target, self.t_init, self.t_final, self.every = target, t_init, t_final, every
        self.beta1, self.beta2, self.compact = beta1, beta2, compact
        self.mean: dict[str, Tensor] = {}  # Ī by tensor
        self.spread: dict[str, Tensor] = {}  # U by tensor
        self.history: list[tuple[int, int]] = []  # (step, triplets kept) at every pruning

    def attach(self, run: Run) -> None:
        first, last = steps_of(self.t_init, run.total_steps), steps_of(self.t_final, run.total_steps)
        if first + last >= run.total_steps:
            raise BadValue(f"t_init + t_final = {first} + {last} steps of a run of {run.total_steps}.",
                           "Leave steps in between for the budget to shrink.")  # fmt: skip

    def budget(self, t: int, total: int, b0: int, bT: int) -> tuple[int, bool]:
        """(b(t), whether to prune at t)."""
        first, last = steps_of(self.t_init, total), steps_of(self.t_final, total)
        if t <= first:
            return b0, False
        if t > total - last:
            return bT, True
        left = 1 - (t - first) / (total - first - last)
        return int(bT + (b0 - bT) * left**3), t % self.every == 0

    def after_step(self, run: Run) -> None:
        t, slots = run.step, run.slots("core")
        if t < run.total_steps - steps_of(self.t_final, run.total_steps):
            for slot in slots:
                for name, w in slot.by_role("input", "output", "core"):
                    if w.grad is not None:
                        self._sense(f"{slot.site.name}:{name}", (w * w.grad).abs())
        count = [_core(slot)[1].numel() for slot in slots]
        kept, prune = self.budget(t, run.total_steps, sum(count), self.target * len(slots))
        if prune and self.mean:
            self._prune(slots, kept)
            self.history.append((t, kept))

    def _sense(self, key: str, now: Tensor) -> None:
        if key not in self.mean:
            self.mean[key], self.spread[key] = torch.zeros_like(now), torch.zeros_like(now)
        self.mean[key].mul_(self.beta1).add_(now, alpha=1 - self.beta1)
        gap = (now - self.mean[key]).abs()
        self.spread[key].mul_(self.beta2).add_(gap, alpha=1 - self.beta2)

    def scores(self, slot: Slot) -> Tensor:
        """S (r,) of the triplets of one site."""
        total = torch.zeros_like(_core(slot)[1])
        for name, _ in slot.by_role("input", "output", "core"):
            key = f"{slot.site.name}:{name}"
            s = self.mean[key] * self.spread[key]
            role = slot.roles[name]
            total = total + (s if role == "core" else s.mean(0) if role == "output" else s.mean(1))
        return total

    def _prune(self, slots: list[Slot], kept: int) -> None:
        scores = torch.cat([self.scores(slot) for slot in slots])
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep[torch.argsort(scores, descending=True, stable=True)[:kept]] = True
        for slot, mask in zip(slots, keep.split([_core(s)[1].numel() for s in slots]), strict=True):
            _core(slot)[1].masked_fill_(~mask, 0.0)
            slot.marks["rank_pattern"] = mask.tolist()

    def finish(self, run: Run) -> None:
        if self.compact:
            for slot in run.slots("core"):
                compact(slot, torch.tensor(slot.marks["rank_pattern"]))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": dict(self.mean), "spread": dict(self.spread), "history": [list(h) for h in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.spread = dict(state["mean"]), dict(state["spread"])
        self.history = [(int(t), int(b)) for t, b in state["history"]]


def _core(slot: Slot) -> tuple[str, Tensor]:
    return next(iter(slot.by_role("core")))


def compact(slot: Slot, keep: Tensor) -> None:
    """Drop rank directions: rows of the input side, columns of the output side, entries of core or gate. The scale
    stays; a site may end with rank 0."""
    for name, t in list(slot.by_role("input", "output", "core", "gate")):
        dim = {"input": 0, "core": 0, "gate": 0, "output": 1}[slot.roles[name]]
        *path, last = name.split(".")
        owner = slot
        for step in path:
            owner = owner._modules[step]  # type: ignore[assignment]
        cut = t.detach().index_select(dim, keep.nonzero().flatten().to(t.device)).contiguous()
        owner.register_parameter(last, torch.nn.Parameter(cut, requires_grad=t.requires_grad))
    slot.marks["compacted"] = True


class Orthogonal(Rule):
    """γ · mean over all P and Q of ‖PᵀP − I‖_F (official code), or γ · Σ ‖·‖²_F (``form="paper"``, eq. 4)."""

    loss_is_added = True

    def __init__(self, weight: float = 0.1, form: str = "code") -> None:
        if form not in ("code", "paper"):
            raise BadValue(f"form = {form!r}.", "Give 'code' or 'paper'.")
        self.weight, self.form = weight, form

    def loss(self, run: Run, batch: Any, outputs: Any) -> Tensor | float:
        terms = []
        for slot in run.slots():
            for name, t in slot.by_role("input", "output"):
                gram = t.mT @ t if slot.roles[name] == "output" else t @ t.mT
                gap = gram - torch.eye(gram.shape[0], device=t.device, dtype=t.dtype)
                square = gap.square().sum()
                terms.append(square if self.form == "paper" else square.clamp_min(1e-24).sqrt())
        stacked = torch.stack(terms)
        return self.weight * (stacked.sum() if self.form == "paper" else stacked.mean())
