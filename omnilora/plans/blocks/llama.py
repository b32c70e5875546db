"""Decoder layers of the Llama family (Llama, Mistral, Qwen, Gemma, SmolLM and their like), run as three nodes.

A layer is recognised by its structure — two norms, attention with q, k, v and o, a gated pair with a down projection — and by
one trial: the fused pass must give what the layer's own forward gives. Everything else runs the layer as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnilora.core.context import Context
from omnilora.core.layer import Adapted
from omnilora.core.maps import build
from omnilora.core.site import Base, BaseLinear
from omnilora.core.standin import own_class
from omnilora.plans.blocks.nodes import Gated, GatedPair, Heads, Norm, Normed, Output, Pair, Projections, Turn
from omnilora.plans.executor import Way, constants_of, joined, routed
from omnilora.plans.node import constants, products
from omnilora.plans.normal import Normal, lower
from omnilora.plans.product import Drop, Line, drawn
from omnilora.plans.quick import standing
from omnilora.stores.quantized_layer import Dequantized, QuantizedLinear

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
PAIR = {"gate_proj", "up_proj", "down_proj"}


class Declined(Exception):
    """Why a layer, or a part of it, is not run fused."""


def fits(layer: nn.Module) -> bool:
    """Whether the layer has the structure."""
    if {n for n, m in layer._modules.items() if m is not None and n != "adapters"} != LAYER:
        return False
    attention, pair = layer.self_attn, layer.mlp
    inside = {n for n, m in attention._modules.items() if any(True for _ in m.parameters())} if attention is not None else set()
    gated = {n for n, m in pair._modules.items() if m is not None and any(True for _ in m.parameters())}
    own = [*layer._parameters, *attention._parameters, *pair._parameters]
    return (inside - HEAD_NORMS == ATTENTION and gated == PAIR and not own
            and all(hasattr(attention, n) for n in ("head_dim", "scaling", "config", "layer_idx")) and hasattr(pair, "act_fn"))  # fmt: skip


def inner(layer: nn.Module) -> list[nn.Module]:
    """The modules whose forwards a fused pass does not call."""
    own: Any = layer._modules
    attn, mlp = own["self_attn"]._modules, own["mlp"]._modules
    return [own["self_attn"], own["mlp"], own["input_layernorm"], own["post_attention_layernorm"],
            *(m for n, m in attn.items() if n not in HEAD_NORMS), *(m for m in mlp.values() if m is not None)]  # fmt: skip


# -- norms and activations, by trial ----------------------------------------------------------------------------------------


def norm_of(module: nn.Module, probe: Tensor) -> Norm:
    """The constants of an RMS norm, found by running it on ``probe`` (rows, d)."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(module, Adapted) or weight is None or len(module._parameters) != 1 or not isinstance(eps, float):
        raise Declined(f"{type(module).__name__} is no plain RMS norm")
    if weight.requires_grad or weight.dtype != probe.dtype:
        raise Declined("the norm learns or has another dtype")
    with torch.no_grad():
        want = module(probe)
        tries = [Norm(weight, eps, 0.0, True), Norm(weight, eps, 0.0, False), Norm(weight, eps, 1.0, False), Norm(weight, eps, 1.0, True)]
        apart = [(n.formula(probe) - want).abs().max().item() for n in tries]
    best = min(range(4), key=apart.__getitem__)
    if not apart[best] <= 1e-5 * want.abs().max().item():
        raise Declined(f"{type(module).__name__} is no RMS norm")
    return tries[best]


def act_of(module: Callable[[Tensor], Tensor]) -> str:
    with torch.no_grad():
        x = torch.linspace(-6, 6, 64)
        try:
            got = module(x)
        except Exception as error:
            raise Declined(f"the activation does not run alone: {error}") from error
    for name, f in (("silu", F.silu), ("gelu_tanh", lambda t: F.gelu(t, approximate="tanh"))):
        if torch.allclose(got, f(x), rtol=1e-5, atol=1e-6):
            return name
    raise Declined("the gate's activation is neither SiLU nor GELU (tanh)")


# -- lines -------------------------------------------------------------------------------------------------------------------


def normal_of(module: nn.Module, ctx: Context, x: Tensor) -> Normal:
    """The adapted map of a linear layer that reads x, in normal form over constants."""
    if not isinstance(module, Adapted):
        plain = type(module) is nn.Linear or type(module).forward is QuantizedLinear.forward
        if not plain or any(p.requires_grad for p in module.parameters()):
            raise Declined(f"{type(module).__name__} is no constant linear layer")
        return Normal(None)
    mine = module.adapters
    if own_class(module).forward not in (nn.Linear.forward, QuantizedLinear.forward) or mine.inner is not None or mine.merged:
        raise Declined("a linear layer has a forward of its own")
    found = standing(module, mine, x) if ctx.active is None else None
    if found is not None and constants_of(found.base, x)[0] is not None:  # type: ignore[arg-type]
        return found
    active = mine.hub.active if ctx.active is None else ctx.active
    pairs = [(s, w) for name, w in active if name in mine.slots for s in mine.slots[name] if s.site.kind != "source"]
    if not pairs:
        return Normal(None)
    if any(not s.site.called for s, _ in pairs):
        raise Declined("a tensor of a linear layer is adapted by itself")
    normal = lower(build(Base(pairs[0][0].site, module, own_class(module).forward.__get__(module)), pairs, ctx))
    if normal.base is None or constants_of(normal.base, x)[0] is None:
        plain = isinstance(normal.base, (Base, BaseLinear))
        raise Declined("the base is no plain constant weight in the data's dtype" if plain
                       else f"{type(pairs[0][0].how).__name__} is applied by its tree")  # fmt: skip
    return normal


def dropout_of(normals: list[Normal]) -> Drop:
    rates = {k.p for n in normals for k in n.low}
    if len(rates) > 1:
        raise Declined("adapters of one input drop at different rates")
    return drawn(rates.pop() if rates else 0.0)


def line_of(module: Any, normal: Normal, x: Tensor, way: Way | None = None) -> Line:
    """``x``: data of the line's dtype, the tokens themselves where gates read them; ``way``: what they gave, where a linear router
    told them."""
    if normal.base is None:
        return Line(Dequantized(module) if isinstance(module, QuantizedLinear) else module.weight, module.bias)
    weight, bias = constants_of(normal.base, x)
    if not normal.low:
        return Line(weight, bias, c=normal.c, b=normal.b)
    if way is not None:
        return way.line(weight, bias, None, normal)
    s, a, b, d = joined(normal.low, x)
    return Line(weight, bias, s, A=a, B=b, D=d, c=normal.c, b=normal.b)


def _rows(module: Any) -> int:
    """Of the weight: a layer cut by hand often tells an old width."""
    return int(module.out_features if isinstance(module, QuantizedLinear) else module.weight.shape[0])


def gates_in(normals: list[Normal]) -> bool:
    return any(k.gates for n in normals for k in n.low)


# -- one pass ------------------------------------------------------------------------------------------------------------------


class Block:
    """The constants of one decoder layer, and its two halves as fused passes. Holds no layer."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        probe = torch.linspace(-2, 3, 4 * x.shape[-1], device=x.device).sin().view(4, -1).to(x.dtype)
        self.norms = (norm_of(layer.input_layernorm, probe), norm_of(layer.post_attention_layernorm, probe))
        self.act = act_of(layer.mlp.act_fn)

    def still(self, layer: Any) -> bool:
        return (layer.input_layernorm._parameters.get("weight") is self.norms[0].w
                and layer.post_attention_layernorm._parameters.get("weight") is self.norms[1].w)  # fmt: skip

    def attention(self, layer: Any, ctx: Context, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """x (batch, length, d) + o(attention(norm x))."""
        attn = layer.self_attn
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        normals, last = [normal_of(m, ctx, x) for m in projections], normal_of(attn.o_proj, ctx, x)
        cosine, sine = kwargs.pop("position_embeddings")
        module, own = sys.modules[type(attn).__module__], attn._modules.get("q_norm") is not None
        norm, inner, residual, dropped = self.norms[0], x, x, dropout_of(normals)
        ways: list[Way | None] = [None] * 3
        if gates_in(normals):
            residual, inner = Normed.apply(norm, x)
            norm = None
            inner, ways = routed(normals, inner, dropped)
        lines = tuple(line_of(m, n, inner, w) for m, n, w in zip(projections, normals, ways))
        spec = Heads(constants(lines), dropped, norm, None if own else Turn(cosine, sine),
                     tuple(_rows(m) // attn.head_dim for m in projections), attn.head_dim)  # fmt: skip
        through, q, k, v = Projections.apply(spec, inner, *[t for line in lines for t in line.learned])
        if own:
            q, k = (m(t.transpose(1, 2)).transpose(1, 2) for m, t in ((attn.q_norm, q), (attn.k_norm, k)))
            q, k = module.apply_rotary_pos_emb(q, k, cosine, sine)  # type: ignore[attr-defined]
        a = attend(attn, module, q, k, v, kwargs)
        dropped = dropout_of([last])
        a, (way,) = routed([last], a, dropped)
        line = line_of(attn.o_proj, last, a, way)
        return Output.apply(*constants((line,)), dropped, through if norm is not None else residual, a, *line.learned)  # type: ignore[no-any-return]

    def pair(self, layer: Any, ctx: Context, x: Tensor) -> Tensor:
        """x (batch, length, d) + down(act(gate(norm x)) ⊙ up(norm x))."""
        mlp = layer.mlp
        normals = [normal_of(m, ctx, x) for m in (mlp.gate_proj, mlp.up_proj)]
        last = normal_of(mlp.down_proj, ctx, x)
        if gates_in([*normals, last]):
            residual, inner = Normed.apply(self.norms[1], x)
            dropped, after = dropout_of(normals), dropout_of([last])
            inner, ways = routed(normals, inner, dropped)
            lines = tuple(line_of(m, n, inner, w) for m, n, w in zip((mlp.gate_proj, mlp.up_proj), normals, ways))
            e, u = products(inner.flatten(0, 1), lines, dropped)
            p, (way,) = routed([last], Gated.apply(e, u, self.act).view(*x.shape[:2], -1), after)
            down = line_of(mlp.down_proj, last, p, way)
            return Output.apply(*constants((down,)), after, residual, p, *down.learned)  # type: ignore[no-any-return]
        lines = tuple(line_of(m, n, x) for m, n in zip((mlp.gate_proj, mlp.up_proj), normals))
        down = line_of(mlp.down_proj, last, x)
        spec = Pair(constants(lines), constants((down,))[0], dropout_of(normals), dropout_of([last]), self.norms[1], self.act)
        return GatedPair.apply(spec, x, *[t for line in (*lines, down) for t in line.learned])  # type: ignore[no-any-return]


def attend(attn: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """transformers' own attention function on q, k, v (batch, heads, length, d) → (batch, length, heads · d)."""
    mask, cache = kwargs.pop("attention_mask", None), kwargs.pop("past_key_values", None)
    if cache is not None:
        k, v = cache.update(k, v, attn.layer_idx)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    call = ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, module.eager_attention_forward)
    window = {}
    if hasattr(attn, "sliding_window") or getattr(attn.config, "sliding_window", None) is not None:
        window = {"sliding_window": getattr(attn, "sliding_window", getattr(attn.config, "sliding_window", None))}
    drop = attn.attention_dropout if attn.training else 0.0
    a, _ = call(attn, q, k, v, mask, dropout=drop, scaling=attn.scaling, **window, **kwargs)
    return a.reshape(*a.shape[:2], -1).contiguous()
