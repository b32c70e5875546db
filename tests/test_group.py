"""Layers that read the same input: when their products are one pass, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import omnilora as ol
from omnilora.contract import shake
from omnilora.core.layer import Adapted
from omnilora.plans import executor, group


class Three(nn.Module):
    """query, key and value of one input; ``calls`` says which, in which order."""

    def __init__(self, dtype=torch.float64, bias=True):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(12, out, bias, dtype=dtype) for out in (12, 8, 12))
        self.calls, self.between = ("query", "key", "value"), lambda x: x

    def forward(self, x):
        ys = {}
        for i, name in enumerate(self.calls):
            if i == 1:
                x = self.between(x)
            ys[name] = getattr(self, name)(x)
        return torch.cat([y.sin() for y in ys.values()], -1)


def adapted(key="lora", dtype=torch.float64, bias=True, **hyper):
    torch.manual_seed(0)
    model = ol.adapt(nn.Sequential(nn.Linear(6, 12, dtype=dtype), Three(dtype, bias)), ol.method(key, **(hyper or {"r": 3})), ["query", "key", "value"])
    shake(model)
    return model.train()


def batch(dtype=torch.float64, *shape):
    return torch.randn(*(shape or (5, 6)), dtype=dtype)


def slopes(model, x, through=lambda model, x: model(x)):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(through(model, x).square().sum(), [x, *ol.trainable(model)], allow_unused=True)


def far(got, want):
    assert [g is None for g in got] == [w is None for w in want]
    return max(float((g - w).norm() / w.norm().clamp_min(1e-30)) for g, w in zip(got, want, strict=True) if g is not None)


def links(model):
    found = {n: m.adapters.quick for n, m in model.named_modules() if isinstance(m, Adapted)}
    names = {id(q): n.rpartition(".")[2] for n, q in found.items()}
    return {names[id(q)]: names.get(id(q.then)) for q in found.values() if q is not None}


def warm(model, x):
    for _ in range(3):
        slopes(model, x)


def products(model, x):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        slopes(model, x)
    return sum(e.count for e in seen.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear"))


def check(model, x, tolerance=1e-12, through=lambda model, x: model(x)):
    """Values and gradients are those of the trees."""
    for _ in range(3):
        y, got = through(model, x), slopes(model, x, through)
        with executor.off():
            assert far([y.detach()], [through(model, x).detach()]) < tolerance
            assert far(got, slopes(model, x, through)) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_values_and_gradients(dtype, tolerance, bias, shape):
    model = adapted(dtype=dtype, bias=bias)
    check(model, batch(dtype, *shape), tolerance)
    assert links(model) == {"query": "key", "key": "value", "value": None}


@pytest.mark.parametrize("hyper", [{"r": 3, "alpha": 0.5}, {"r": 1}])
def test_second_derivatives(hyper):
    model, x = adapted(**hyper), batch().requires_grad_()
    warm(model, x)
    tensors = [x, *ol.trainable(model)]

    def second():
        first = torch.autograd.grad(model(x).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    got = second()
    with executor.off():
        assert far(got, second()) < 1e-11


def test_three_layers_take_fewer_products_than_three_times_one(monkeypatch):
    model, x = adapted(), batch()
    warm(model, x)
    together = products(model, x)
    monkeypatch.setattr(group, "groups", lambda short: False)
    assert products(model, x) - together == 6  # by A's: 3 → 1 forward, 3 → 1 to x, 3 → 1 to the A's


def test_factors_that_do_not_learn():
    model, x = adapted(), batch()
    for name, p in model.named_parameters():
        if "key" in name and p.requires_grad:
            p.requires_grad_(name.endswith("B"))
    check(model, x)


def test_different_ranks_and_scales():
    torch.manual_seed(0)
    overrides = {"key": {"r": 5, "alpha": 3.0}, "value": {"r": 1}}
    model = nn.Sequential(nn.Linear(6, 12, dtype=torch.float64), Three())
    ol.adapt(model, ol.method("lora", r=2), ["query", "key", "value"], overrides=overrides)
    shake(model)
    check(model.train(), batch())
    assert links(model)["query"] == "key"


@pytest.mark.parametrize("calls", [("query",), ("query", "value"), ("key", "query", "value"), ("query", "query", "key"),
                                   ("query", "key", "query", "value"), ("value", "query", "key")])  # fmt: skip
def test_a_layer_is_not_called_as_expected(calls):
    model, x = adapted(), batch()
    warm(model, x)
    usual = model[1].calls
    for _ in range(3):
        for model[1].calls in (calls, usual):
            check(model, x)


def test_results_made_ahead_do_not_stay():
    model, x = adapted(), batch()
    warm(model, x)
    model[1].calls = ("query",)
    y = model(x)
    made = model[1].query.adapters.hub.local.met.ahead
    node = weakref.ref(made[0][2])
    assert len(made) == 2
    del y, made
    with torch.no_grad():
        model(x)
    gc.collect()
    assert node() is None


def test_the_input_is_written_between_two_calls():
    model, x = adapted(), batch()
    warm(model, x)
    model[1].between = lambda x: x.mul_(2.0) if not x.requires_grad else x * 2.0
    check(model, x)
    model = adapted(bias=False)
    model[0] = nn.Identity()
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        want = [f(v) for f, v in ((model[1].query, x), (model[1].key, 2 * x))]
    for write in (False, False, True):
        z = x.clone()
        got = [model[1].query(z), model[1].key(z.mul_(2.0) if write else z)]
    assert far(got, want) < 1e-12


@pytest.mark.parametrize("what", ["weight", "A", "scale", "bias", "replaced", "frozen base", "active"])
def test_a_layer_changes_between_two_calls(what):
    model, x = adapted(), batch()
    warm(model, x)
    key = model[1].key
    slot = key.adapters.slots["default"][0]

    def change(x):
        with torch.no_grad():
            if what in ("weight", "bias"):
                getattr(key, what).mul_(1.5)
            elif what == "A":
                slot.A.mul_(1.5)
            elif what == "scale":
                slot.scale *= 1.5
            elif what == "replaced":
                key.weight = nn.Parameter(key.weight * 1.5, requires_grad=False)
            elif what == "frozen base":
                key.weight.requires_grad_()
            else:
                ol.activate(model, None)
        return x

    h = model[0](x)
    got = [model[1].query(h), (change(h), model[1].key(h))[1], model[1].value(h)]
    with executor.off():
        want = [model[1].key(h), model[1].value(h)]
    assert far(got[1:], want) < 1e-12


def test_something_happens_before_the_second_layer():
    model, x = adapted(), batch()
    warm(model, x)
    handle = model[1].key.register_forward_pre_hook(lambda m, args: (args[0] * 3.0,))
    check(model, x)
    handle.remove()
    handle = model[1].key.register_full_backward_hook(lambda m, gi, go: (gi[0] * 3.0,))
    check(model, x)
    handle.remove()
    seen = []
    model[1].key.register_forward_hook(lambda m, args, y: seen.append(y) or y * 2.0)
    check(model, x)
    assert len(seen) > 4


def test_weights_that_are_brought_when_a_layer_is_called():
    model, x = adapted(), batch()
    key, away = model[1].key, torch.empty(0, dtype=torch.float64)
    home = key.weight.data

    def put(data):
        key.weight.data = data

    with executor.off():
        want = slopes(model, x)
    key.register_forward_pre_hook(lambda m, args: put(home))
    key.register_forward_hook(lambda m, args, y: put(away))
    put(away)
    for _ in range(3):
        got = model(x).square().sum()
        put(home)
        grads = torch.autograd.grad(got, ol.trainable(model))
        put(away)
        assert far(grads, want[1:]) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model, x = adapted(), batch()
    warm(model, x)

    def through(model, x):
        if reentrant:
            return checkpoint(model, x, use_reentrant=True)
        return checkpoint(model, x, use_reentrant=False, context_fn=ol.checkpoint_context(model))

    x.requires_grad_()
    for _ in range(3):
        got = torch.autograd.grad(through(model, x).square().sum(), x) if not reentrant else []
        if reentrant:
            model.zero_grad()
            through(model, x).square().sum().backward()
            got = [p.grad for p in ol.trainable(model)]
        warm(model, x)
        with executor.off():
            want = slopes(model, x)
        assert far(got, want[1:] if reentrant else want[:1]) < 1e-12


def test_a_switch_a_copy_and_a_removal():
    model, x = adapted(), batch()
    warm(model, x)
    other = copy.deepcopy(model)
    check(other, x)
    ol.adapt(model, ol.method("lora", r=2), ["query", "key", "value"], name="b")
    shake(model)
    for name in ("default", "b", ["default", "b"], None, "b"):
        ol.activate(model, name)
        y = model(x)
        with executor.off():
            assert far([y.detach()], [model(x).detach()]) < 1e-12
    ol.detach(model)
    assert not any(isinstance(m, Adapted) for m in model.modules())
    check(other, x)


def test_threads_do_not_meet():
    model = adapted()
    inputs = [batch() for _ in range(4)]
    with executor.off():
        want = [slopes(model, x) for x in inputs]
    found = {}

    def work(i):
        for _ in range(30):
            found[i] = slopes(model, inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert max(far(found[i], want[i]) for i in range(4)) < 1e-12


def test_dropout_keeps_the_order_of_its_draws():
    model, x = adapted(dropout=0.3, r=3), batch()
    assert not any(group.groups(m.adapters.quick) for m in model.modules() if isinstance(m, Adapted) and m.adapters.quick)
    for _ in range(2):
        torch.manual_seed(3)
        got = slopes(model, x)
        torch.manual_seed(3)
        assert far(got, slopes(model, x)) == 0.0
