"""Small products that a form makes of its tensors, made for all slots of one shape at once at the model's entry.

A form that says how (:meth:`Parameterization.together`) gets one batched product for dozens of sites instead of one for each; its
``delta`` asks :func:`made` and works alone where nothing was made. What was made serves the forward under way, and its
recomputation in the backward pass, whose steps must be those of the first run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from omnilora.core.context import Context, Hub
from omnilora.core.parameterization import Parameterization, Slot

Group = list[Slot]


def make(hub: Hub, slots: Callable[[], Iterable[Slot]], used: set[str]) -> None:
    """For the adapters ``used`` of a forward with gradients; nested forms and function transforms work alone. ``slots``: gives
    those of the model, asked for after a change."""
    if not torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None or hub.context().recomputed:
        return
    if hub.groups is None or hub.groups[0] != hub.epoch:
        hub.groups = hub.epoch, _grouped(slots())
    found: dict[Slot, Any] = {}
    for group in hub.groups[1]:
        if group[0].adapter in used:
            found |= zip(group, group[0].how.together(group), strict=True)
    hub.local.made = hub.kept_made = found


def made(p: Slot, ctx: Context) -> Any:
    """What was made for the slot p, or None."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    host: Any = p.site.host if p.site.host is not None else p.site.layer
    hub: Hub = host.adapters.hub
    return (hub.kept_made if ctx.recomputed else hub.local.made).get(p)


def _grouped(slots: Iterable[Slot]) -> list[Group]:
    groups: dict[Any, Group] = {}
    for slot in slots:
        if getattr(type(slot.how), "together", Parameterization.together) is not Parameterization.together:
            shapes = tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in slot.tensors())
            groups.setdefault((slot.adapter, slot.how, shapes), []).append(slot)
    return list(groups.values())
