"""What is special about the core: places, contexts, clocks. The maths is in test_contract.py."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import omnilora as ol
from omnilora import errors
from omnilora.contract import shake
from omnilora.core.method import Method
from omnilora.core.rule import Rule
from omnilora.parameterizations.dora import DoRA
from omnilora.parameterizations.lora import LoRA
from omnilora.proofs import Stack

L = Method("test", LoRA(r=2, alpha=5.0))


class Block(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(d, 12), "down_proj": nn.Linear(12, d)})
        self.norm = nn.LayerNorm(d)

    def forward(self, x):
        h = torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ x
        return self.norm(x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](h))))


class Model(nn.Module):
    def __init__(self, depth=2, tied=True):
        super().__init__()
        self.embed_tokens = nn.Embedding(17, 8)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.lm_head = nn.Linear(8, 17, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.remat = False

    def forward(self, ids, **kwargs):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False, **self.remat) if self.remat is not False else layer(x)
        return self.lm_head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def ids():
    return torch.randint(0, 17, (4, 6), generator=torch.Generator().manual_seed(1))


def names(model):
    return [s.site.name for s in ol.slots(model)]


# -- targets ------------------------------------------------------------------------------------------------------------


def test_default_targets_leave_out_head(model):
    ol.adapt(model, L)
    assert len(names(model)) == 8 and not any("lm_head" in n for n in names(model))


@pytest.mark.parametrize(
    ("targets", "count"),
    [("attention", 4), ("mlp", 4), ("q_proj", 2), ("layers.1.q_proj", 1), (r"re:layers\.0\..*_proj", 4), (["q_proj", "mlp"], 6)],
)
def test_patterns(model, targets, count):
    ol.adapt(model, L, targets=targets)
    assert len(names(model)) == count


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": "q_porj"}, ["q_porj", "q_proj"]),
        ({"targets": ["attention", "q_proj"]}, ["shadowed", "attention"]),
        ({"targets": "q_proj", "exclude": ["zzz"]}, ["zzz"]),
        ({"targets": "q_proj", "exclude": ["q_proj"]}, ["excluded"]),
        ({"targets": "re:(", }, ["expression"]),
        ({"targets": "mlp", "overrides": {"q_proj": {"r": 4}}}, ["q_proj"]),
        ({"targets": "attention", "overrides": {"attention": {"r": 4}, "q_proj": {"r": 3}}}, ["shadowed"]),
        ({"unfreeze": ["nothing"]}, ["nothing"]),
        ({"targets": "q_proj[9:11]"}, ["outside"]),
        ({"targets": "q_proj[0/3]"}, ["block"]),
        ({"targets": ["embed_tokens", "lm_head"]}, ["share one weight", "tied='both'"]),
    ],
)
def test_bad_targets_say_what_to_do(model, options, words):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(errors.TargetError) as caught:
        ol.adapt(model, L, **options)
    assert all(w in str(caught.value) for w in words)
    assert ol.adapters(model) == [] and list(model.state_dict()) == list(before)


def test_overrides_by_pattern(model):
    ol.adapt(model, Method("x", DoRA(LoRA(r=2))), overrides={"q_proj": {"r": 5, "alpha": 3}, "k_proj": {"method": L}, "layers.1.mlp.up_proj": {"unfreeze": True}, "down_proj": {"skip": True}})
    kinds = {s.site.name: s for s in ol.slots(model)}
    assert kinds["layers.0.q_proj"].inner.A.shape == (5, 8) and kinds["layers.0.q_proj"].scale == 3 / 5
    assert type(kinds["layers.0.k_proj"].how) is LoRA
    assert type(kinds["layers.1.mlp.up_proj"].how).__name__ == "Full"
    assert not any("down_proj" in n for n in kinds)
    with pytest.raises(errors.UnknownName, match="alpha"):
        ol.adapt(model, L, name="b", overrides={"q_proj": {"alfa": 1}})


def test_rank_above_size_warns_with_names(model):
    with pytest.warns(UserWarning, match=r"layers\.0\.q_proj"):
        ol.adapt(model, Method("x", LoRA(r=9)))


@pytest.mark.parametrize("hyper", [{"r": 0}, {"r": -1}, {"r": 2.5}, {"alpha": float("nan")}, {"dropout": 1.5}])
def test_bad_hyper_parameters(model, hyper):
    with pytest.raises(errors.BadValue, match=next(iter(hyper))):
        ol.adapt(model, ol.method("lora", **hyper))
    assert ol.adapters(model) == []


def test_unknown_method_hyper_and_option_name_the_nearest(model):
    with pytest.raises(errors.UnknownName, match="exclude"):
        ol.adapt(model, L, exclud=["q_proj"])
    assert ol.methods.dora(r=3).key == "dora" and "dora" in dir(ol.methods)
    with pytest.raises(errors.UnknownName, match="dora"):
        ol.method("drora")
    with pytest.raises(errors.UnknownName, match="alpha"):
        ol.method("lora", alhpa=1)


# -- places -------------------------------------------------------------------------------------------------------------


def test_slices_equal_separate_layers():
    torch.manual_seed(0)
    fused, x = nn.Sequential(nn.Linear(6, 12)), torch.randn(3, 6)
    parts = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))
    with torch.no_grad():
        for i, p in enumerate(parts):
            p.weight.copy_(fused[0].weight[4 * i : 4 * i + 4])
            p.bias.copy_(fused[0].bias[4 * i : 4 * i + 4])
    ol.adapt(fused, Method("x", DoRA(LoRA(2))), ["0[0/3]", "0[8:12]"])
    ol.adapt(parts, Method("x", DoRA(LoRA(2))), ["0", "2"])
    shake(fused)
    with torch.no_grad():
        for a, b in zip(ol.slots(parts), ol.slots(fused), strict=True):
            for (_, t), (_, u) in zip(a.tensors(), b.tensors(), strict=True):
                t.copy_(u)
    torch.testing.assert_close(fused(x), torch.cat([p(x) for p in parts], -1))


@pytest.mark.parametrize("how", [LoRA(2, 5.0), DoRA(LoRA(2, 5.0))])
def test_layers_that_read_weights(how):
    """Attention, LSTM and GRU read tensors: adapted = the same layer with the merged tensors written in."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm, self.gru = nn.LSTM(8, 5, 2, batch_first=True, bidirectional=True), nn.GRU(10, 4, batch_first=True)

        def forward(self, x):
            return self.gru(self.lstm(self.attn(x, x, x)[0])[0])[0]

    net, x = Net(), torch.randn(2, 5, 8)
    base = net(x)
    ol.adapt(net, Method("x", how), ["attn", "lstm", "gru"])
    assert len(names(net)) == 2 + 8 + 2
    torch.testing.assert_close(net(x), base, rtol=1e-5, atol=1e-6)
    shake(net)
    y = net(x)
    y.sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in ol.trainable(net))
    net.eval()
    ol.merge(net)
    torch.testing.assert_close(net(x), y, rtol=1e-5, atol=1e-5)
    with pytest.raises(errors.ContextError, match="whole tensor"):
        ol.unmerge(net)
        with ol.context(net, rows=["default", None]):
            net(x)


def test_expert_stacks_and_raw_parameters():
    torch.manual_seed(0)

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(3, 10, 6))

        def forward(self, x):
            return torch.einsum("bi,eoi->beo", x, self.gate_up)

    net, x = nn.ModuleDict({"experts": Experts()}), torch.randn(4, 6)
    net.forward = net["experts"].forward
    y0 = net["experts"](x)
    ol.adapt(net, L, ["gate_up"])
    shake(net)
    (s,) = ol.slots(net)
    assert s.A.shape == (3, 2, 6) and s.B.shape == (3, 10, 2)
    want = y0 + 2.5 * torch.einsum("bi,eri,eor->beo", x, s.A, s.B)
    torch.testing.assert_close(net["experts"](x), want)


def test_whole_block_is_a_site(model, ids):
    from omnilora.core.op import Map, chain
    from omnilora.core.parameterization import Parameterization, Tensors, input_side, output_side

    class Series(Parameterization):
        mergeable = False

        def init(self, site, seen=None):
            return Tensors(A=input_side(torch.zeros(3, site.fan_in)), B=output_side(torch.zeros(site.fan_in, 3)))

        def adapt(self, W, p, ctx):
            return chain(Map(lambda h: h + torch.relu(h @ p.A.mT) @ p.B.mT), W)

    before = model(ids)
    ol.adapt(model, Method("series", Series()), ["block:layers.0"])
    torch.testing.assert_close(model(ids), before)
    shake(model)
    assert (model(ids) - before).abs().max() > 1e-3
    with pytest.raises(errors.OmniloraError):
        ol.merge(model)
    Parameterization.known.pop("Series")


def test_tied_both_uses_one_adapter(model, ids):
    ol.adapt(model, L, ["embed_tokens"], tied="both")
    shake(model)
    y = model(ids)
    assert sum(t.numel() for t in ol.trainable(model)) == 2 * (17 + 8)
    plain = copy.deepcopy(model)
    first = ol.slots(model)[0]
    merged = first.site.read().mT.detach() + first.scale * (first.B @ first.A).mT.detach()
    ol.detach(plain)
    with torch.no_grad():
        plain.embed_tokens.weight.copy_(merged)
    torch.testing.assert_close(plain(ids), y, rtol=1e-5, atol=1e-5)


def test_unfrozen_parts_are_own_copies(model, ids, tmp_path):
    base = copy.deepcopy(model.state_dict())
    ol.adapt(model, L, "q_proj", unfreeze=["norm", "layers.1.k_proj"], bias="lora_only")
    assert {"layers.0.norm.weight", "layers.0.norm.bias", "layers.1.k_proj", "layers.1.k_proj.bias", "layers.0.q_proj.bias"} <= set(names(model))
    shake(model)
    y = model(ids)
    assert all(torch.equal(model.state_dict()[k], base[k]) for k in base)
    with ol.disabled(model):
        assert not torch.allclose(model(ids), y)
    ol.save(model, tmp_path / "a")
    other = Model().eval()
    other.load_state_dict(base)
    ol.load(other, tmp_path / "a")
    assert torch.equal(other(ids), y)
    ol.merge(model)
    torch.testing.assert_close(model(ids), y)


def test_encoder_layer_fast_path_does_not_lose_adapters():
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)
    ol.adapt(net, L, ["linear1", "linear2", "self_attn"])
    shake(net)
    with torch.no_grad():
        fast = net(x)
    torch.testing.assert_close(fast, net(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), ol.disabled(net):
        assert (net(x) - fast).abs().max() > 1e-2


def test_a_layer_whose_weight_is_read_is_named():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) @ self.read.weight.mT

    net = Sneaky()
    ol.adapt(net, L)
    with pytest.raises(errors.AttachError, match="read"):
        net(torch.randn(2, 4))
    ol.detach(net)
    ol.adapt(net, L, optional=["read"])
    net(torch.randn(2, 4))


def test_resized_and_replaced_layers_are_noticed(model, ids, tmp_path):
    ol.adapt(model, L, ["q_proj", "k_proj"])
    model(ids)
    model.layers[0].q_proj = nn.Linear(8, 8)
    for act in (lambda: ol.save(model, tmp_path / "a"), lambda: ol.start(model, total_steps=1), lambda: model.train()(ids)):
        with pytest.raises(errors.AttachError, match=r"layers\.0\.q_proj"):
            act()
    other = Model(tied=False)
    ol.adapt(other, L, ["embed_tokens"])
    other.embed_tokens.weight = nn.Parameter(torch.zeros(20, 8))
    with pytest.raises(errors.AttachError, match="resized"):
        other(ids)


def test_instance_forward_is_the_inner_forward(model, ids):
    layer = model.layers[0].q_proj
    old = layer.forward
    layer.forward = lambda x: old(x) * 2
    doubled = model(ids)
    ol.adapt(model, L)
    torch.testing.assert_close(model(ids), doubled)
    ol.detach(model)
    torch.testing.assert_close(model(ids), doubled)
    ol.adapt(model, L)
    with pytest.raises(errors.AttachError, match="Detach first"):
        layer.forward = (lambda self, x: x).__get__(layer)


def test_accelerate_hooks_before_and_after(model, ids):
    hooks = pytest.importorskip("accelerate.hooks")

    class Twice(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 2

    plain = copy.deepcopy(model)
    hooks.add_hook_to_module(model.layers[0].q_proj, Twice())
    hooked = model(ids)
    ol.adapt(model, L)
    torch.testing.assert_close(model(ids), hooked)
    shake(model)
    assert (model(ids) - hooked).abs().max() > 1e-3
    hooks.remove_hook_from_module(model.layers[0].q_proj)
    with ol.disabled(model):
        torch.testing.assert_close(model(ids), plain(ids))


def test_meta_initialization_then_load(tmp_path, ids):
    torch.manual_seed(0)
    real = Model(tied=False).eval()
    ol.adapt(real, Method("x", DoRA(LoRA(2))))
    shake(real)
    with torch.device("meta"):
        empty = Model(tied=False).eval()
    ol.adapt(empty, Method("x", DoRA(LoRA(2))))
    assert all(t.is_meta for t in ol.trainable(empty))
    empty.load_state_dict(real.state_dict(), assign=True)
    torch.testing.assert_close(empty(ids), real(ids))
    with torch.device("meta"):
        half = Model(tied=False)
    ol.adapt(half, L)
    half.load_state_dict(ol.base_state_dict(real), assign=True, strict=False)
    with pytest.raises(errors.AttachError, match="meta"):
        half(ids)


def test_autocast_keeps_adapters_fp32(model, ids):
    ol.adapt(model, L)
    shake(model)
    full = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids)
    assert all(t.dtype == torch.float32 for t in ol.trainable(model))
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.15)
    model.bfloat16()
    ol.detach(model)
    ol.adapt(model, L)
    assert all(t.dtype == torch.float32 for t in ol.trainable(model)) and model(ids).dtype == torch.bfloat16


# -- contexts ---------------------------------------------------------------------------------------------------------------


def two(model):
    ol.adapt(model, L, name="a")
    ol.adapt(model, Method("x", DoRA(LoRA(3, 4.0))), name="b.c")
    shake(model, "a", 0.3)
    shake(model, "b.c", 0.2)


def test_order_and_weights(model, ids):
    two(model)
    ol.activate(model, ["a", "b.c"])
    first = model(ids)
    ol.activate(model, ["b.c", "a"])
    assert (model(ids) - first).abs().max() > 1e-4
    ol.activate(model, {"a": 0.0})
    with ol.disabled(model):
        bare = model(ids)
    torch.testing.assert_close(model(ids), bare)
    with pytest.raises(errors.UnknownName, match=r"b\.c"):
        ol.activate(model, "b.x")


def test_packed_segments_equal_rows_alone(model, ids):
    two(model)

    class PerToken(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner.layers[0].mlp["up_proj"](self.inner.embed_tokens(x))

    net = PerToken(model)
    packed = ids.reshape(1, -1)
    segments = torch.arange(4).repeat_interleave(6).reshape(1, -1)
    rows = ["a", None, "b.c", {"a": 2.0, "b.c": 1.0}]
    with ol.context(model, rows=rows, segments=segments):
        together = net(packed).reshape(4, 6, -1)
    with ol.context(model, rows=rows):
        torch.testing.assert_close(net(ids), together)
    with ol.context(model, rows=rows, segments=segments), pytest.raises(errors.ContextError, match="segments"):
        net(ids)


def test_beams_and_wrong_leading_dimension(model, ids):
    two(model)
    beams = ids.repeat_interleave(3, 0)
    with ol.context(model, rows=["a", None, "b.c", "a"], repeat=3):
        wide = model(beams)
    with ol.context(model, rows=["a", None, "b.c", "a"]):
        torch.testing.assert_close(wide[::3], model(ids))
        with pytest.raises(errors.ContextError, match="leading dimension of 12"):
            model(beams)


def test_threads_do_not_see_each_other(model, ids):
    two(model)
    ol.activate(model, "a")
    want = {}
    for spec in ("a", "b.c", None):
        with ol.context(model, adapters=spec if spec else {}):
            want[spec] = model(ids)
    wrong = []

    def work(spec):
        for _ in range(30):
            with ol.context(model, adapters=spec if spec else {}):
                if not torch.equal(model(ids), want[spec]):
                    wrong.append(spec)

    threads = [threading.Thread(target=work, args=(s,)) for s in want for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert wrong == []


def gradients(model):
    out = [t.grad.clone() for s in ol.slots(model) for _, t in s.tensors()]
    model.zero_grad()
    return out


def test_checkpointed_rows_two_forwards_then_two_backwards(model, ids):
    two(model)
    model.train()
    r1, r2 = ["a", None, "b.c", "a"], ["b.c", "a", None, None]

    def losses():
        with ol.context(model, rows=r1):
            one = model(ids).square().sum()
        with ol.context(model, rows=r2):
            other = model(ids).pow(4).sum()
        return one, other

    a, b = losses()
    (a + b).backward()
    want = gradients(model)
    model.remat = {"context_fn": ol.checkpoint_context(model)}
    a, b = losses()
    b.backward()
    a.backward()
    for x, y in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    model.remat = {}
    a, _ = losses()
    with pytest.raises(errors.ContextError, match="context_fn"):
        a.backward()


def test_recomputation_emits_nothing_twice(model, ids):
    ol.adapt(model, ol.method("molora", experts=3, r=2, balance=0.1), "mlp")
    run = ol.start(model, total_steps=2)
    model.train()
    model.remat = {}
    out = model(ids)
    count = len(run.emitted)
    (out.sum() + run.loss(None, out)).backward()
    assert count == len(run.emitted) == 4
    assert all(s.R.grad.abs().sum() > 0 for s in ol.slots(model))


# -- clock ------------------------------------------------------------------------------------------------------------------


def test_rules_need_a_run_and_a_collected_loss(model, ids):
    ol.adapt(model, ol.method("adalora", r=4, target=2))
    model.train()
    with pytest.raises(errors.RunError, match=r"ol\.fit"):
        model(ids)
    opt = torch.optim.Adam(ol.param_groups(model, 1e-3))
    run = ol.start(model, opt, total_steps=20)
    model(ids).sum().backward()
    with pytest.raises(errors.RunError, match=r"run\.loss"):
        opt.step()
    run.close()


def test_ticks_once_an_update_under_accumulation(model, ids):
    class Count(Rule):
        draws = ticks = 0

        def before_forward(self, run):
            self.draws += 1

        def after_step(self, run):
            self.ticks += 1

    rule = Count()
    ol.adapt(model, Method("count", LoRA(2), (rule,)))
    model.train()
    opt = torch.optim.Adam(ol.param_groups(model, 1e-3))
    run = ol.start(model, opt, total_steps=3)
    for _ in range(3):
        for _ in range(4):
            model(ids).sum().backward()
        opt.step()
        opt.zero_grad()
    assert (rule.draws, rule.ticks, run.step) == (3, 3, 3)


def test_a_site_without_gradient_is_named():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.live, self.dead = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            self.dead(x)
            return self.live(x)

    net = Dead()
    ol.adapt(net, L)
    opt = torch.optim.SGD(ol.param_groups(net, 0.1))
    ol.start(net, opt, total_steps=1)
    net(torch.randn(2, 4)).sum().backward()
    with pytest.raises(errors.RunError, match="dead"):
        opt.step()


def test_every_trainable_tensor_is_in_one_group(model):
    ol.adapt(model, ol.method("lora_plus", r=2, ratio=8.0), ["embed_tokens", "q_proj"], unfreeze=["norm"])
    groups = ol.param_groups(model, 1e-2, weight_decay=0.1)
    ids = [id(p) for g in groups for p in g["params"]]
    assert sorted(ids) == sorted(map(id, ol.trainable(model))) and len(set(ids)) == len(ids)
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert rates == {"A": (1e-2, 0.1), "B": (8e-2, 0.1), "B, no decay": (8e-2, 0.0), "embedding": (1e-6, 0.1)}


# -- merging ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["ram", "disk", "none"])
def test_merge_keeps(model, ids, keep):
    two(model)
    ol.activate(model, {"a": 0.5, "b.c": 1.0})
    y, before = model(ids), copy.deepcopy(ol.base_state_dict(model))
    report = ol.merge(model, keep=keep, probe=lambda m: m(ids))
    assert report.largest < 1e-4 and len(report.layers) == 8
    torch.testing.assert_close(model(ids), y, rtol=1e-4, atol=1e-4)
    if keep == "none":
        with pytest.raises(errors.AttachError, match="gone"):
            ol.unmerge(model)
        return
    ol.unmerge(model)
    assert all(torch.equal(v, before[k]) for k, v in ol.base_state_dict(model).items())
    assert torch.equal(model(ids), y)


def test_merge_refuses_above_its_bound_and_leaves_nothing(model, ids):
    two(model)
    model.bfloat16()
    before, y = copy.deepcopy(ol.base_state_dict(model)), model(ids)
    with pytest.raises(errors.MergeRefused, match="bound"):
        ol.merge(model, bound=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in ol.base_state_dict(model).items())
    assert torch.equal(model(ids), y)


def test_merge_and_unload_is_the_plain_model(model, ids):
    two(model)
    ol.activate(model, "b.c")
    y, keys = model(ids), list(ol.base_state_dict(model))
    plain = ol.merge_and_unload(model)
    assert type(plain.layers[0].q_proj) is nn.Linear and list(plain.state_dict()) == keys
    torch.testing.assert_close(plain(ids), y, rtol=1e-4, atol=1e-4)


def test_detach_one_of_two_and_all(model, ids):
    before, grads = model(ids), [p.requires_grad for p in model.parameters()]
    two(model)
    ol.activate(model, "a")
    y = model(ids)
    ol.detach(model, "b.c")
    assert torch.equal(model(ids), y) and ol.adapters(model) == ["a"]
    ol.detach(model)
    assert torch.equal(model(ids), before) and [p.requires_grad for p in model.parameters()] == grads
    assert not model._forward_pre_hooks and not model._forward_hooks and type(model.layers[0].q_proj) is nn.Linear


def test_stack_of_adapters_survives_deepcopy_independently(model, ids):
    two(model)
    other = copy.deepcopy(model)
    ol.activate(other, "a")
    ol.activate(model, "b.c")
    with ol.context(other, adapters="b.c"):
        assert torch.equal(other(ids), model(ids))
    assert not torch.equal(other(ids), model(ids))


def test_proofs_stack_shape():
    assert Stack(3, 4, 5)(torch.zeros(2, 3)).shape == (2, 5)
