"""Virtual keys and values before the real ones — prefix tuning in LLM-Adapters, Hu et al., EMNLP 2023, arXiv:2304.01933.

    softmax(q [P_k; K]ᵀ/√d) [P_v; V],   P_k, P_v (n, kv heads, d) of each attention layer

Keys are compared after rotary positions have been applied, and positions of real tokens are not shifted. With a shift by
n (a prefix that is handed over as a cache) a rotary model has the same family of maps: q_{t+n} · P = q_t · R_nᵀ P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from omnilora.attention.hook import Call, hook, is_attention, slots_attend, unhook_slots
from omnilora.core.context import Context
from omnilora.core.op import Op
from omnilora.core.parameterization import Parameterization, Slot, Tensors, core, normal, positive_rank
from omnilora.core.site import Site
from omnilora.errors import NotExpressible


@dataclass(frozen=True)
class Prefix(Parameterization):
    """``n`` virtual tokens; ``hidden`` > 0: made from an embedding (n, width) by linear, tanh, linear of that width."""

    n: int = 10
    hidden: int = 0
    std: float = 1.0
    mergeable = False

    def check(self) -> None:
        positive_rank(self.n, "n")

    def init(self, site: Site, seen: Any = None) -> Tensors:
        if not is_attention(site.layer):
            raise NotExpressible(f"{site.name} is no attention layer of transformers.", "Target 'block:attention-layer'.")
        size = 2 * _kv_width(site.layer)
        if self.hidden == 0:
            return Tensors(P=core(normal(self.std, self.n, size)))
        width = site.fan_in
        return Tensors(
            E=core(normal(self.std, self.n, width)),
            W1=core(normal(width**-0.5, self.hidden, width)),
            b1=core(torch.zeros(self.hidden)),
            W2=core(normal(self.hidden**-0.5, size, self.hidden)),
            b2=core(torch.zeros(size)),
        )

    def table(self, p: Slot) -> torch.Tensor:
        """[P_k | P_v] (n, 2 · kv heads · d)."""
        if self.hidden == 0:
            return p.P
        h = torch.tanh(torch.nn.functional.linear(p.E, p.W1, p.b1))
        return torch.nn.functional.linear(h, p.W2, p.b2)

    def adapt(self, W: Op, p: Slot, ctx: Context) -> Op:
        return W

    def attend(self, p: Slot, ctx: Context, call: Call) -> Call:
        k, v = self.table(p).chunk(2, -1)
        shape = (self.n, call.k.shape[1], call.k.shape[-1])
        return call.with_keys(k.reshape(shape), v.reshape(shape))

    def placed(self, site: Site, model: nn.Module) -> None:
        hook(site.layer, slots_attend)

    def removed(self, site: Site, model: nn.Module) -> None:
        unhook_slots(site.layer, model)


def _kv_width(layer: Any) -> int:
    """Columns of the keys of one token: kv heads · d."""
    config = layer.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

