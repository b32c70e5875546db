"""A decoder layer that is run by a plan: the same object, its class replaced by a subclass that asks the plan first.

Installed where adapters are put, taken off with the last one. Whatever a plan does not serve — compiled code, transforms, autocast,
rows of several adapters, hooks on inner layers — goes through the layer's own forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.context import Context, Hub
from omnilora.core.layer import Adapted, base_modules, in_backward
from omnilora.core.standin import StandIn, outermost, own_class, stand_in
from omnilora.plans.blocks import llama
from omnilora.plans.blocks.llama import Block, Declined
from omnilora.plans.executor import plain
from omnilora.plans.rules import BLOCK_TOKENS

_plans: weakref.WeakKeyDictionary[nn.Module, State] = weakref.WeakKeyDictionary()


class State:
    """What is known of one layer: the hub, its plan, the adapters for which it was tried, and why it or a half is not fused."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.block: Block | None = None
        self.tried: tuple[Any, ...] | None = None
        self.refused: dict[str, str] = {}  # "layer", "attention", "pair" → reason


class Planned(StandIn):
    """Stands before a decoder layer's own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return run(self, super().forward, args, kwargs)  # type: ignore[misc]


# -- installing ---------------------------------------------------------------------------------------------------------------


def install(model: nn.Module, hub: Hub) -> None:
    """Plans for the decoder layers of ``model`` that hold adapters."""
    for _, layer in base_modules(model):
        if isinstance(layer, (Planned, Adapted)) or "forward" in vars(layer) or not llama.fits(layer):
            continue
        if any(isinstance(m, Adapted) for _, m in base_modules(layer)):
            layer.__class__ = stand_in(Planned, type(layer))
            _plans[layer] = State(hub)


def remove(model: nn.Module) -> None:
    """Every layer without adapters gets its own class back."""
    for _, layer in base_modules(model):
        if isinstance(layer, Planned) and outermost(layer) and not any(isinstance(m, Adapted) for _, m in base_modules(layer)):
            layer.__class__ = own_class(layer)
            _plans.pop(layer, None)


def refusals(model: nn.Module) -> dict[str, str]:
    """Path of a layer (and half) → why it is not run fused, as far as forwards have told."""
    return {f"{name}{'' if part == 'layer' else f' ({part})'}": why for name, layer in model.named_modules()
            if layer in _plans for part, why in _plans[layer].refused.items()}  # fmt: skip


# -- one forward ------------------------------------------------------------------------------------------------------------------


def run(layer: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    state = _plans.get(layer) or _found(layer)
    x = args[0] if len(args) == 1 else None if args else kwargs.get("hidden_states")
    if state is None or x is None or not _serves(layer, state, x, kwargs):
        return forward(*args, **kwargs)
    hub = state.hub
    ctx = hub.context()
    if torch.is_grad_enabled() and not ctx.recomputed and torch._C._current_graph_task_id() != -1:
        ctx = in_backward(hub, ctx)
    rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
    key = (ctx.active, hub.active, hub.roster, x.dtype, x.device, state.block is not None and state.block.still(layer))
    if state.tried != key:
        _try(layer, state, forward, x, rest, ctx)
        state.tried = (*key[:-1], state.block is not None)
    if "layer" in state.refused:
        return forward(*args, **kwargs)
    if (visits := hub.local.visits) is not None:
        visits.update(_adapted(layer))
    try:
        return _pass(layer, state, x, rest, ctx)
    except Declined as why:  # what was served at the trial is not any more
        state.refused["layer"] = str(why)
        return forward(*args, **kwargs)


def _adapted(layer: nn.Module) -> Iterator[int]:
    return (id(module.adapters) for _, module in base_modules(layer) if isinstance(module, Adapted))


def _found(layer: nn.Module) -> State | None:
    """The state of a layer that came out of a copy or a file."""
    inside = next((m for _, m in base_modules(layer) if isinstance(m, Adapted)), None)
    return None if inside is None else _plans.setdefault(layer, State(inside.adapters.hub))


def _serves(layer: Any, state: State, x: Any, kwargs: dict[str, Any]) -> bool:
    hub = state.hub
    if not isinstance(x, Tensor) or x.dim() != 3 or not plain(x) or hub.merged or hub.context().rows is not None:
        return False
    if not torch.is_grad_enabled() and x.shape[0] * x.shape[1] < BLOCK_TOKENS:
        return False
    if not isinstance(kwargs.get("position_embeddings"), tuple) or isinstance(layer, Adapted):
        return False
    return all(_untouched(m) for m in llama.inner(layer))


def _untouched(module: nn.Module) -> bool:
    """No hook, no forward of the instance's own."""
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
                or "forward" in vars(module))  # fmt: skip


def _pass(layer: Any, state: State, x: Tensor, kwargs: dict[str, Any], ctx: Context) -> Tensor:
    block = state.block
    assert block is not None
    if "attention" in state.refused:
        h, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)
        x = x + h
    else:
        x = block.attention(layer, ctx, x, dict(kwargs))
    if "pair" in state.refused:
        return x + layer.mlp(layer.post_attention_layernorm(x))
    return block.pair(layer, ctx, x)


def _try(layer: Any, state: State, forward: Callable[..., Any], x: Tensor, kwargs: dict[str, Any], ctx: Context) -> None:
    """Find what is served, and compare one pass of both kinds, without gradients, dropout, cache and reports."""
    state.refused.clear()
    kwargs = {k: v for k, v in kwargs.items() if k != "past_key_values"} | {"use_cache": False}
    hub = state.hub
    quiet = replace(ctx, recomputed=True)
    with torch.no_grad(), _still(layer), _seen(hub, quiet):
        try:
            state.block = Block(layer, x)
        except Declined as why:
            state.refused["layer"] = str(why)
            return
        for part, call in (("attention", lambda: state.block.attention(layer, quiet, x, dict(kwargs))),  # type: ignore[union-attr]
                           ("pair", lambda: state.block.pair(layer, quiet, x))):  # fmt: skip
            try:
                call()
            except Declined as why:
                state.refused[part] = str(why)
        if len(state.refused) == 2:
            state.refused["layer"] = state.refused["attention"]
            return
        want = forward(x, **kwargs)
        got = _pass(layer, state, x, kwargs, quiet)
        scale = (want - x).abs().max().clamp_min(1e-30)
        apart = ((got - want).abs().max() / scale).item()
        if not apart <= {torch.float64: 1e-9, torch.float32: 1e-4}.get(x.dtype, 0.1):
            state.refused["layer"] = f"the fused pass differs from the layer's own by {apart:.1e}"


@contextmanager
def _still(layer: nn.Module) -> Iterator[None]:
    """Evaluation mode, the hub's bookkeeping and torch's generator as they were."""
    training = [m for m in layer.modules() if m.training]
    state = torch.get_rng_state()
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True
        torch.set_rng_state(state)


@contextmanager
def _seen(hub: Hub, ctx: Context) -> Iterator[None]:
    before, visits = hub.local.context, hub.local.visits
    hub.local.context = ctx
    hub.local.visits = None if visits is None else set(visits)
    try:
        yield
    finally:
        hub.local.context, hub.local.visits = before, visits
