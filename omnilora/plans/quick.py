"""One adapted linear layer without gradients, with as little between the call and the products as there can be.

    y = x Wᵀ + bias + s (x Aᵀ) Bᵀ

A closure over the layer's own tensors: nothing is copied, so nothing can go stale. It answers None whenever the call is not the
one it was made for, and the layer's general forward answers instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnilora.core.context import EMPTY
from omnilora.core.layer import Adapters, build
from omnilora.core.site import Base
from omnilora.plans import executor
from omnilora.plans.normal import lower

Quick = Callable[[Tensor], Tensor | None]


def quicken(layer: Any, mine: Adapters) -> Quick | None:
    """The closure for the active set, or None where the map is not one low-rank term whose factors are the slot's own parameters."""
    hub = mine.hub
    slots = [(s, w) for name, w in hub.active for s in mine.slots.get(name, ())]
    if len(slots) != 1 or mine.inner is not None or type(layer)._base.forward is not nn.Linear.forward:
        return None
    (slot, weight), (params, own) = slots[0], (layer._parameters, slots[0][0]._parameters)
    if not slot.site.called or not executor.serves():
        return None
    base = Base(slot.site, layer, nn.Linear.forward.__get__(layer))
    normal = lower(build(base, [(slot, weight)], EMPTY))
    if normal is None or normal.base is not base or base.plain_weight is None or normal.c is not None or normal.b is not None:
        return None
    (low,) = normal.low if len(normal.low) == 1 else (None,)
    names = {id(t): n for n, t in own.items()}
    if low is None or low.D is not None or low.gates or low.p or id(low.A) not in names or id(low.B) not in names:
        return None
    a_name, b_name = names[id(low.A)], names[id(low.B)]
    a, b, s, w, how, scale = low.A, low.B, low.s, params["weight"], slot.how, slot.scale
    epoch, local, dtype, training = hub.epoch, hub.local, w.dtype, slot.training
    cast = a.dtype != dtype or b.dtype != dtype
    grad, stack, auto, forward_ad = torch.is_grad_enabled, torch._C._functorch.peek_interpreter_stack, torch.is_autocast_enabled, torch.autograd.forward_ad

    def quick(x: Tensor) -> Tensor | None:
        if (hub.epoch != epoch or local.context is not EMPTY or hub.visits is not None or grad() or type(x) is not Tensor
                or x.dtype is not dtype or stack() is not None or forward_ad._current_level >= 0 or not executor.serves()
                or params["weight"] is not w or own[a_name] is not a or own[b_name] is not b or w.dtype is not dtype
                or slot.how is not how or slot.scale != scale or slot.training is not training or auto(x.device.type)):  # fmt: skip
            return None
        y = F.linear(x, w, params["bias"])
        h = F.linear(x, a.to(dtype) if cast else a)
        bt = (b.to(dtype) if cast else b).t()
        if y.dim() == 2:
            return y.addmm_(h, bt, alpha=s)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), bt, alpha=s)
        return y

    return quick
