"""Contraction orders: equal to autograd, their FLOPs counted, the planner's picks, and where the tree runs instead."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import omnilora as ol
from omnilora import contract, proofs
from omnilora.errors import BadValue
from omnilora.plans import contraction, executor
from omnilora.plans.contraction import (
    BACKWARD,
    FORWARD,
    Contraction,
    Needs,
    Plan,
    backward_flops,
    choose,
    fastest,
    forward_flops,
)

SHAPES = [(9, 7, 5, 3), (4, 12, 10, 2), (6, 5, 8, 4)]
NEEDS = [Needs(*n) for n in itertools.product((True, False), repeat=3) if any(n)]


def tensors(t, i, o, r, needs):
    torch.manual_seed(0)
    x, A, B = (torch.randn(s, dtype=torch.float64, requires_grad=n) for s, n in (((t, i), needs.x), ((r, i), needs.U), ((o, r), needs.V)))
    return x, torch.randn(o, i, dtype=torch.float64), A, B, torch.randn(o, dtype=torch.float64)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_orders_equal_autograd_and_cost_what_they_say(shape, needs):
    x, W, A, B, bias = tensors(*shape, needs)
    dy = torch.randn(shape[0], shape[2], dtype=torch.float64)
    wanted = [v for v in (x, A, B) if v.requires_grad]
    y = x @ W.t() + bias + (x @ A.t()) @ B.t()
    want = torch.autograd.grad(y, wanted, dy)
    for f, b in itertools.product(FORWARD, BACKWARD):
        with FlopCounterMode(display=False) as ahead:
            got = Contraction.apply(x, W, A, B, bias, Plan(f, b))
        assert proofs.relative(got, y) < 1e-12 and ahead.get_total_flops() == forward_flops(f, *shape)
        with FlopCounterMode(display=False) as back:
            grads = torch.autograd.grad(got, wanted, dy)
        assert back.get_total_flops() == backward_flops(b, *shape, needs), b
        assert all(proofs.relative(g, w) < 1e-12 for g, w in zip(grads, want))


def test_the_papers_figures():
    """t = 8192, i = o = 1024, r = 512, in GFLOP."""
    shape = (8192, 1024, 1024, 512)
    cost = {b: round(backward_flops(b, *shape) / 2**30 * 1.073741824, 1) for b in BACKWARD}
    assert (cost["B1"], cost["B5"], cost["B4"]) == (60.1, 52.6, 37.6)
    assert choose(*shape) == ("F2", "B4")
    assert cost["B6"] >= cost["B2"] and cost["B7"] == cost["B8"] == cost["B3"]


@pytest.mark.parametrize("t, i, o, r", itertools.product((8, 500, 5000), (64, 768), (64, 3072), (4, 128)))
def test_rules_of_thumb(t, i, o, r):
    assert (choose(t, i, o, r).forward == "F2") == (t * (i + o) > i * o)
    assert (backward_flops("B5", t, i, o, r) < backward_flops("B1", t, i, o, r)) == (t > o)
    best = min(backward_flops(b, t, i, o, r) for b in BACKWARD)
    assert backward_flops(choose(t, i, o, r).backward, t, i, o, r) == best
    assert choose(t, i, o, r).backward in ("B1", "B2", "B3", "B4", "B5")


def test_half_precision_forms_no_sum():
    assert choose(8192, 1024, 1024, 512, folds=False) == ("F1", "B3")
    model = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    ol.adapt(model, ol.method("run_lora", r=4))
    contract.shake(model)
    x = torch.randn(512, 32).bfloat16()
    with ol.context(model):
        y = model(x)
    (s,) = ol.slots(model)
    W = model[0].weight.double() + s.scale * (s.B @ s.A).double()
    assert proofs.relative(y.double(), x.double() @ W.t() + model[0].bias.double()) < 1e-2


def test_time_is_measured_once_a_shape():
    fastest.cache_clear()
    model = proofs.Stack(48, 40)
    ol.adapt(model, ol.method("run_lora", r=4, by="time"))
    contract.shake(model)
    for t in (33, 40, 64):
        x = torch.randn(t, 48)
        (s,) = ol.slots(model)
        W = model.layers[0].weight + s.scale * s.B @ s.A
        torch.testing.assert_close(model(x), x @ W.t(), rtol=1e-4, atol=1e-5)
    assert fastest.cache_info().misses == 1
    with pytest.raises(BadValue, match="by"):
        ol.method("run_lora", by="luck")


@pytest.fixture
def taken(monkeypatch):
    """How often a contraction was planned."""
    calls = []
    plan = contraction.Planner.plan
    monkeypatch.setattr(contraction.Planner, "plan", lambda self, *a: calls.append(1) or plan(self, *a))
    return calls


def lora_pair(model, **options):
    """The same tensors under RunLoRA and LoRA."""
    import copy

    other = copy.deepcopy(model)
    for net, key in ((model, "run_lora"), (other, "lora")):
        torch.manual_seed(1)
        ol.adapt(net, ol.method(key, r=3, alpha=5.0, **options))
        contract.shake(net)
    return model, other


def test_a_dense_layer_is_planned(taken):
    torch.manual_seed(0)
    ours, plain = lora_pair(nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 4)).double())
    x = torch.randn(2, 9, 10, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    ours(x).square().sum().backward()
    plain(z).square().sum().backward()
    assert len(taken) == 2
    torch.testing.assert_close(x.grad, z.grad)
    for a, b in zip(ol.slots(ours), ol.slots(plain)):
        torch.testing.assert_close(a.A.grad, b.A.grad)
        torch.testing.assert_close(a.B.grad, b.B.grad)


def test_the_tree_runs_elsewhere(taken):
    torch.manual_seed(0)
    ours, plain = lora_pair(nn.Sequential(nn.Linear(10, 12)))
    x = torch.randn(6, 10)
    with ol.context(ours, rows=["default", None] * 3), ol.context(plain, rows=["default", None] * 3):
        torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(torch.func.vmap(ours)(x), plain(x))
    torch.testing.assert_close(torch.func.jvp(ours, (x,), (x,))[1], torch.func.jvp(plain, (x,), (x,))[1])
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager", fullgraph=True)(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        with executor.off():  # a fused pass rounds otherwise
            want = plain(x)
        torch.testing.assert_close(ours(x), want)
    ours[0].weight.requires_grad_()
    ours(x).sum().backward()
    assert ours[0].weight.grad is not None
    assert taken == []


def test_dropout_and_other_layers_run_the_tree(taken):
    torch.manual_seed(0)
    ours, plain = lora_pair(nn.Sequential(nn.Linear(10, 12)), dropout=0.5)
    x = torch.randn(6, 10)
    for net in (ours, plain):
        net.train()
    torch.manual_seed(2)
    y = ours(x)
    torch.manual_seed(2)
    assert torch.equal(y, plain(x)) and taken == []
    ours.eval()(x)
    assert len(taken) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("conv", "embedding", "transposed", "slice", "nf4"):
            contract.adapted(ol.method("run_lora", r=2).parameterization, kind, torch.float32)(contract.world(kind, torch.float32).sample())
    assert len(taken) == 1


def test_double_backward():
    torch.manual_seed(0)
    ours, plain = lora_pair(nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double())
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def penalty(net):
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), [p for s in ol.slots(net) for _, p in s.tensors()])

    for a, b in zip(penalty(ours), penalty(plain)):
        torch.testing.assert_close(a, b)


def test_merging_and_files_are_loras(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 12))
    ours, plain = lora_pair(base)
    x = torch.randn(6, 10)
    y = ours(x)
    ol.merge(ours)
    torch.testing.assert_close(ours(x), y)
    ol.unmerge(ours)
    ol.save(ours, tmp_path / "a")
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(10, 12)), tmp_path / "a")
    torch.testing.assert_close(theirs(x), y)
