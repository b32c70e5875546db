"""Scores of an adapter's entries against their definitions; masks."""

import math

import pytest
import torch

import omnilora as ol
from omnilora import proofs
from omnilora.contract import check_parameterization, own_tags
from omnilora.core.method import prepare
from omnilora.errors import BadValue
from omnilora.initializers import scores
from omnilora.parameterizations.bottleneck import Bottleneck
from omnilora.parameterizations.lora import LoRA
from omnilora.parameterizations.masked import Masked


def loss(model, batch):
    return (torch.tanh(model(batch[0])) - batch[1]).square().mean()


def setup(how=None):
    torch.manual_seed(0)
    model = proofs.Stack(4, 3).double()
    batches = [(torch.randn(5, 4).double(), torch.randn(5, 3).double()) for _ in range(2)]
    ol.adapt(model, ol.Method("x", how or Masked(LoRA(2, 3.0), std=0.5)))
    (s,) = ol.slots(model)
    return model, batches, s, [s.inner.A, s.inner.B]


def test_snip_is_the_gradient_of_the_mask():
    model, batches, s, tensors = setup()
    got = scores.score("snip", model, [s], tensors, batches, loss, torch.Generator())
    for p in (s.mask.A, s.mask.B):
        p.requires_grad_()
    sum(loss(model, b) for b in batches).backward()
    for v, m in zip(got, (s.mask.A, s.mask.B)):
        torch.testing.assert_close(v, m.grad.abs())


def test_grasp_is_the_dense_hessian_times_the_gradient():
    model, batches, s, tensors = setup()
    theta = torch.cat([t.detach().flatten() for t in tensors])

    def whole(v):
        a, b = v[:8].view(2, 4), v[8:].view(3, 2)
        w = model.layers[0].weight + 1.5 * b @ a
        return sum((torch.tanh(x @ w.mT) - y).square().mean() for x, y in batches)

    H, g = torch.autograd.functional.hessian(whole, theta), torch.func.grad(whole)(theta)
    got = scores.score("grasp", model, [s], tensors, batches, loss, torch.Generator())
    torch.testing.assert_close(torch.cat([v.flatten() for v in got]), theta * (H @ g))


def test_synflow_is_the_flow_of_ones_and_signs_come_back():
    model, batches, s, tensors = setup()
    before = [t.detach().clone() for t in tensors]
    got = scores.score("synflow", model, [s], tensors, batches, loss, torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before, tensors))
    a, b = before[0].abs().requires_grad_(), before[1].abs().requires_grad_()
    (1.5 * b @ (a @ torch.ones(4).double())).mean().backward()
    torch.testing.assert_close(got, [(before[0] * a.grad).abs(), (before[1] * b.grad).abs()])


def test_a_factor_at_zero_is_refused():
    model, batches, s, _ = setup(Masked(LoRA(2, 3.0)))
    with pytest.raises(BadValue, match="zero"):
        scores.prune(model, [s], batches, loss, "snip", 0.4)
    with pytest.raises(BadValue, match="std"):
        ol.method("sparse_adapter", std=0.0)
    with pytest.raises(BadValue, match="score"):
        ol.method("sparse_adapter", score="magic")


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_exact_counts(scope, rounds):
    model, batches, s, _ = setup()
    scores.prune(model, [s], batches, loss, "snip", 0.55, scope, rounds)
    gone = [int((m == 0).sum()) for m in (s.mask.A, s.mask.B)]
    assert sum(gone) == math.ceil(0.55 * 14) if scope == "global" else gone == [math.ceil(0.55 * 8), math.ceil(0.55 * 6)]
    assert all(bool((t[m == 0] == 0).all()) for t, m in ((s.inner.A, s.mask.A), (s.inner.B, s.mask.B)))


@pytest.mark.parametrize("adapter", ["series", "parallel"])
def test_bottlenecks(adapter):
    model = proofs.Stack(6, 6, 4, act=torch.tanh)
    x, y = torch.randn(8, 6), torch.randn(8, 4)
    made, _ = prepare(model, ol.method("sparse_adapter", adapter=adapter, r=4, score="grasp"), [(x, y)], loss)
    assert ol.adapters(model) == []
    ol.adapt(model, made)
    kept = sum(s.marks["kept"] for s in ol.slots(model))
    total = sum(t.numel() for s in ol.slots(model) for n, t in s.tensors() if n.startswith("mask."))
    assert kept == total - math.ceil(0.4 * total)
    how = Masked(Bottleneck(3, adapter.replace("series", "series-out")), ("D", "U"), 0.1)
    assert check_parameterization(how, own_tags(how)) > 40


def test_large_sparse_has_the_same_budget():
    x, y = torch.randn(8, 6), torch.randn(8, 4)
    kept = []
    for r, sparsity in ((4, 0.0), (8, 0.5)):
        model = proofs.Stack(6, 4)
        made, _ = prepare(model, ol.method("sparse_adapter", r=r, sparsity=sparsity), [(x, y)], loss)
        kept.append(ol.slots(ol.adapt(model, made))[0].marks["kept"])
    assert kept[0] == kept[1] == 40
