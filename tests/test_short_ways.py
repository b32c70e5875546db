"""When a layer's short way is looked for, what it may leave behind, and what ends it; routers and blocks beside it."""

from __future__ import annotations

import dataclasses
import gc
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import omnilora as ol
from omnilora.contract import shake
from omnilora.core import proven
from omnilora.parameterizations.lora import LoRA
from omnilora.plans import executor, quick
from omnilora.plans.blocks import host

METHODS = {"lora": {"r": 2}, "dora": {"r": 2}, "vera": {"r": 8}, "loha": {}, "tied_lora": {}, "randlora": {}, "lotr": {}, "nola": {},
           "molora": {"experts": 3, "r": 2, "top_k": 2}}  # fmt: skip


def adapted(key, *layers):
    torch.manual_seed(0)
    model = nn.Sequential(*(layers or (nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)))).eval()
    ol.adapt(model, ol.method(key, **METHODS[key]))
    shake(model)
    return model


def gap(a, b):
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize("key", METHODS)
def test_the_first_forward_may_be_checkpointed(key):
    model, x = adapted(key), torch.randn(5, 12, requires_grad=True)
    inputs = [x, *ol.trainable(model)]
    for _ in range(2):  # the second after a change
        got = torch.autograd.grad(checkpoint(model, x, use_reentrant=False, context_fn=ol.checkpoint_context(model)).sin().sum(), inputs)
        with executor.off():
            want = torch.autograd.grad(model(x).sin().sum(), inputs)
        assert max(gap(a, b) for a, b in zip(got, want, strict=True)) < 1e-5
        ol.activate(model, "default")


@pytest.mark.parametrize("key", ["lora", "dora", "vera", "loha", "tied_lora"])
def test_the_first_forward_may_be_transformed_and_counted(key):
    model, x = adapted(key), torch.randn(5, 12)
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    slopes = torch.func.grad(lambda t: torch.func.functional_call(model, t, x).sin().sum())(tensors)
    counts = []
    for _ in range(2):
        ol.activate(model, "default")
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                model(x)
            counts.append(counter.get_total_flops())
    assert len(set(counts)) == 1
    with executor.off():
        want = torch.autograd.grad(model(x).sin().sum(), [p for p in model.parameters() if p.requires_grad])
    assert max(gap(a, b) for a, b in zip(slopes.values(), want, strict=True)) < 1e-5


@pytest.mark.parametrize("key", ["lora", "vera", "lotr", "nola", "randlora"])
@pytest.mark.parametrize("learns", [True, False])
def test_what_is_made_under_autocast_is_not_rounded(key, learns):
    model, x = adapted(key), torch.randn(5, 12)
    with torch.set_grad_enabled(learns), torch.autocast("cpu", torch.bfloat16):
        model(x)
    with torch.no_grad():
        got = model(x)
        with executor.off():
            assert gap(got, model(x)) < 1e-6


def test_looking_draws_nothing():
    class Drawing(LoRA):
        def delta(self, p, ctx):
            return float(1 + torch.rand(())) * super().delta(p, ctx)

    model = nn.Sequential(nn.Linear(4, 4))
    ol.adapt(model, dataclasses.replace(ol.method("lora", r=2), parameterization=Drawing(r=2)))
    states = []
    for plans in (True, False):
        torch.manual_seed(3)
        if plans:
            model(torch.ones(2, 4))
        else:
            with executor.off():
                model(torch.ones(2, 4))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("frozen", ["x", "R", "A", "B"])
def test_second_derivatives_where_a_part_does_not_learn(frozen):
    model = adapted("molora", nn.Linear(6, 6)).double()
    x = torch.randn(5, 6, dtype=torch.float64).requires_grad_(frozen != "x")
    if frozen != "x":
        getattr(ol.slots(model)[0], frozen).requires_grad_(False)
    inputs = [t for t in (x, *model.parameters()) if t.requires_grad]

    def found():
        first = torch.autograd.grad(model(x).sin().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    got = found()
    with executor.off():
        assert max(gap(a, b) for a, b in zip(got, found(), strict=True)) < 1e-12


def test_routers_with_rows_let_the_base_run_once(monkeypatch):
    model = adapted("molora", nn.Linear(6, 6))
    ol.adapt(model, ol.method("molora", experts=2, r=2), name="other")
    shake(model, "other")
    shapes, was = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, b=None: (shapes.append(tuple(x.shape)) if w is model[0].weight else None, was(x, w, b))[1])
    with ol.context(model, rows=["default", "other", "default", None]):
        model(torch.randn(4, 6))
    assert shapes == [(4, 6)]


def test_a_router_reports_once_where_no_plan_serves():
    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    model = adapted("molora", Wide(6, 6))
    with ol.context(model) as ctx:
        model(torch.randn(4, 6))
    assert [name for _, name, _ in ctx.sink] == ["router_logits"]


def test_a_form_that_reports_is_heard_in_every_row():
    class Telling(LoRA):
        def delta(self, p, ctx):
            ctx.emit(p.site.name, "norm", p.B.detach().norm())
            return super().delta(p, ctx)

    model = nn.Sequential(nn.Linear(6, 5)).eval()
    for name in "ab":
        ol.adapt(model, dataclasses.replace(ol.method("lora", r=2), parameterization=Telling(r=2)), name=name)
    with torch.no_grad(), ol.context(model, rows=["a", "b", None]) as ctx:
        model(torch.randn(3, 6))
    assert [name for _, name, _ in ctx.sink] == ["norm", "norm"]


@pytest.mark.parametrize("learns", [True, False])
def test_a_set_that_is_chosen_meanwhile_is_the_one_that_runs(learns, monkeypatch):
    model, x = adapted("lora", nn.Linear(6, 6)), torch.randn(3, 6)
    ol.adapt(model, ol.method("lora", r=2), name="b")
    shake(model, "b", size=3.0)
    ol.activate(model, "default")
    was = quick.lower

    def lower(op):
        monkeypatch.setattr(quick, "lower", was)
        ol.activate(model, "b")
        return was(op)

    monkeypatch.setattr(quick, "lower", lower)
    with torch.set_grad_enabled(learns):
        model(x)
        got = model(x)
        with executor.off():
            assert ol.active(model) == {"b": 1.0} and gap(got, model(x)) < 1e-6


@pytest.mark.parametrize("key", ["randlora", "loha", "vera", "nola"])
def test_training_leaves_nothing_on_a_layer(key):
    model = adapted(key)
    model(torch.randn(3, 12)).sum().backward()
    assert model[0].adapters.quick is None
    with torch.no_grad():
        model(torch.randn(3, 12))
    assert model[0].adapters.quick is not None and model[0].adapters.quick.normal.low == ()


def test_the_short_way_is_taken_under_a_run(monkeypatch):
    model, count = adapted("lora"), []
    was = quick.Own.learn
    monkeypatch.setattr(quick.Own, "learn", lambda self, x: (count.append(1), was(self, x))[1])
    optimizer = torch.optim.AdamW(ol.trainable(model), lr=1e-3)
    ol.start(model, optimizer, total_steps=2)
    for _ in range(2):
        model(torch.randn(3, 12)).sum().backward()
        optimizer.step()
    assert len(count) == 4


def test_a_proven_file_does_not_hold_the_weights_of_before(tmp_path):
    model = adapted("lora", nn.Linear(64, 64), nn.Linear(64, 64))
    path = ol.save(model, tmp_path / "a")
    time.sleep(proven.RACY / 1e9 + 0.05)
    ol.detach(model)
    ol.load(model, path)
    assert model._omnilora.kept["proven"]
    before = [m.weight.untyped_storage()._cdata for m in model]
    model.to(torch.bfloat16)
    gc.collect()
    held = {t.untyped_storage()._cdata for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.dtype == torch.float32}
    assert not held & set(before)


def test_a_block_hands_over_when_one_of_its_weights_begins_to_learn():
    import transformers

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    torch.manual_seed(0)
    model = ol.adapt(transformers.LlamaForCausalLM(config), ol.method("lora", r=2))
    shake(model)
    ids = torch.randint(0, 50, (2, 12))
    model(input_ids=ids)
    assert not host.refusals(model)
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.requires_grad_(True)
    got = torch.autograd.grad(model(input_ids=ids).logits.sin().sum(), weight)[0]
    with executor.off():
        want = torch.autograd.grad(model(input_ids=ids).logits.sin().sum(), weight)[0]
    assert host.refusals(model) and gap(got, want) < 1e-5


class Heads(nn.Module):
    """Two layers that read one input."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic = nn.Linear(12, 8), nn.Linear(12, 1)

    def forward(self, x):
        return self.actor(x), self.critic(x)


@pytest.mark.parametrize("key", METHODS)
def test_layers_that_read_one_input_stay_apart(key):
    """A backward pass for each of them, one of them unused, its factors written before the other's backward pass."""
    model, x = adapted(key, Heads()), torch.randn(5, 12, requires_grad=True)
    for _ in range(3):
        model.zero_grad()
        actor, critic = model(x)
        actor.logsumexp(-1).sum().backward()
        critic.square().sum().backward()
        got = [p.grad.clone() for p in ol.trainable(model)]
        with executor.off():
            model.zero_grad()
            actor, critic = model(x)
            (actor.logsumexp(-1).sum() + critic.square().sum()).backward()
        assert max(gap(a, p.grad) for a, p in zip(got, ol.trainable(model), strict=True)) < 1e-5
    if key not in ("tied_lora", "vera", "lotr", "randlora"):  # these share tensors between layers
        actor, critic = model(x)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "critic" in name:
                    p.mul_(2.0)
        model.zero_grad()
        actor.sum().backward()
        assert {p.grad is None for n, p in model.named_parameters() if "critic" in n} == {True}


@pytest.mark.parametrize("key", METHODS)
def test_gradients_may_be_taken_in_batches(key):
    model, x = adapted(key), torch.randn(5, 12, requires_grad=True)
    for _ in range(2):
        got = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x, vectorize=True)
        with executor.off():
            want = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)
        assert gap(got, want) < 1e-5


@pytest.mark.parametrize("key", ["lora", "dora"])
def test_gradients_may_be_taken_in_batches_under_dropout(key):
    torch.manual_seed(0)
    model = ol.adapt(nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)), ol.method(key, r=2, dropout=0.3))
    shake(model)
    x, found = torch.randn(5, 12, requires_grad=True), []
    for vectorize in (True, False):
        torch.manual_seed(1)
        found.append(torch.autograd.functional.jacobian(lambda x: model.train()(x).sum(0), x, vectorize=vectorize))
    assert gap(*found) < 1e-5
