"""How many steps optimizers have taken: a fused one changes parameters without a trace in their versions."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

_taken = 0


def _count(*_: Any) -> None:
    global _taken
    _taken += 1


register_optimizer_step_post_hook(_count)  # type: ignore[no-untyped-call]


def taken() -> int:
    """Steps of all optimizers of the process."""
    return _taken
