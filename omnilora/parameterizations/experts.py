"""Frozen LoRAs side by side, mixed by gates that a source makes — X-LoRA, Buehler & Buehler, 2024, arXiv:2402.07148.

y = W x + γ Σ_e s_e B_e A_e (σ_e ⊙ x) = W x + γ B (σ ⊗ 1_r) A x,   σ (batch, length, experts), for each site its own
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omnilora.core.attach import disabled
from omnilora.core.context import Context
from omnilora.core.op import Gate, Op, chain, softmax
from omnilora.core.parameterization import (
    Parameterization,
    Slot,
    Tensors,
    input_side,
    kaiming,
    output_side,
    router,
    zeros,
)
from omnilora.core.site import Site, role_of
from omnilora.errors import BadValue, ContextError


@dataclass(frozen=True)
class Experts(Parameterization):
    """``ranks`` of the frozen experts; A (Σr, in), B (out, Σr) with each expert's scale in B."""

    ranks: tuple[int, ...] = (8,)
    mergeable = False

    def check(self) -> None:
        if not self.ranks or any(r < 1 for r in self.ranks):
            raise BadValue(f"ranks = {self.ranks!r}.", "Give the rank of each expert.")

    def rank(self) -> int:
        return max(self.ranks)

    def frozen(self) -> frozenset[str]:
        return frozenset("AB")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        total = sum(self.ranks)
        return Tensors(A=input_side(kaiming(total, site.fan_in)), B=output_side(zeros(site.fan_out, total)))

    def delta(self, p: Slot, ctx: Context) -> Op:
        gates = ctx.get("expert_gates")
        if gates is None:
            return 0.0 * chain(p.B, p.A)

        def spread(x: Tensor) -> Tensor:
            g = gates[p.site.name] if isinstance(gates, dict) else gates  # (batch, length, experts)
            return g.repeat_interleave(torch.tensor(self.ranks, device=g.device), -1)

        return p.scale * chain(p.B, Gate(spread), p.A)


@dataclass(frozen=True)
class LastHiddenGates(Parameterization):
    """A source: gates from the base model's last hidden state, seen in a first pass with adapters off.

    ``depth`` linear layers of width ``hidden`` with ReLU between; ``layerwise`` gates for each site; ``top_k`` keeps
    the k largest of a token and renormalizes them with a softmax. ``sites``: the adapted ones, in order.
    """

    experts: int = 2
    sites: tuple[str, ...] = ()
    depth: int = 1
    hidden: int = 2048
    dropout: float = 0.2
    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    layerwise: bool = False
    read: str = ""

    def init(self, site: Site, seen: Any = None) -> Tensors:
        out = self.experts * (len(self.sites) if self.layerwise else 1)
        width = reader(site.layer, self.read).weight.shape[-1]
        widths = [width, *[self.hidden] * (self.depth - 1), out]
        made = Tensors()
        for i, (a, b) in enumerate(zip(widths, widths[1:])):
            made[f"w{i}"] = router(kaiming(b, a))
            made[f"b{i}"] = router(zeros(b))
        return made

    def make(self, model: nn.Module, p: Slot, args: Any, kwargs: Any) -> dict[str, Any]:
        if kwargs.get("past_key_values") is not None:
            raise ContextError("Both passes of this method must see the whole sequence.", "Generate with use_cache=False.")
        with disabled(model), torch.no_grad():
            h = last_hidden(model, self.read, args, kwargs)
        gates = self.gates(p, h)
        return {"expert_gates": gates}

    def gates(self, p: Slot, h: Tensor) -> Any:
        """h (batch, length, width) → gates (batch, length, experts), or {site: gates}."""
        for i in range(self.depth):
            if i:
                h = torch.nn.functional.dropout(torch.relu(h), self.dropout, p.training)
            h = torch.nn.functional.linear(h.to(p.w0.dtype), p.get_parameter(f"w{i}"), p.get_parameter(f"b{i}"))
        logits = h.unflatten(-1, (-1, self.experts)) / self.temperature  # (batch, length, sites or 1, experts)
        if self.top_k is not None and self.top_k < self.experts:
            kept = logits.topk(self.top_k, -1)
            low = torch.full_like(logits, -torch.inf) if self.softmax else torch.zeros_like(logits)
            logits = low.scatter(-1, kept.indices, kept.values)
        g = softmax(logits) if self.softmax else logits
        if not self.layerwise:
            return g.squeeze(-2)
        return {name: g[..., i, :] for i, name in enumerate(self.sites)}


def reader(model: nn.Module, read: str = "") -> nn.Module:
    """The layer whose input is the last hidden state: ``read``, or the first layer with the role of a head."""
    for name, layer in model.named_modules():
        if name and (name == read if read else role_of(name, layer) == "head"):
            return layer
    raise BadValue(f"No output head {read!r} is found.", "Pass read= with the path of the layer that reads the hidden state.")


def last_hidden(model: nn.Module, read: str, args: Any, kwargs: Any) -> Tensor:
    """What the output head reads in one forward."""
    caught: list[Tensor] = []
    handle = reader(model, read).register_forward_pre_hook(lambda layer, inputs: caught.append(inputs[0]))
    try:
        model(*args, **kwargs)
    finally:
        handle.remove()
    if not caught:
        raise ContextError("The output head was not called in the first pass.", "Pass read= with a layer that is.")
    return caught[0].detach()
