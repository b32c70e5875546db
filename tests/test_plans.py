"""Fused plans against the trees that they stand for: values, gradients, second derivatives, dropout, kept bytes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import omnilora as ol
from omnilora.contract import shake
from omnilora.plans import convolution, elementwise, executor, native, product, rules
from omnilora.plans.blocks import host, llama
from omnilora.plans.node import LowRank, Products, products
from omnilora.plans.product import Drop, Line
from omnilora.stores.coded import quantize_with
from omnilora.stores.nf4_layer import quantize

# a machine without a compiler has none, and runs what they are compared with
needs_kernels = pytest.mark.skipif(native.library() is None, reason=f"kernels cannot be built here: {native.reason()}")
METHODS = {
    "lora": {"r": 4}, "dora": {"r": 4}, "vera": {"r": 8}, "adalora": {}, "molora": {"experts": 3, "r": 2, "top_k": 2},
    "tt_lora": {}, "lora_fa": {"r": 4}, "tied_lora": {}, "loha": {},
}  # fmt: skip


def gap(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


# -- a decoder layer with fp64 arithmetic throughout -------------------------------------------------------------------------------


class Rms(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(1 + 0.2 * torch.randn(d)), 1e-5

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def model_of(family="Llama", dtype=torch.float32, layers=2, exact=False, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=50, **more)  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(0.2 * torch.randn_like(p))
    if exact:
        for layer in model.model.layers:
            layer.input_layernorm, layer.post_attention_layernorm = Rms(32).to(dtype), Rms(32).to(dtype)
    return model.eval()


def adapted(key, family="Llama", dtype=torch.float32, exact=False, **more):
    model = ol.adapt(model_of(family, dtype, exact=exact, **more), ol.method(key, **METHODS.get(key, {})))
    shake(model, size=0.1)
    return model


def found(model, second=False):
    """Logits and every first derivative; with ``second`` those of their squares."""
    torch.manual_seed(1)
    ids = torch.randint(0, 50, (2, 12))
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    inputs = [x, *ol.trainable(model)]
    y = model(inputs_embeds=x, use_cache=False).logits
    first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=second)
    if not second:
        return [y.detach(), *first]
    deeper = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
    return [y.detach(), *first, *(g for g in deeper if g is not None)]


def fused(model):
    """How many decoder layers run fused."""
    return sum(not host._plans[m].refused and host._plans[m].block is not None for m in model.modules() if m in host._plans)


@pytest.mark.parametrize("key", METHODS)
def test_a_block_gives_its_trees_values_gradients_and_second_derivatives_in_fp64(key):
    model = adapted(key, dtype=torch.float64, exact=True, attn_implementation="eager")
    with executor.off():
        want = found(model, second=True)
    got = found(model, second=True)
    assert fused(model) == 2, host.refusals(model)
    for a, b in zip(got, want, strict=True):
        assert gap(a, b) < 1e-11


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"])
@pytest.mark.parametrize("key", ["lora", "dora", "molora"])
def test_families_run_fused_in_fp32(family, key):
    model = adapted(key, family)
    with executor.off():
        want = found(model)
    got = found(model)
    assert fused(model) == 2, host.refusals(model)
    for a, b in zip(got, want, strict=True):
        assert gap(a, b) < 1e-5


@pytest.mark.parametrize("key", ["lora", "dora"])
def test_bf16_is_as_close_to_fp32_as_the_tree(key):
    model = adapted(key)
    want = found(model)
    half = copy.deepcopy(model)
    for name, p in half.named_parameters():
        if "adapters" not in name:
            p.data = p.data.bfloat16()
    got = found(half)
    with executor.off():
        tree = found(half)
    assert fused(half) == 2, host.refusals(half)
    assert sum(gap(a, b) for a, b in zip(got, want, strict=True)) < 1.1 * sum(gap(a, b) for a, b in zip(tree, want, strict=True))


@pytest.mark.parametrize("key", ["lora", "dora", "molora"])
@pytest.mark.parametrize("codec", ["nf4", "int4"])
def test_blocks_over_codes_are_their_trees_and_keep_no_weight(key, codec):
    base = model_of()
    quantize(base, codec, blocksize=32) if codec == "nf4" else quantize_with(base, codec)
    model = ol.adapt(base, ol.method(key, **METHODS[key]), exclude=["q_proj", "up_proj"])
    shake(model, size=0.1)
    held: dict[int, tuple[int, ...]] = {}
    with executor.off():
        want = found(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.update({t.data_ptr(): tuple(t.shape)}) or t, lambda t: t):
        got = found(model)
    assert fused(model) == 2, host.refusals(model)
    for a, b in zip(got, want, strict=True):
        assert gap(a, b) < 1e-5
    assert not {(32, 32), (16, 32), (80, 32), (32, 80)} & set(held.values())  # weights made dense
    with torch.no_grad():
        ids = torch.randint(0, 50, (2, 12))
        y = model(input_ids=ids).logits
        with executor.off():
            assert gap(y, model(input_ids=ids).logits) < 1e-5


def test_without_native_kernels_the_same_numbers(monkeypatch):
    model = adapted("dora")
    want = found(model)
    monkeypatch.setattr(elementwise, "serves", lambda *t: False)
    for a, b in zip(found(model), want, strict=True):
        assert gap(a, b) < 1e-5


# -- what is kept ------------------------------------------------------------------------------------------------------------------------


def kept(model):
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            held[s.data_ptr()] = s.nbytes()
        return t

    x = torch.randn(2, 16, 32, requires_grad=True)
    model(inputs_embeds=x, use_cache=False)  # the trial is over
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(inputs_embeds=x, use_cache=False).logits
    del y
    return sum(held.values())


def test_lora_keeps_seven_narrow_tensors_a_block_and_dropout_nothing_more():
    """The block's own bytes, and T·r for each of seven adapters."""
    none = ol.adapt(model_of(), ol.method("lora", r=4))
    ol.activate(none, None)
    base, tokens, r, layers = kept(none), 2 * 16, 4, 2
    assert fused(none) == 2
    assert kept(ol.adapt(model_of(), ol.method("lora", r=r))) - base == layers * 7 * tokens * r * 4
    dropped = ol.adapt(model_of(), ol.method("lora", r=r, dropout=0.1)).train()
    assert kept(dropped) - base == layers * 7 * tokens * r * 4


# -- dropout ---------------------------------------------------------------------------------------------------------------------------


def test_dropout_is_the_same_in_both_passes_and_follows_the_generator():
    torch.manual_seed(3)
    x, a, b = torch.randn(6, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    w = torch.randn(5, 8, dtype=torch.float64)
    line = Line(w, None, 0.7, A=a.requires_grad_(), B=b.requires_grad_())
    dropped = Drop(0.4, elementwise.draw_seed())
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: products(x, (line,), dropped)[0], (x, a, b))
    mask = elementwise.kept(x.shape, dropped.seed, 0.4, x.device)
    want = F.linear(x, w) + 0.7 * (torch.where(mask, x / 0.6, 0.0) @ a.T) @ b.T
    assert gap(products(x, (line,), dropped)[0], want) < 1e-12
    torch.manual_seed(5)
    first = elementwise.draw_seed()
    torch.manual_seed(5)
    assert elementwise.draw_seed() == first and elementwise.draw_seed() != first


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_masks_have_the_right_rate_and_no_pattern(p):
    """n = 2²⁰ bits: mean, neighbours, neighbouring seeds, and rows within 5 standard deviations of independence."""
    shape, n = torch.Size([1024, 1024]), 2**20
    sigma = (p * (1 - p) / n) ** 0.5
    masks = [elementwise.kept(shape, (s, 7), p, torch.device("cpu")).double() for s in (0, 1, 2, 123456)]
    masks.append(elementwise.kept(shape, (0, 8), p, torch.device("cpu")).double())
    for m in masks:
        assert abs(m.mean() - (1 - p)) < 5 * sigma
        assert (m.mean(1) - (1 - p)).abs().max() < 6 * (p * (1 - p) / 1024) ** 0.5
    centred = [(m - (1 - p)).flatten() for m in masks]
    for i, u in enumerate(centred):
        for shift in (1, 2, 64, 1024, 4096):
            assert abs((u * u.roll(shift)).mean()) < 5 * p * (1 - p) / n**0.5
        for v in centred[:i]:
            assert abs((u * v).mean()) < 5 * p * (1 - p) / n**0.5


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_kernels_equal_their_fallbacks(dtype, monkeypatch):
    torch.manual_seed(0)
    x, g, add, u = (torch.randn(37, 48).to(dtype) for _ in range(4))
    w, seed = torch.randn(48).to(dtype), (11, 2**32 - 1)
    c = torch.randn(48)
    c[3] = 0.0
    angle = torch.randn(1, 37, 12)
    cosine, sine = torch.cat((angle.cos(),) * 2, -1).to(dtype), torch.cat((angle.sin(),) * 2, -1).to(dtype)
    heads = torch.randn(2, 2, 37, 24).to(dtype).transpose(1, 2)

    def run():
        y, rstd = elementwise.rms_forward(x, w, 1e-5)
        z, _ = elementwise.rms_forward(x, w, 1e-5, 1.0, False)
        return [y, z, rstd, elementwise.rms_backward(g, x, w, rstd, add), elementwise.rms_backward(g, x, w, rstd, None, 1.0),
                elementwise.gated(x, u), *elementwise.gated_backward(g, x, u), elementwise.rope(heads, cosine, sine),
                elementwise.rope(heads, cosine, sine, back=True), elementwise.drop(x, seed, 0.3),
                elementwise.drop_add_(u.clone(), x, seed, 0.3), elementwise.magnify_(x.clone(), c), *elementwise.magnify_backward(g, u, c, False),
                *elementwise.magnify_backward(g, u, c, True)]  # fmt: skip

    fast = run()
    monkeypatch.setattr(elementwise, "serves", lambda *t: False)
    for a, b in zip(fast, run(), strict=True):
        assert gap(a, b) < (1e-6 if dtype == torch.float32 else 4e-3)  # bf16 keeps 8 bits: half a unit is 2e-3
    assert torch.equal(fast[11] == 0, elementwise.drop(x, seed, 0.3) == 0)


@needs_kernels
def test_norms_of_a_low_rank_sum_come_from_one_kernel_where_nobody_follows_them(monkeypatch):
    torch.manual_seed(0)
    w, b, a = torch.randn(19, 12), torch.randn(19, 5), torch.randn(5, 12)
    want = (w.double() + b.double() @ a.double()).square().sum(-1)
    with torch.no_grad():
        args = w.square().sum(-1), w @ a.t(), b, a
        assert gap(executor.squares(*args), want) < 1e-6
        with executor.off():
            assert executor.squares(*args) is None
        torch.func.vmap(lambda t: (t, executor.squares(args[0], args[1], t, a) is None or 1 / 0)[0])(b.unsqueeze(0))
        model = ol.adapt(nn.Sequential(nn.Linear(12, 19)), ol.method("dora", r=5))
        count = []
        was = elementwise.call
        monkeypatch.setattr(elementwise, "call", lambda name, *rest: (count.append(name), was(name, *rest))[1])
        model(torch.randn(40, 12))
    assert "low_rank_squares" in count
    assert executor.squares(*args) is None  # with gradients


# -- who is not served -------------------------------------------------------------------------------------------------------------------


def calls(model, monkeypatch):
    """Which projections are called as layers in one training forward."""
    seen = []
    was = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (seen.append(self.out_features), was(self, x))[1])
    model(input_ids=torch.randint(0, 50, (1, 20)))
    monkeypatch.undo()
    return len(seen)


def test_a_hook_inside_a_layer_is_called():
    model = adapted("lora")
    found(model)
    heard = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *a: heard.append(1))
    want = found(model)
    assert heard == [1]
    with executor.off():
        for a, b in zip(found(model), want, strict=True):
            assert gap(a, b) < 1e-5


def test_a_norm_that_learns_and_a_foreign_norm_are_left_alone():
    model = model_of()
    ol.adapt(model, ol.method("lora", r=2), unfreeze=["layers.0.input_layernorm"])
    found(model)
    assert fused(model) == 1 and any("layers.0" in name for name in host.refusals(model))

    class Other(Rms):
        def forward(self, x):
            return super().forward(x) + 0.1

    model = model_of()
    model.model.layers[1].post_attention_layernorm = Other(32)
    ol.adapt(model, ol.method("lora", r=2))
    found(model)
    assert fused(model) == 1


def test_a_layer_that_computes_something_else_is_found_out():
    model = model_of()
    first = model.model.layers[0]
    cls = type(first)
    odd = type(cls.__name__, (cls,), {"forward": lambda self, hidden_states, **k: 1.01 * cls.forward(self, hidden_states, **k)})
    first.__class__ = odd
    ol.adapt(model, ol.method("lora", r=2))
    found(model)
    assert "differs" in next(iter(host.refusals(model).values())) and fused(model) == 1


def test_layers_keep_their_class_in_copies_and_files_and_get_it_back():
    model = model_of()
    cls = type(model.model.layers[0])
    ol.adapt(model, ol.method("lora", r=2))
    layer = model.model.layers[0]
    assert isinstance(layer, cls) and type(layer) is not cls and type(layer).__name__ == cls.__name__
    shake(model, size=0.1)
    want = found(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [gap(a, b) for a, b in zip(found(twin), want, strict=True)] == pytest.approx([0] * len(want), abs=1e-5)
        assert [gap(a, b) for a, b in zip(found(model), want, strict=True)] == pytest.approx([0] * len(want), abs=1e-5)
    ol.detach(model)
    assert type(layer) is cls


def test_plans_hold_no_layer():
    model = adapted("lora")
    found(model)
    count = len(host._plans)
    del model
    gc.collect()
    assert len(host._plans) <= count - 2


def test_gradient_checkpointing_and_a_cache_give_the_same():
    model = adapted("lora").train()
    want = found(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(found(model), want, strict=True):
        assert gap(a, b) < 1e-6
    model.gradient_checkpointing_disable()
    ids = torch.randint(0, 50, (1, 24))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :20], use_cache=True)
        rest = model(input_ids=ids[:, 20:], past_key_values=first.past_key_values).logits
    assert gap(rest, whole[:, 20:]) < 1e-5


def test_padding_masks_reach_attention():
    model = adapted("lora")
    ids, mask = torch.randint(0, 50, (2, 18)), torch.ones(2, 18, dtype=torch.long)
    mask[0, :7] = 0
    got = model(input_ids=ids, attention_mask=mask).logits
    with executor.off():
        want = model(input_ids=ids, attention_mask=mask).logits
    assert gap(got[mask.bool()], want[mask.bool()]) < 1e-5


# -- without gradients ----------------------------------------------------------------------------------------------------------------------


def test_a_single_layer_without_gradients_follows_every_change():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    ol.adapt(model, ol.method("lora", r=2))
    shake(model)
    layer, x = model[0], torch.randn(3, 4, 6)
    slot = ol.slots(model)[0]

    def same():
        with torch.no_grad():
            y = model(x)
            assert layer.adapters.quick is not None and gap(model(x), y) == 0
            assert gap(y, F.linear(x, layer.weight, layer.bias) + slot.scale * x @ (slot.B @ slot.A).T) < 1e-6

    same()
    slot.A.data.mul_(2)
    same()
    layer.weight.data = layer.weight.data + 1
    same()
    slot.scale = 5.0
    same()
    ol.activate(model, None)
    with torch.no_grad():
        assert gap(model(x), F.linear(x, layer.weight, layer.bias)) < 1e-6
    ol.activate(model, "default")
    same()
    with torch.no_grad():
        other = {n: p + 1 for n, p in model.named_parameters()}
        got = torch.func.functional_call(model, other, x)
        a, b = (next(v for n, v in other.items() if n.endswith(k)) for k in (".A", ".B"))
        assert gap(got, F.linear(x, other["0.weight"], other["0.bias"]) + slot.scale * x @ (b @ a).T) < 1e-6
        heard = []
        handle = layer.register_forward_hook(lambda *a: heard.append(1))
        same()
        handle.remove()
        assert heard
    assert copy.deepcopy(model)[0].adapters.quick is None


@pytest.mark.parametrize("key", ["dora", "vera", "tt_lora", "adalora"])
@pytest.mark.parametrize("fused_step", [False, True])
def test_what_a_layer_keeps_without_gradients_is_made_again_after_a_change(key, fused_step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    ol.adapt(model, ol.method(key, **METHODS[key]))
    shake(model)
    x = torch.randn(3, 6)

    def same(kept=True):
        with torch.no_grad():
            y = model(x)
            assert not kept or isinstance(model[0].adapters.quick(x), torch.Tensor)
            again = model(x)
            with executor.off():
                want = model(x)
        assert gap(y, want) < 1e-6 and gap(again, want) < 1e-6

    same()
    optimizer = torch.optim.AdamW(ol.trainable(model), lr=0.1, fused=fused_step)
    model(x).sum().backward()
    same()
    optimizer.step()
    same()
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    same()
    ol.adapt(model, ol.method("lora", r=2), name="second")
    ol.activate(model, ["default", "second"])
    shake(model, "second")
    same(kept=key != "dora")  # a sum on top of magnitudes is no normal form


def test_the_short_way_is_taken_by_parts_of_a_model_and_made_once(monkeypatch):
    """Encoders are often called without their head: the root's forward never runs."""
    from omnilora.plans import quick

    made, was = [], quick._made
    monkeypatch.setattr(quick, "_made", lambda *a: (made.append(1), was(*a))[1])
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).eval()
    ol.adapt(model, ol.method("lora", r=2))
    shake(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        want = model[0](x)
        for _ in range(3):
            assert torch.equal(model[0].adapters.quick(x), want) and torch.equal(model[0](x), want)
        with torch.autocast("cpu", torch.bfloat16):
            model[0](x), model[0](x)
        assert len(made) == 1
        model[0].adapters.slots["default"][0].scale *= 2
        assert gap(model[0](x), want) > 1e-3
        assert len(made) == 2


def test_a_form_that_reads_the_context_is_built_anew_at_every_call():
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    ol.adapt(model, ol.method("dylora", r=4))
    shake(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        whole = model(x)
        assert model[0].adapters.quick is None
        with ol.context(model, rank=1):
            assert gap(model(x), whole) > 1e-3


@pytest.mark.parametrize("key", ["lora", "vera", "adalora", "tt_lora", "dora", "molora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_runs_fused_in_its_dtype(key, dtype):
    torch.manual_seed(0)
    model = ol.adapt(nn.Sequential(nn.Linear(24, 20)).to(dtype), ol.method(key, **METHODS[key])).eval()
    shake(model)
    x = torch.randn(40, 24, dtype=dtype).requires_grad_()
    inputs = [x, *ol.trainable(model)]

    def found():
        held = set()
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(lambda t: held.add(tuple(t.shape)) or t, lambda t: t):
            y = model(x)
        return y, torch.autograd.grad(y.double().sin().sum(), inputs), held

    with executor.off():
        want, slopes, kept_by_tree = found()
    y, grads, held = found()
    assert y.dtype == want.dtype and gap(y, want) < 2e-2
    for a, b, t in zip(grads, slopes, inputs, strict=True):
        assert a.dtype == t.dtype and gap(a, b) < 4e-2
    if key in ("lora", "vera", "adalora", "tt_lora") and dtype == torch.float32:
        assert {(20, 24), (24, 20)} & kept_by_tree and not {(20, 24), (24, 20)} & held  # the weight's copy in bf16


def test_a_form_that_reports_is_asked_at_every_call_with_gradients():
    from omnilora.parameterizations.lora import LoRA

    class Telling(LoRA):
        def delta(self, p, ctx):
            ctx.emit(p.site.name, "norm", p.B.detach().norm())
            return super().delta(p, ctx)

    model = nn.Sequential(nn.Linear(6, 5))
    ol.adapt(model, dataclasses.replace(ol.method("lora", r=2), parameterization=Telling(r=2)))
    for _ in range(2):
        with ol.context(model) as ctx:
            model(torch.randn(3, 6))
        assert [name for _, name, _ in ctx.sink] == ["norm"]
        ctx.sink.clear()
        model(torch.randn(3, 6))
        assert model[0].adapters.quick is None  # blocks ask it in contexts too


@pytest.mark.parametrize("change", ["form", "scale", "replaced", "frozen", "weight learns", "double", "eval"])
def test_a_training_layer_follows_every_change(change):
    """The short way with gradients against the tree, before and after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    ol.adapt(model, ol.method("lora", r=2))
    shake(model)
    x = torch.randn(3, 6, requires_grad=True)
    layer, slot = model[0], ol.slots(model)[0]

    def same():
        inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
        torch.manual_seed(1)
        got = torch.autograd.grad(model(x).square().sum(), inputs)
        with executor.off():
            torch.manual_seed(1)
            want = torch.autograd.grad(model(x).square().sum(), inputs)
        for a, b in zip(got, want, strict=True):
            assert gap(a, b) < 1e-6
        return got

    before = same()
    assert layer.adapters.quick is not None and layer.adapters.quick.own is not None
    if change == "form":
        slot.how = dataclasses.replace(slot.how, r=slot.how.r)
    elif change == "scale":
        slot.scale *= 3
    elif change == "replaced":
        slot.A = nn.Parameter(slot.A.detach() * 2)
    elif change == "frozen":
        slot.A.requires_grad_(False)
    elif change == "weight learns":
        layer.weight.requires_grad_(True)
    elif change == "double":
        model.double()
        x = x.detach().double().requires_grad_()
    elif change == "eval":
        model.eval()
    after = same()
    if change in ("scale", "replaced"):
        assert gap(after[0], before[0]) > 1e-3


@pytest.mark.parametrize("dropped", [Drop(), Drop(0.1, (1, 2))])
def test_a_node_keeps_x_once_and_nothing_wide(dropped):
    torch.manual_seed(0)
    x, w = torch.randn(10, 8, requires_grad=True), torch.randn(6, 8)
    line = Line(w, None, 1.0, A=torch.randn(2, 8, requires_grad=True), B=torch.randn(6, 2, requires_grad=True))
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape) or t, lambda t: t):
        (y,) = products(x, (line,), dropped)
    assert y.grad_fn.name() == (Products if dropped else LowRank).__name__ + "Backward"
    assert sorted(map(tuple, held)) == [(2, 8), (6, 2), (10, 2), (10, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_keeps_x_once_as_it_is(dtype):
    torch.manual_seed(0)
    model = ol.adapt(nn.Sequential(nn.Linear(8, 6).to(dtype)), ol.method("molora", experts=3, r=2, top_k=2))
    shake(model)
    x, held = torch.randn(10, 8, dtype=dtype, requires_grad=True), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.update({t.data_ptr(): t}) or t, lambda t: t):
        y = model(x)
    assert [t.dtype for t in held.values() if t.shape == x.shape] == [dtype]
    got = torch.autograd.grad(y.float().sin().sum(), [x, *ol.trainable(model)])
    with executor.off():
        want = torch.autograd.grad(model(x).float().sin().sum(), [x, *ol.trainable(model)])
    for a, b in zip(got, want, strict=True):
        assert gap(a, b) < (1e-6 if dtype == torch.float32 else 2e-2)


def test_fits_tells_decoder_layers_from_others():
    assert llama.fits(model_of().model.layers[0])
    assert not llama.fits(nn.TransformerEncoderLayer(8, 2))
    assert not llama.fits(model_of().model.layers[0].mlp)


@pytest.mark.parametrize("shape", [(3, {}), (2, {"stride": 2, "padding": 1}), (1, {"dilation": 2}), (2, {"channels_last": True})])
@pytest.mark.parametrize("key", ["lora", "vera", "tt_lora"])
@pytest.mark.parametrize("merged", [True, False])
def test_convolutions_without_groups_run_as_one_node(key, shape, merged, monkeypatch):
    monkeypatch.setattr(rules, "WRITTEN", 0 if merged else 1e9)
    torch.manual_seed(0)
    dim, options = shape[0], dict(shape[1])
    last = options.pop("channels_last", False)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](4, 6, 3, **options)
    model = nn.Sequential(layer, nn.Tanh()).double()
    ol.adapt(model, ol.method(key, **METHODS[key]), ["0"])
    shake(model)
    x = torch.randn(2, 4, *[7, 6, 5][:dim], dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    inputs = [x, *ol.trainable(model)]

    def derived():
        y = model(x)
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
        return [y, *torch.autograd.grad(model(x).sin().sum(), inputs), *first, *(g for g in second if g is not None)]

    nodes, reached = [model[0](x).grad_fn], set()
    while nodes:
        node = nodes.pop()
        reached.add(node.name())
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert "ConvolutionBackward" in reached
    with executor.off():
        want = derived()
    for a, b in zip(derived(), want, strict=True):
        assert gap(a, b) < 1e-12


def test_the_kernel_is_merged_where_there_are_many_positions():
    """(W + s B A) * x takes the narrow products only for dA and dB, and keeps x alone; in bf16 the sum would lose B A."""
    torch.manual_seed(0)
    A, weight, one = torch.randn(2, 36), torch.randn(8, 4, 3, 3), ((1, 1), (1, 1), (1, 1), 1)
    assert not convolution.merges(torch.randn(1, 4, 4, 4), weight, A, one)
    assert convolution.merges(torch.randn(1, 4, 32, 32), weight, A, one)
    assert not convolution.merges(torch.randn(1, 4, 32, 32), weight, A, ((16, 16), (1, 1), (1, 1), 1))
    assert not convolution.merges(torch.randn(1, 4, 32, 32, dtype=torch.bfloat16), weight, A, one)
    with warnings.catch_warnings(), torch.backends.mkldnn.flags(enabled=True, fp32_precision="bf16"):
        warnings.simplefilter("ignore")  # the flags complain when they are put back
        assert not convolution.merges(torch.randn(1, 4, 32, 32), weight, A, one)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    ol.adapt(model, ol.method("lora", r=2), ["0"])
    for size, h in ((4, [(1, 2, 4, 4)]), (32, [])):
        held = []
        keep = held.append
        with torch.autograd.graph.saved_tensors_hooks(lambda t, keep=keep: keep(tuple(t.shape)) or t, lambda t: t):
            model(torch.randn(1, 4, size, size))
        assert sorted(held) == sorted([(1, 4, size, size), (8, 4, 3, 3), (2, 36), (8, 2), *h])


# -- several slots at once -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["tt_lora", "loretta_rep"])
def test_trains_of_one_shape_are_contracted_together(key, monkeypatch):
    from omnilora.core import attach, together
    from omnilora.parameterizations import tensor_train

    model = adapted(key)
    count = []
    was = tensor_train.contract
    monkeypatch.setattr(tensor_train, "contract", lambda cores: (count.append(len(cores[0])), was(cores))[1])
    found(model)  # the trial is over
    count.clear()
    got = found(model)
    shapes = {tuple(t.shape for _, t in s.tensors()) for s in ol.slots(model)}
    assert len(shapes) < len(ol.slots(model)) == 14 and len(count) == 2 * len(shapes) and sum(count) == 28
    monkeypatch.setattr(together, "make", lambda *a: None)
    assert attach.together is together
    for a, b in zip(found(model), got, strict=True):
        assert gap(a, b) < 1e-5
    monkeypatch.undo()
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(found(model), got, strict=True):
        assert gap(a, b) < 1e-5
    copy.deepcopy(model)


def test_what_was_made_for_one_forward_is_gone_in_the_next():
    model = adapted("tt_lora")
    hub = model._omnilora
    x = torch.randn(1, 8, 32)
    model(inputs_embeds=x).logits.sum().backward()
    assert not hub.local.made
    before = model.model(inputs_embeds=x).last_hidden_state  # not through the entry
    shake(model, size=0.1)
    after = model.model(inputs_embeds=x).last_hidden_state
    with executor.off():
        assert gap(model.model(inputs_embeds=x).last_hidden_state, after) < 1e-5 < gap(before, after)
    after.sum().backward()


# -- how much is done, counted ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def products_of():
    """A list that holds the matrix products made inside, seen by the profiler: plans do not run under a dispatch mode."""
    seen = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield seen
    seen += [e.name for e in profile.events() if e.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")]


def test_a_block_makes_the_least_number_of_products():
    """Seven base products each way; four narrow ones of x (q, k, v share theirs, and gate and up), seven wide; backward as many of each
    kind for A, and seven for B and for h."""
    model = adapted("lora")
    layer, x = model.model.layers[0], torch.randn(1, 20, 32, requires_grad=True)
    place = torch.arange(20)[None]
    options = {"position_embeddings": model.model.rotary_emb(x, place), "attention_mask": None, "position_ids": place}
    layer(x, **options)
    assert host._plans[layer].block is not None and not host._plans[layer].refused
    with products_of() as forward:
        y = layer(x, **options)
    with products_of() as backward:
        y.sum().backward()
    assert len(forward) == 7 + 4 + 7
    assert len(backward) == 7 + 4 + 4 + 7 + 7


def test_a_mask_is_drawn_once_for_what_shares_an_input(monkeypatch):
    model = ol.adapt(model_of(layers=1), ol.method("lora", r=2, dropout=0.1)).train()
    x = torch.randn(1, 20, 32)
    model(inputs_embeds=x)
    seeds = []
    was = product.draw_seed
    monkeypatch.setattr(product, "draw_seed", lambda: (seeds.append(1), was())[1])
    model(inputs_embeds=x)
    assert len(seeds) == 4  # q k v; o; gate up; down


def test_a_merged_layer_and_another_active_set_leave_the_short_way():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    ol.adapt(model, ol.method("lora", r=2))
    shake(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        want = model(x)
        assert model[0].adapters.quick is not None
        report = ol.merge(model, probe=lambda m: m(x))
        assert report.largest < 1e-5 and gap(model(x), want) < 1e-5
        ol.unmerge(model)
        model._omnilora.active = ()
        assert gap(model(x), F.linear(x, model[0].weight, model[0].bias)) < 1e-6


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_kernels_do_not_read_the_default_dtype(default):
    torch.manual_seed(0)
    x, w, c = torch.randn(40, 8), torch.randn(8), torch.randn(8)
    want = [*elementwise.rms_forward(x, w, 1e-6), *elementwise.magnify_backward(x, x.flip(0), c, False)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = [*elementwise.rms_forward(x, w, 1e-6), *elementwise.magnify_backward(x, x.flip(0), c, False)]
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
