"""One hook on attention: what a layer's attention function is given, changed before it is computed.

transformers looks the function up by the name in the layer's configuration. A hooked layer's configuration names ours,
``omnilora_<before>``, which lets every change of the layer act on (q, k, v, mask) and hands on to the function before.
Layers without a change pass through. Taking the last change off puts the old name back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.layer import Adapted
from omnilora.errors import AttachError, ContextError, need

PREFIX = "omnilora_"


@dataclass(frozen=True)
class Call:
    """q (batch, heads, queries, d), k and v (batch, kv heads, keys, d), an additive ``mask`` (batch or 1, heads or 1,
    queries, keys) or None where every query sees every key."""

    layer: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None

    def visible(self) -> Tensor:
        """The mask, made where there is none."""
        return self.q.new_zeros(1, 1, self.q.shape[-2], self.k.shape[-2]) if self.mask is None else self.mask

    def with_keys(self, k: Tensor, v: Tensor) -> Call:
        """(n, kv heads, d) keys and values before all others, seen by every query."""
        n, batch = k.shape[0], self.q.shape[0]
        k, v = (t.to(self.k.dtype).movedim(0, 1).expand(batch, -1, -1, -1) for t in (k, v))
        mask = None if self.mask is None else torch.nn.functional.pad(self.mask, (n, 0))
        return replace(self, k=torch.cat((k, self.k), -2), v=torch.cat((v, self.v), -2), mask=mask)

    def without(self, drop: Tensor) -> Call:
        """Keys with ``drop`` (broadcastable to batch, heads, queries, keys) get no weight."""
        seen = self.visible()
        return replace(self, mask=torch.where(drop, torch.finfo(seen.dtype).min, seen))


Change = Callable[[Call], Call]


def is_attention(layer: nn.Module) -> bool:
    """A layer of transformers whose attention function can be looked up and changed."""
    own = vars(layer)
    return "is_causal" in own and "config" in own


def hook(layer: nn.Module, change: Change) -> None:
    """Let ``change`` act on every call of the layer's attention. Raises :class:`AttachError` on other layers."""
    if not is_attention(layer):
        raise AttachError(f"{type(layer).__name__} is no attention layer of transformers.",
                          "Target attention layers: 'block:attention-layer'.")  # fmt: skip
    config: Any = layer.config
    before = config._attn_implementation or "eager"
    if not before.startswith(PREFIX):
        if before not in ("eager", "sdpa"):
            raise AttachError(f"Attention is computed by {before!r}, which takes no mask of ours.",
                              "Load the model with attn_implementation='sdpa'.")  # fmt: skip
        _register(before)
        config._attn_implementation = PREFIX + before
    changes = vars(layer).setdefault("_omnilora_changes", [])
    if change not in changes:
        changes.append(change)


def unhook(layer: nn.Module, change: Change, model: nn.Module) -> None:
    """Take ``change`` off again; configurations whose layers are all free get their function's name back."""
    changes = vars(layer).get("_omnilora_changes", [])
    if change in changes:
        changes.remove(change)
    if not changes:
        vars(layer).pop("_omnilora_changes", None)
    held = {id(m.config) for m in model.modules() if vars(m).get("_omnilora_changes")}
    for m in model.modules():
        config: Any = vars(m).get("config")
        name = getattr(config, "_attn_implementation", None)
        if name is not None and name.startswith(PREFIX) and id(config) not in held:
            config._attn_implementation = name.removeprefix(PREFIX)


def slots_attend(call: Call) -> Call:
    """The changes that the layer's active adapters make: one for all forms on attention layers."""
    layer = call.layer
    if not isinstance(layer, Adapted):
        return call
    hub = layer.adapters.hub
    ctx = hub.context()
    for name, weight in hub.active if ctx.active is None else ctx.active:
        for slot in layer.adapters.slots.get(name, ()):
            if weight != 1.0:
                raise ContextError(f"Adapter {name!r} has weight {weight:g}, but it changes attention.", "Give it weight 1.")
            call = slot.how.attend(slot, ctx, call)
    return call


def unhook_slots(layer: nn.Module, model: nn.Module) -> None:
    """Take :func:`slots_attend` off a layer that has no adapter any more."""
    if not (isinstance(layer, Adapted) and layer.adapters.slots):
        unhook(layer, slots_attend, model)


def _register(before: str) -> None:
    masks, functions = need("transformers.masking_utils", "train"), need("transformers.modeling_utils", "train")
    functions.ALL_ATTENTION_FUNCTIONS.register(PREFIX + before, partial(attend, before))
    masks.ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + before, masks.eager_mask)


def attend(before: str, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
           **options: Any) -> Any:  # fmt: skip
    """The attention function: changes first, then ``before``."""
    mask = attention_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    if mask is None and query.shape[-2] > 1 and vars(layer).get("is_causal") and options.get("is_causal") is not False:
        rows, columns = query.shape[-2], key.shape[-2]
        later = torch.ones(rows, columns, dtype=torch.bool, device=query.device).triu(columns - rows + 1)
        mask = query.new_zeros(1, 1, rows, columns).masked_fill(later, torch.finfo(query.dtype).min)
    call = Call(layer, query, key, value, mask)
    for change in vars(layer).get("_omnilora_changes", ()):
        call = change(call)
    inner = _function(before, layer)
    return inner(layer, call.q, call.k, call.v, call.mask, **{**options, "is_causal": False} if before == "sdpa" else options)


def _function(before: str, layer: nn.Module) -> Callable[..., Any]:
    functions = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    home = sys.modules[type(layer).__module__]
    return functions.get_interface(before, vars(home).get("eager_attention_forward"))
