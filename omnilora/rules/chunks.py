"""Local LoRA — NeurIPS 2023 workshops: the stack of blocks learns chunk by chunk, each with a loss of its own.

    h_p = C_p(h_{p−1}; LoRA_p),   ℓ_p = CE(g(h_p), y),   no gradient below h_{p−1}

g is the model's own final norm and head ("exit"): while chunk p learns, the blocks after it hand on what it gave.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from omnilora.core.layer import Adapted
from omnilora.core.parameterization import Slot, finite, is_still
from omnilora.core.rule import Rule
from omnilora.core.run import Run
from omnilora.errors import BadValue, TargetError


class Chunks(Rule):
    """``parts`` chunks of blocks learn one after another; adapters outside the stack learn with the last one.
    ``stack``: the path of the list of blocks, by default the longest list that holds targets.

    Args:
        last: share of the updates for the last chunk, whose exit is the model's own end; the others divide the rest.
        inner_rate: factor of the learning rate while any other chunk learns: an early exit is a poor guide.
        overlap: blocks below the chunk through which the gradient still flows (interlocking).
    """

    one_process = True

    def __init__(self, parts: int = 4, overlap: int = 0, stack: str | None = None, last: float = 0.5,
                 inner_rate: float = 0.1) -> None:  # fmt: skip
        finite(last, "last", 0.0, 1.0)
        finite(inner_rate, "inner_rate", 0.0)
        if parts < 1 or overlap < 0:
            raise BadValue(f"parts = {parts!r}, overlap = {overlap!r}.", "parts ≥ 1 and overlap ≥ 0.")
        self.parts, self.overlap, self.stack, self.last, self.inner_rate = parts, overlap, stack, last, inner_rate
        self.at = self.resumed = -1  # the chunk that learns; the one that a checkpoint was made in
        self._blocks: list[nn.Module] = []
        self._handle: Any = None

    def attach(self, run: Run) -> None:
        self.path = self.stack or longest_list(run)
        blocks = run.model.get_submodule(self.path)
        if not isinstance(blocks, nn.ModuleList):
            raise TargetError(f"stack = {self.path!r} is a {type(blocks).__name__}.", "Name the nn.ModuleList of blocks.")
        if self.parts > len(blocks):
            raise BadValue(f"parts = {self.parts} of {len(blocks)} blocks.", "Give at most one chunk a block.")
        if taken := [n for n, b in blocks.named_children() if isinstance(b, Adapted) or "forward" in vars(b)]:
            raise TargetError(f"{self.path}.{taken[0]} is adapted as a whole, or its forward is patched.", "Adapt layers in it.")
        self._blocks, self.at = list(blocks), -1
        self.edges = [len(blocks) * k // self.parts for k in range(self.parts + 1)]
        self._optional = {s.site.name: s.marks.get("optional") for s in run.slots()}
        self._enter(run, self.part(run.step, run.total_steps))

    def part(self, step: int, total: int) -> int:
        """The chunk that learns in the update after ``step`` of ``total``."""
        inner = total - max(1, round(self.last * total))  # updates for all chunks but the last
        return self.parts - 1 if step >= inner else step * (self.parts - 1) // inner

    def rate(self, run: Run) -> float:
        return self.inner_rate if self.at < self.parts - 1 else 1.0

    def before_forward(self, run: Run) -> None:
        part = self.part(run.step, run.total_steps)
        if part != self.at:
            self._enter(run, part)

    def _enter(self, run: Run, part: int) -> None:
        """Chunk ``part`` learns: earlier ones are as they were left, later ones take no part."""
        self._let_all()
        first, end = max(self.edges[part] - self.overlap, 0), self.edges[part + 1]
        if run.optimizer is not None and part != self.resumed:
            for slot in run.slots():
                for _, t in slot.tensors():
                    run.optimizer.state.pop(t, None)
        for slot in run.slots():
            block = self._block_of(slot)
            mine = part == self.parts - 1 if block is None else first <= block < end
            for name, t in slot.tensors():
                t.requires_grad_(mine and name in self._learning(slot))
            out = block is not None and block >= end
            if out or self._optional[slot.site.name]:
                slot.marks["optional"] = True
            else:
                slot.marks.pop("optional", None)
        passed: list[Any] = [None]

        def remember(block: nn.Module, args: Any, output: Any) -> None:
            passed[0] = output

        self._handle = self._blocks[end - 1].register_forward_hook(remember)
        for block in self._blocks[end:]:
            block.forward = lambda *args, **kwargs: passed[0]
        self.at = part

    def _let_all(self) -> None:
        """Every block runs again."""
        if self._handle is not None:
            self._handle.remove()
        for block in self._blocks:
            vars(block).pop("forward", None)

    def _learning(self, slot: Slot) -> set[str]:
        """Names of the tensors that learn when their chunk does."""
        still = slot.how.frozen()
        return {n for n in slot.roles if not is_still(n, still)}

    def _block_of(self, slot: Slot) -> int | None:
        m = re.match(rf"{re.escape(self.path)}\.(\d+)\.", f"{slot.site.name}.")
        return int(m[1]) if m else None

    def detach(self, run: Run) -> None:
        if not self._blocks:
            return
        self._let_all()
        for slot in run.slots():
            for name, t in slot.tensors():
                t.requires_grad_(name in self._learning(slot))
            if self._optional[slot.site.name]:
                slot.marks["optional"] = True
            else:
                slot.marks.pop("optional", None)
        self._blocks = []

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resumed = int(state["at"])


def longest_list(run: Run) -> str:
    """The path of the longest list of modules that holds adapted sites in most of its items."""
    names = [s.site.name for s in run.slots()]
    lists = [(len(m), n) for n, m in run.model.named_modules() if isinstance(m, nn.ModuleList)
             and ".adapters" not in f".{n}" and any(name.startswith(f"{n}.") for name in names)]  # fmt: skip
    if not lists:
        raise TargetError("The model has no list of blocks that holds targets.", "Pass stack = its path.")
    return max(lists)[1]
